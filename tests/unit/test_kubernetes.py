"""The Kubernetes manifests against Kubernetes' own schemas, walship's settings and verbs, and each other."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml

from infra.planning import contradictions, doubts
from infra.remembered import jobs_of
from infra.settings import known_names, load
from tests.command_lines import below, folders_of_a_drill, parsed
from tests.docs_blocks import blocks_of

_HOME = Path(__file__).resolve().parents[2]
_FOLDER = _HOME / "infra" / "deploy" / "kubernetes"
#: Of schemas: the newest that the library knows is what people will have.
_VERSION = "1.37"
_FOLDERS = (_FOLDER, _FOLDER / "sidecar")
#: Of the Prometheus operator, whose schemas no registry has: kind → members of its specification.
_OPERATOR = {"PodMonitor": {"selector", "podMetricsEndpoints"}, "PrometheusRule": {"groups"}}
_SIZES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
#: What docs/sizing.md says of the service, of a job beside it, and of the moment in which a key ring is opened.
_MEMORY = (200 + 250 + 64) * 10**6


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
    """As kustomize reads it: comments are left out, quotes are part of the value."""
    lines = path.read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _resources(folder: Path) -> set[Path]:
    """The files that a kustomization names, and those of the folders that it builds upon."""
    (made,) = _read(folder / "kustomization.yaml")
    paths = [(folder / name).resolve() for name in made["resources"]]
    return {file for path in paths for file in (_resources(path) if path.is_dir() else {path})}


def _ours() -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Each container that runs walship, with its pod. (Not the patch of a job, which has neither image nor words.)"""
    for path in _manifests():
        for document in _read(path):
            for container, pod in _containers(document):
                if container.get("image") == "walship":
                    yield path, container, pod


@pytest.mark.parametrize("path", _manifests(), ids=lambda path: str(path.relative_to(_FOLDER)))
def test_manifests_keep_to_the_schemas(path: Path) -> None:
    patch = path in (
        _FOLDER / "sidecar" / name for name in ("walship.yaml", "init.yaml")
    )  # parts, of what is elsewhere
    for document in _read(path):
        if document["kind"] in _OPERATOR:
            assert set(document["spec"]) == _OPERATOR[document["kind"]]
        elif not patch:
            kubernetes_validate.validate(document, _VERSION, strict=True)


def test_a_misspelled_member_is_noticed() -> None:
    (document,) = _read(_FOLDER / "deployment.yaml")
    document["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, _VERSION, strict=True)


@pytest.mark.parametrize(
    ("whole", "patch"), [("sidecar/postgres.yaml", "sidecar/walship.yaml"), ("jobs/init.yaml", "sidecar/init.yaml")]
)
def test_the_patches_make_valid_pods(whole: str, patch: str) -> None:
    """As kustomize merges them: containers, volumes and mounts by name."""
    (part,) = _read(_FOLDER / patch)
    (base,) = [document for document in _read(_FOLDER / whole) if document["kind"] == part["kind"]]
    assert part["metadata"]["name"] == base["metadata"]["name"]
    merged = _merge(base, part)
    kubernetes_validate.validate(merged, _VERSION, strict=True)
    pod = merged["spec"]["template"]["spec"]
    names = [container["name"] for container in base["spec"]["template"]["spec"]["containers"]]
    assert [container["name"] for container in pod["containers"]][: len(names)] == names
    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in merged["spec"].get("volumeClaimTemplates", ())}
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


def _typed() -> list[str]:
    """The lines of docs/deploy.md about Kubernetes, in order; what goes on in the next line is one."""
    texts = [block.text for block in blocks_of("docs/deploy.md") if block.heading == "Kubernetes"]
    return "".join(texts).replace("\\\n", "").splitlines()


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_the_document_names_what_comes_before_the_first_apply(folder: Path) -> None:
    place, lines = folder.relative_to(_HOME).as_posix(), _typed()
    before = lines[: lines.index(f"kubectl apply -k {place}")]
    (made,) = _read(folder / "kustomization.yaml")
    for maker in (*made["configMapGenerator"], *made["secretGenerator"]):
        for name in maker["envs"]:
            copied = f"cp infra/deploy/kubernetes/{name}.example {place}/{name}"
            assert ((folder / name).exists() and name != "secret.env") or copied in before, name
    if not any(d["kind"] == "Namespace" for path in _resources(folder) for d in _read(path)):
        assert f"kubectl create namespace {made['namespace']}" in before
    (image,) = made["images"]
    assert f"docker push {image['newName']}:{image['newTag']}" in before
    assert "`newName`" in (_HOME / "docs" / "deploy.md").read_text("utf-8")


def test_the_document_says_what_the_server_beside_the_sidecar_needs() -> None:
    (line,) = [line for line in _typed() if "ALTER SYSTEM" in line]
    statements = [word for word in shlex.split(line) if word.startswith("ALTER SYSTEM")]
    comment = (_FOLDER / "sidecar" / "walship.yaml").read_text("utf-8")
    assert len(statements) == 3
    assert re.findall(r"ALTER SYSTEM [^;]*(?=;)", comment) == statements


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_kustomize_makes_of_it_what_is_applied(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(_FOLDER, tmp_path / _FOLDER.relative_to(_HOME))
    place = tmp_path / folder.relative_to(_HOME)
    for line in _typed():
        if line.startswith("cp "):
            subprocess.run(shlex.split(line), check=True, cwd=tmp_path)
    told = subprocess.run(["kubectl", "kustomize", str(place)], check=True, capture_output=True, text=True).stdout
    documents = {(document["kind"], document["metadata"]["name"]): document for document in yaml.safe_load_all(told)}
    settings, secrets = (next(n for k, n in documents if k == kind) for kind in ("ConfigMap", "Secret"))
    assert ("CronJob", "walship-drill") in documents
    for (kind, _), document in documents.items():
        assert kind in (*_OPERATOR, "Namespace") or document["metadata"]["namespace"] != "default"
        if kind not in _OPERATOR:
            kubernetes_validate.validate(document, _VERSION, strict=True)
        for container, _ in _containers(document):
            assert container["image"] != "walship"  # but of a registry, with a tag
            for source in container.get("envFrom", ()):
                assert next(iter(source.values()))["name"] in (settings, secrets)
    job = documents["Job", "walship-init"]["spec"]["template"]["spec"]["containers"][0]
    assert [variable["value"] for variable in job.get("env", ())] == (["postgres"] if folder != _FOLDER else [])


def test_what_is_named_is_there() -> None:
    named = {file for folder in _FOLDERS for file in _resources(folder)}
    for folder in _FOLDERS:
        (made,) = _read(folder / "kustomization.yaml")
        named |= {folder / patch["path"] for patch in made.get("patches", ())}
        generated = {maker["name"] for kind in ("configMapGenerator", "secretGenerator") for maker in made[kind]}
        for path in _resources(folder):
            for document in _read(path):
                for container, _ in _containers(document):
                    sources = container.get("envFrom", ())
                    assert {ref["name"] for source in sources for ref in source.values()} <= generated
    assert named == set(_manifests())


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_the_settings_are_right_and_somebody_backs_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings, secrets = _env(folder / "settings.env"), _env(_FOLDER / "secret.env.example")
    assert {*settings, *secrets} <= known_names()
    assert not any(secrets.values())
    monkeypatch.chdir(tmp_path)
    for known in known_names():
        monkeypatch.delenv(known, raising=False)
    for name, value in {**settings, **dict.fromkeys(secrets, "something")}.items():
        monkeypatch.setenv(name, value)
    loaded = load()
    # Not drills: they are a CronJob's, with the room for a cluster; the service's own /tmp has none.
    assert jobs_of(loaded).keys() == {"full", "expire", "verify"}
    assert [*contradictions(loaded, None), *doubts(loaded)] == []


def test_verbs_exist_with_their_options_and_pods_are_closed() -> None:
    found = 0
    for path, container, pod in _ours():
        found += 1
        parsed(container["args"])
        assert container["securityContext"]["readOnlyRootFilesystem"]
        for port in container.get("ports", ()):
            for folder in _FOLDERS:
                assert _env(folder / "settings.env")["WALSHIP_LISTEN"].endswith(f":{port['containerPort']}")
        if path.name != "walship.yaml":  # in a pod of somebody else's
            volumes = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert pod["securityContext"]["runAsNonRoot"]
    assert found == 4


def test_a_drill_writes_where_it_may() -> None:
    (drill,) = [container for _, container, _ in _ours() if container["args"][0] == "drill"]
    mounts = [mount["mountPath"] for mount in drill["volumeMounts"] if not mount.get("readOnly")]
    for option, folder in folders_of_a_drill(drill["args"], here="/var/lib/walship").items():
        assert below(folder, mounts), f"{option} {folder}"


def test_no_service_of_the_namespace_becomes_a_setting() -> None:
    """One that is named walship would be WALSHIP_PORT, which is refused; postgres POSTGRES_PORT=tcp://…"""
    for path, _, pod in _ours():
        assert pod["enableServiceLinks"] is False, path


def test_there_is_memory_for_a_scheduled_job_beside_the_service() -> None:
    for path, container, _ in _ours():
        if container["args"] == ["run"]:
            limit = container["resources"]["limits"]["memory"]
            assert int(limit[:-2]) * _SIZES[limit[-2:]] >= 1.5 * _MEMORY, path


def test_the_settings_of_another_day_can_be_applied() -> None:
    """The template of a job cannot be changed, and the names of settings in it are others each time."""
    (job,) = _read(_FOLDER / "jobs" / "init.yaml")
    assert job["spec"]["ttlSecondsAfterFinished"] <= 300
    for folder in _FOLDERS:
        (made,) = _read(folder / "kustomization.yaml")
        head = (folder / "kustomization.yaml").read_text("utf-8").partition("apiVersion")[0]
        line = f"kubectl -n {made['namespace']} delete job {job['metadata']['name']} --ignore-not-found"
        assert head.index(line) < head.index("kubectl apply -k .")


def test_the_server_is_pinned_as_in_compose() -> None:
    compose = yaml.safe_load((_HOME / "docker-compose.yml").read_text("utf-8"))
    images = {c["image"] for p in _manifests() for d in _read(p) for c, _ in _containers(d) if "image" in c}
    assert images == {"walship", compose["services"]["postgres"]["image"]}


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
    (monitor,) = _read(_FOLDER / "monitoring" / "podmonitor.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    rules = (_HOME / "infra" / "deploy" / "prometheus" / "walship.rules.yml").read_text("utf-8")
    assert f'job="{endpoint["relabelings"][0]["replacement"]}"' in rules.replace(" ", "")
    for path in (_FOLDER / "deployment.yaml", _FOLDER / "sidecar" / "walship.yaml"):
        (document,) = _read(path)
        template = document["spec"]["template"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        (port,) = [port for container in template["spec"]["containers"] for port in container.get("ports", ())]
        assert port["name"] == endpoint["port"]


def test_the_operators_rules_are_the_rules() -> None:
    """If this fails after a change of walship.rules.yml: the head of monitoring/rules.yaml says how it is made anew."""
    rules = (_HOME / "infra" / "deploy" / "prometheus" / "walship.rules.yml").read_text("utf-8")
    told = (_FOLDER / "monitoring" / "rules.yaml").read_text("utf-8")
    assert told.partition("\nspec:\n")[2] == re.sub(r"^(?=.)", "  ", rules, flags=re.MULTILINE)
    (document,) = _read(_FOLDER / "monitoring" / "rules.yaml")
    assert document["spec"] == yaml.safe_load(rules)


def test_the_secrets_are_in_no_commit() -> None:
    assert "secret.env" in shlex.split((_HOME / ".gitignore").read_text("utf-8"), comments=True)
