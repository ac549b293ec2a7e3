"""A real Prometheus and Alertmanager (Debian's packages), and the alert rules of the project as data."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from infra.postgres.throwaway import free_port
from tests.servers import _lock, cache_folder

_HOME = Path(__file__).parents[1]
DEPLOY = _HOME / "infra" / "deploy" / "prometheus"
RULES = DEPLOY / "walship.rules.yml"
RUNBOOK = _HOME / "docs" / "runbook.md"

_PACKAGES = ("prometheus", "prometheus-alertmanager")
_SERIES = re.compile(r"\b((?:walship_\w+|up))\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
#: Where Debian keeps the Alertmanager's templates.
_TEMPLATES = Path("/usr/share/prometheus/alertmanager")
#: Labels that Prometheus adds by itself.
_ADDED = {"job", "instance"}


@functools.cache
def programs() -> Path:
    """Folder of prometheus, promtool, prometheus-alertmanager, amtool; skips the test where they cannot be had."""
    if all(shutil.which(name) for name in ("prometheus", "promtool", "prometheus-alertmanager")):
        return Path(str(shutil.which("prometheus"))).parent
    home = cache_folder() / "prometheus"
    with _lock(home.name):
        if not home.exists():
            if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
                pytest.skip("there is no prometheus, and no apt-get to fetch Debian's package with")
            scratch = home.with_suffix(".new")
            shutil.rmtree(scratch, ignore_errors=True)
            fetched = subprocess.run(
                ["sh", _HOME / ".ci" / "debian", scratch, *_PACKAGES],
                capture_output=True, text=True, timeout=280, check=False,
            )  # fmt: skip
            if fetched.returncode:
                shutil.rmtree(scratch, ignore_errors=True)
                pytest.skip(f"Debian's prometheus cannot be fetched: {fetched.stderr[-300:]}")
            _move_templates(scratch)
            scratch.rename(home)  # whole, or not there
    return home / "usr" / "bin"


def _move_templates(home: Path) -> None:
    """Debian's Alertmanager wants its templates below /usr/share, where only an installation could put them.

    In its program, that folder becomes one of the same length that is relative to where it runs: ``Watch`` puts the
    templates there.
    """
    folder = str(_TEMPLATES).encode()
    program = home / "usr" / "bin" / "prometheus-alertmanager"
    program.write_bytes(program.read_bytes().replace(folder, b"." + b"/" * (len(folder) - 1)))


def rules() -> list[dict[str, Any]]:
    """Each rule as the file has it: alert, expr, for, labels, annotations."""
    (group,) = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


@dataclass(frozen=True)
class Sample:
    """One line of /metrics."""

    name: str
    labels: Mapping[str, str]
    value: float


def scrape(listen: str) -> list[Sample]:
    with urllib.request.urlopen(f"http://{listen}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return [
        Sample(sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def unknown_series(expressions: Iterable[str], live: Iterable[Sample]) -> list[str]:
    """Selectors (``name{label="value"}``) that select nothing of what a running service shows, by name and labels.

    Values of ``destination`` and ``version`` are anybody's; those of other labels have to be there.
    """
    shown = list(live)
    wrong = []
    for expression in expressions:
        for match in _SERIES.finditer(expression):
            name, matchers = match[1], _MATCHER.findall(match[2] or "")
            if name != "up" and not any(sample.name == name and _fits(sample, matchers) for sample in shown):
                wrong.append(match[0])
    return wrong


def _fits(sample: Sample, matchers: Iterable[tuple[str, str, str]]) -> bool:
    for label, operator, value in matchers:
        if label in _ADDED:
            continue
        if label not in sample.labels:
            return False
        if label in ("destination", "version"):
            continue
        equal = bool(re.fullmatch(value, sample.labels[label])) if "~" in operator else sample.labels[label] == value
        if equal == operator.startswith("!"):
            return False
    return True


class Watch:
    """Prometheus and Alertmanager on free ports, looking every second, with the rules that are given."""

    def __init__(self, folder: Path, target: str, changed_rules: str) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._prometheus, self._alertmanager = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        folder.mkdir()
        (folder / RULES.name).write_text(changed_rules, "utf-8")
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [self._alertmanager]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")

    def __enter__(self) -> Self:
        programs_folder = programs()
        unpacked = programs_folder.parents[1] / _TEMPLATES.relative_to("/")
        for template in unpacked.glob("*.tmpl"):
            shutil.copy2(template, self._folder)
        self._start(
            programs_folder / "prometheus-alertmanager", f"--config.file={DEPLOY / 'alertmanager.yml'}",
            f"--storage.path={self._folder / 'alerts'}", f"--web.listen-address={self._alertmanager}",
            "--cluster.listen-address=",
        )  # fmt: skip
        self._start(
            programs_folder / "prometheus", f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'series'}", f"--web.listen-address={self._prometheus}",
            "--rules.alert.resend-delay=1s",
        )  # fmt: skip
        addresses = (self._alertmanager, self._prometheus)
        try:
            _until(lambda: all(_answers(f"http://{each}/-/ready") for each in addresses), "both answer", 30, self.log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, *command: object) -> None:
        with (self._folder / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder
                )
            )

    def log(self) -> str:
        return (self._folder / "log").read_text("utf-8", "replace")[-3000:]

    def firing(self) -> set[tuple[str, str]]:
        """Name and destination (or kind) of each alert that the Alertmanager holds as active now."""
        with urllib.request.urlopen(f"http://{self._alertmanager}/api/v2/alerts", timeout=10) as answer:
            alerts = json.load(answer)
        return {(each["labels"]["alertname"], each["labels"].get("destination", "")) for each in alerts}

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """What Prometheus answers now."""
        quoted = urllib.parse.quote(expression)
        with urllib.request.urlopen(f"http://{self._prometheus}/api/v1/query?query={quoted}", timeout=10) as answer:
            found = json.load(answer)["data"]["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def fires(self, *alerts: tuple[str, str], timeout: float = 60.0) -> None:
        """Wait until all of them are firing at the Alertmanager."""
        _until(
            lambda: set(alerts) <= self.firing(), f"{alerts} fire", timeout, lambda: f"{self.firing()}\n{self.log()}"
        )

    def resolves(self, *alerts: tuple[str, str], timeout: float = 60.0) -> None:
        """Wait until none of them is."""
        gone = set(alerts)
        _until(lambda: not gone & self.firing(), f"{alerts} resolve", timeout, lambda: f"{self.firing()}\n{self.log()}")

    def quiet(self, usual: Collection[str], *, timeout: float = 60.0) -> None:
        """Wait until no alerts but those of these names are firing."""
        _until(
            lambda: {name for name, _ in self.firing()} <= set(usual),
            f"nothing fires but {sorted(usual)}", timeout, lambda: f"{self.firing()}\n{self.log()}",
        )  # fmt: skip


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _until(condition: Callable[[], bool], what: str, timeout: float, more: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout:.0f} s\n{more()}")
        time.sleep(0.1)
