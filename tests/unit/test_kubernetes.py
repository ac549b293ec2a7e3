"""The Kubernetes manifests against Kubernetes' own schemas, walship's settings and verbs, and each other."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml

from infra.cli import VERBS
from infra.settings import known_names

_HOME = Path(__file__).resolve().parents[2]
_FOLDER = _HOME / "infra" / "deploy" / "kubernetes"
#: Of schemas: the newest that the library knows is what people will have.
_VERSION = "1.37"
_FOLDERS = (_FOLDER, _FOLDER / "sidecar")


def _read(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def _manifests() -> list[Path]:
    return sorted(path for path in _FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml")


def _containers(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each container, with the specification of its pod."""
    spec = document.get("spec", {})
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    pod = spec.get("template", {}).get("spec", {})
    for container in [*pod.get("initContainers", ()), *pod.get("containers", ())]:
        yield container, pod


def _env(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text("utf-8").splitlines() if line)


@pytest.mark.parametrize("path", _manifests(), ids=lambda path: str(path.relative_to(_FOLDER)))
def test_manifests_keep_to_the_schemas(path: Path) -> None:
    patch = path.name == "walship.yaml"  # it is a part of a StatefulSet: what is required stands in the other
    for document in _read(path):
        if document["kind"] == "PodMonitor":  # of the Prometheus operator, whose schemas no registry has
            assert set(document["spec"]) == {"selector", "podMetricsEndpoints"}
        elif not patch:
            kubernetes_validate.validate(document, _VERSION, strict=True)


def test_a_misspelled_member_is_noticed() -> None:
    (document,) = _read(_FOLDER / "deployment.yaml")
    document["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, _VERSION, strict=True)


def test_the_patch_makes_a_valid_pod() -> None:
    """As kustomize merges it: containers, volumes and mounts by name."""
    (whole,) = [d for d in _read(_FOLDER / "sidecar" / "postgres.yaml") if d["kind"] == "StatefulSet"]
    (patch,) = _read(_FOLDER / "sidecar" / "walship.yaml")
    assert patch["metadata"]["name"] == whole["metadata"]["name"]
    merged = _merge(whole, patch)
    kubernetes_validate.validate(merged, _VERSION, strict=True)
    pod = merged["spec"]["template"]["spec"]
    assert [container["name"] for container in pod["containers"]] == ["postgres", "walship"]
    volumes = {volume["name"] for volume in pod["volumes"]} | {"data"}
    for container, _ in _containers(merged):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def _merge(base: Any, patch: Any) -> Any:
    if isinstance(base, dict) and isinstance(patch, dict):
        return {**base, **{key: _merge(base[key], value) if key in base else value for key, value in patch.items()}}
    if isinstance(base, list) and isinstance(patch, list):
        named = {item["name"]: item for item in patch}
        kept = [_merge(item, named.pop(item["name"])) if item["name"] in named else item for item in base]
        return kept + list(named.values())
    return patch


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_what_is_named_is_there(folder: Path) -> None:
    (made,) = _read(folder / "kustomization.yaml")
    patches = {patch["path"] for patch in made.get("patches", ())}
    there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert {*made["resources"], *patches} == there
    generated = {maker["name"] for kind in ("configMapGenerator", "secretGenerator") for maker in made[kind]}
    for path in folder.glob("*.yaml"):
        for document in _read(path):
            for container, _ in _containers(document):
                sources = container.get("envFrom", ())
                named = {ref["name"] for source in sources for ref in source.values()}
                assert named <= generated


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_settings_and_verbs_exist(folder: Path) -> None:
    settings, secrets = _env(folder / "settings.env"), _env(_FOLDER / "secret.env.example")
    assert {*settings, *secrets} <= known_names()
    assert not any(secrets.values())
    for path in folder.glob("*.yaml"):
        for document in _read(path):
            for container, pod in _containers(document):
                if container.get("image") != "walship":
                    continue
                assert container["args"][0] in VERBS
                assert container["securityContext"]["readOnlyRootFilesystem"]
                for port in container.get("ports", ()):
                    assert settings["WALSHIP_LISTEN"].endswith(f":{port['containerPort']}")
                if path.name != "walship.yaml":
                    volumes = {volume["name"] for volume in pod["volumes"]}
                    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
                    assert pod["securityContext"]["runAsNonRoot"]


def test_the_sidecar_reads_what_the_server_writes() -> None:
    settings = _env(_FOLDER / "sidecar" / "settings.env")
    (patch,) = _read(_FOLDER / "sidecar" / "walship.yaml")
    containers = {container["name"]: container for container, _ in _containers(patch)}
    mounts = {mount["name"]: mount["mountPath"] for mount in containers["walship"]["volumeMounts"]}
    (server,) = [d for d in _read(_FOLDER / "sidecar" / "postgres.yaml") if d["kind"] == "StatefulSet"]
    own = {m["name"]: m["mountPath"] for c, _ in _containers(server) for m in c["volumeMounts"]}
    added = {mount["name"]: mount["mountPath"] for mount in containers["postgres"]["volumeMounts"]}
    for name, place in {**own, **added}.items():
        assert mounts[name] == place
    assert settings["WALSHIP_SPOOL_DIR"].startswith(mounts["spool"])
    assert settings["WALSHIP_DATA_DIR"].startswith(mounts["data"])
    assert settings["POSTGRES_HOST"] == mounts["socket"]
    assert settings["WALSHIP_SPOOL_DIR"] == containers["walship-spool"]["command"][-1]
    assert f"'{settings['WALSHIP_SPOOL_DIR']}'" in (_FOLDER / "sidecar" / "walship.yaml").read_text("utf-8")


def test_prometheus_knows_the_pods_by_the_name_in_the_rules() -> None:
    (monitor,) = _read(_FOLDER / "podmonitor.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    rules = (_HOME / "infra" / "deploy" / "prometheus" / "walship.rules.yml").read_text("utf-8")
    assert f'job="{endpoint["relabelings"][0]["replacement"]}"' in rules.replace(" ", "")
    (deployment,) = _read(_FOLDER / "deployment.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    assert deployment["spec"]["template"]["spec"]["containers"][0]["ports"][0]["name"] == endpoint["port"]


def test_the_secrets_are_in_no_commit() -> None:
    assert "secret.env" in shlex.split((_HOME / ".gitignore").read_text("utf-8"), comments=True)
