"""The status page of a live service: what it says against what is stored, its commands against what they restore."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra.postgres.throwaway import free_port, make_folder
from pipeline.wal import Lsn
from tests import alerting, browser
from tests.browser import Page
from tests.rig import Rig, stop_started
from tests.servers import NEWEST

#: Bytes of a segment.
SIZE = 1 << 20
#: Where screenshots for the documents go, if somebody wants them: SCREENSHOTS=docs/images make test ARGS=...
SCREENSHOTS = os.environ.get("SCREENSHOTS", "")


class Live(Rig):
    """An installation whose service listens, and looks often."""

    def __init__(self, folder: Path) -> None:
        self.listen = f"127.0.0.1:{free_port()}"
        names = [f"file://{folder}/near", f"file://{folder}/far"]
        settings = {"WALSHIP_LISTEN": self.listen, "WALSHIP_SURVEY_INTERVAL": "1"}
        super().__init__(folder, NEWEST, names, sources="stream", settings=settings)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.listen}{path}", timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def api(self) -> Any:
        return json.loads(self.get("/api/status")[1])

    def told(self, true: Callable[[Any], bool], what: str) -> Any:
        """Wait until the API says so; what it said."""
        self.wait(lambda: true(self.api()), f"{what}: {self.api()['sentence']}", 90)
        return self.api()

    def segments(self) -> list[str]:
        """Names of the finished segments that are stored, in order."""
        return sorted(path.name for path in (self.folder / "near").glob("*/wal/*/*") if len(path.name) == 24)

    def lose(self, segment: str) -> None:
        for path in self.folder.glob(f"*/*/wal/*/{segment}"):
            path.unlink()


@pytest.fixture
def live() -> Iterator[Live]:
    """A service that ships, a base backup, and rows that know when they were written."""
    folder = make_folder("walship-p-")
    try:
        with Live(folder) as made:
            made.server.start()
            made.run("init")
            made.serve()
            made.sql("create table t (at timestamptz)")  # first: any moment that can be restored has it
            made.json("backup")
            yield made
    finally:
        shutil.rmtree(folder)


def write(live: Live) -> tuple[datetime, datetime]:
    """One row; between these moments its transaction was committed."""
    ((begun,),) = live.sql("insert into t values (now()) returning at")
    ((done,),) = live.sql("select clock_timestamp()")
    return begun, done


def test_the_api_tells_what_is_stored_and_what_is_wrong(live: Live) -> None:
    write(live)
    live.sql("select pg_switch_wal()")
    write(live)
    live.caught_up()
    assert live.get("/healthz") == (200, "ok\n")
    told = live.told(
        lambda told: told["state"] == "safe" and all(place["tail_bytes"] for place in told["destinations"]),
        "all is well, and the last row is in a tail",
    )
    assert told["sentence"].startswith("Safe on this host only: both destinations have all WAL")
    assert live.get("/readyz") == (200, "ok\n")
    assert [place["name"] for place in told["destinations"]] == list(live.destinations)
    for place in told["destinations"]:
        assert (place["missing"], place["holes"], place["error"]) == ("", 0, "")
        assert place["lag_seconds"] < 5
        assert place["tail_bytes"] == Lsn.parse(place["durable_lsn"]) % SIZE
    # The terminal says the same of the same.
    words = live.run("status").stdout
    assert words.startswith("Safe on this host only: both destinations have all WAL")
    listed = live.json("status")
    assert [place["last_segment"] for place in listed["destinations"]] == [live.segments()[-1]] * 2
    (backup,), (stretch,) = told["recoverable"]["backups"], told["recoverable"]["stretches"]
    assert (live.folder / "near" / told["system_id"] / "base" / backup["name"]).is_dir()
    assert backup["destinations"] == list(live.destinations)
    assert (stretch["begins"], stretch["ended_by"], stretch["timeline"]) == (backup["stopped"], "open", 1)
    assert told["lag_history"]["destinations"] == list(live.destinations)
    assert told["last_drill"] is told["last_verify"] is None
    assert "correct horse" not in json.dumps(told)

    # A hole behind the newest backup; then one of the destinations is away as well.
    lost = live.segments()[-1]
    live.lose(lost)
    told = live.told(lambda told: told["state"] == "unsafe", "a segment is missing everywhere")
    assert f"{lost} is missing" in told["sentence"]
    told = live.told(lambda told: told["recoverable"]["stretches"][0]["ended_by"] == "hole", "the time line has a hole")
    (stretch,) = told["recoverable"]["stretches"]
    assert (stretch["missing"], told["recoverable"]["holes"][0]["first"]) == (lost, lost)
    assert live.get("/readyz")[0] == 200, "it ships nevertheless"
    live.json("backup")
    live.told(lambda told: told["state"] == "safe" and len(told["recoverable"]["stretches"]) == 2, "a backup mends it")
    (live.folder / "far").rename(live.folder / "away")
    told = live.told(lambda told: told["state"] == "at_risk", "one destination is away")
    assert told["sentence"].endswith(f"{live.destinations[0]} has everything.")
    status, why = live.get("/readyz")
    assert status == 503
    assert live.destinations[1] in why
    (live.folder / "away").rename(live.folder / "far")
    live.told(lambda told: told["state"] == "safe", "it is back")
    live.server.stop("immediate")
    told = live.told(lambda told: told["state"] == "unsafe", "the server is gone")
    assert "server: " in told["sentence"]
    assert live.get("/healthz")[0] == 200
    # Nobody knows what it would have written: nothing of that is green, however well the destinations are.
    live.wait(lambda: lags(live) > 2, "the lag grows")
    assert metric(live, "walship_stream_connected") == [0]


def metric(live: Live, name: str) -> list[float]:
    return [sample.value for sample in alerting.scrape(live.listen) if sample.name == name]


def lags(live: Live) -> float:
    """Of the destination that is least behind."""
    return min(metric(live, "walship_wal_lag_seconds"))


async def chosen_by_click(page: Page) -> str:
    """Click into what can be restored; the command that is shown."""
    await page.until("document.querySelector('#line .covered') !== null")
    x, y, width = await page.read(
        "(() => { document.getElementById('line').scrollIntoView({ block: 'center' });"
        " const box = document.querySelector('#line .covered').getBoundingClientRect();"
        " return [box.x, box.y + box.height / 2, box.width]; })()"
    )
    await page.click(x + 0.6 * width, y)
    command = await page.until("document.getElementById('command-line').textContent")
    assert isinstance(command, str)
    return command


async def picture(live: Live, page: Page) -> bytes:
    """The page as PNG, without the name of a folder that is nobody's business."""
    if not SCREENSHOTS:
        return b""
    # In what is fetched: the page draws itself anew at any moment.
    await page.read(
        "(() => { const real = window.real ||= fetch; window.fetch = async (...words) => {"
        " const said = await (await real(...words)).text();"
        f" return new Response(said.replaceAll({str(live.folder)!r}, '/backups')); }}; }})()"
    )
    await page.until(f"!document.body.innerText.includes({str(live.folder)!r})")
    return await page.screenshot()


async def test_a_click_gives_the_command_that_restores_that_moment(live: Live, tmp_path: Path) -> None:
    if (program := browser.find()) is None:
        pytest.skip(browser.MISSING)
    written = []
    for number in range(6):
        written.append(write(live))
        if number in (1, 3):
            live.sql("select pg_switch_wal()")
        time.sleep(0.25)  # noqa: ASYNC251 - nothing else runs here: moments that are apart
    live.caught_up()
    live.told(lambda told: told["state"] == "safe", "all is well")
    async with browser.browsing(program, tmp_path) as page:
        await page.open(f"http://{live.listen}/", width=390, dark=True)
        await page.until("document.querySelector('h1')?.textContent.startsWith('Safe')")
        assert await page.read("document.title") == "✓ walship"
        command = await chosen_by_click(page)
        assert await page.read("document.documentElement.scrollWidth <= innerWidth"), "it is as wide as a phone"
        shots = {"phone-dark.png": await picture(live, page)}
        words = shlex.split(command)
        assert words[:3] == ["walship", "restore", "--target-dir"]
        moment = datetime.fromisoformat(words[words.index("--to-time") + 1])
        written.append(write(live))
        live.caught_up()
        target, port = live.target(), free_port()
        words[words.index("--target-dir") + 1] = str(target)
        live.run(*words[1:], "--start", "--port", str(port))
        with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
            ((rows,),) = connection.execute("select count(*) from t").fetchall()
        stop_started(target)
        before, after = sum(done <= moment for _, done in written), sum(begun > moment for begun, _ in written)
        assert after > 0, "a restore of everything would have more"
        assert before <= rows <= len(written) - after, (moment, written)
        # By keys alone: to the time line, to its beginning, and the command changes.
        await page.read("document.getElementById('line').focus()")
        for key in ("End", "ArrowLeft", "Home", "Enter"):
            await page.press(key)
        first = live.api()["recoverable"]["first"][:19].replace("T", " ")
        assert first[:17] in await page.read("document.getElementById('line').getAttribute('aria-valuetext')")
        assert await page.read("document.getElementById('command-line').textContent") != command
        # Without a reload: what happens to the service is seen.
        live.lose(live.segments()[-1])
        await page.until("document.getElementById('verdict').className === 'unsafe'")
        assert "is missing" in await page.read("document.getElementById('reasons').textContent")
        assert "walship backup" in await page.read("document.getElementById('hints').innerText")
        shots["hole.png"] = await picture(live, page)
        live.stop(live._services[0])
        await page.until("document.getElementById('sentence').textContent.includes('does not answer')")
        assert await page.read("document.title") == "? walship"
        own = f"http://{live.listen}/"
        assert {address for address in page.requests if not address.startswith(own)} <= {"data:,"}
        assert [said for said in page.complaints if "ERR_CONNECTION_REFUSED" not in said] == []
    if SCREENSHOTS:
        for name, png in shots.items():
            (Path(SCREENSHOTS) / f"status-{name}").write_bytes(png)


def test_every_query_of_the_board_returns_data(live: Live, tmp_path: Path) -> None:
    """By name and labels, as the service shows them; and run, where Debian's Prometheus can be had."""
    board = json.loads((alerting.DEPLOY.parent / "grafana" / "walship.json").read_text("utf-8"))
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    queries = [target["expr"].replace("$job", "walship") for panel in panels for target in panel["targets"]]
    assert len(queries) > 20
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels:  # the last known value of hours would stay green when the service is long dead
        if panel["type"] == "stat":
            assert panel["options"]["reduceOptions"]["calcs"] == ["last"], panel["title"]
            assert all(target["instant"] and not target["range"] for target in panel["targets"]), panel["title"]
    write(live)
    live.caught_up()
    live.told(lambda told: told["state"] == "safe", "all is well")
    assert alerting.unknown_series(queries, alerting.scrape(live.listen)) == []
    with collecting(live, tmp_path) as query:
        live.wait(lambda: bool(query("rate(walship_upload_bytes_total[5m])")), "Prometheus has looked twice")
        assert [expression for expression in queries if not query(expression)] == []


@contextmanager
def collecting(live: Live, folder: Path) -> Iterator[Callable[[str], list[Any]]]:
    """A Prometheus that looks at the service every second; what it answers to a query."""
    program, address = alerting.programs() / "prometheus", f"127.0.0.1:{free_port()}"
    job = {"job_name": "walship", "static_configs": [{"targets": [live.listen]}]}
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(json.dumps(config), "utf-8")  # JSON is YAML
    words = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/series"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, *words, f"--web.listen-address={address}"], stdout=log, stderr=log)

    def query(expression: str) -> list[Any]:
        url = f"http://{address}/api/v1/query?query={urllib.parse.quote(expression)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                found: list[Any] = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise AssertionError(f"{expression}: {error.read().decode()}") from None
            return []
        except urllib.error.URLError:
            return []  # it is starting
        return found

    try:
        yield query
    finally:
        process.kill()
        process.wait()
