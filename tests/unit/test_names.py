"""The check that our generic import names are ours alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.names import PACKAGES, refuse_strangers
from pipeline.errors import ConfigError


def _install(folder: Path, name: str, package: str, *, record: str = "RECORD") -> None:
    """What an installer leaves behind for a distribution that holds one package."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text("")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    content = f"{package}/__init__.py,,\n{info.name}/METADATA,,\n" if record == "RECORD" else f"{package}\n"
    (info / record).write_text(content)


def test_this_installation_is_accepted() -> None:
    refuse_strangers()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("record", ["RECORD", "top_level.txt"])
def test_a_stranger_with_one_of_our_names_is_refused(tmp_path: Path, package: str, record: str) -> None:
    _install(tmp_path, "airflow-bits", package, record=record)
    with pytest.raises(ConfigError) as caught:
        refuse_strangers([*sys.path, str(tmp_path)])
    assert caught.value.fact == f"the distribution airflow-bits 1.0 owns the package {package}, which walship brings"
    assert "virtual environment" in caught.value.hint


def test_names_that_only_begin_like_ours_are_nobodys_business(tmp_path: Path) -> None:
    _install(tmp_path, "sklearn-bits", "pipelines")
    refuse_strangers([*sys.path, str(tmp_path)])


def test_walship_itself_is_no_stranger(tmp_path: Path) -> None:
    _install(tmp_path, "Walship", "pipeline")
    refuse_strangers([*sys.path, str(tmp_path)])


def test_a_package_in_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "handlers").mkdir()
    (tmp_path / "handlers" / "__init__.py").write_text("")
    with pytest.raises(ConfigError, match="the package handlers is found in"):
        refuse_strangers([str(tmp_path), *sys.path])


def test_without_our_own_errors_it_still_says_so_and_exits_with_2(tmp_path: Path) -> None:
    """A stranger's ``pipeline`` in front hides our error classes; the message and the exit code stay."""
    _install(tmp_path, "stranger", "pipeline")
    home = Path(__file__).resolve().parents[2]
    program = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('names', {str(home / 'infra' / 'names.py')!r})\n"
        "names = importlib.util.module_from_spec(spec); spec.loader.exec_module(names)\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "names.refuse_strangers()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "the distribution stranger 1.0 owns the package pipeline" in done.stderr
    assert "hint: install walship in a virtual environment of its own" in done.stderr


def test_the_command_says_so_where_a_strangers_package_hides_our_modules(tmp_path: Path) -> None:
    """Its own imports fail before anything else can be told."""
    _install(tmp_path, "stranger", "pipeline")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])}
    done = subprocess.run(
        [sys.executable, "-m", "infra.cli", "list"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=environment,
    )  # fmt: skip
    assert "the distribution stranger 1.0 owns the package pipeline" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("metadata", [b"", b"\xfc\x00"])
def test_a_stranger_that_does_not_say_its_name_is_told_by_its_folder(tmp_path: Path, metadata: bytes) -> None:
    _install(tmp_path, "airflow-bits", "pipeline")
    (tmp_path / "airflow-bits-1.0.dist-info" / "METADATA").write_bytes(metadata)
    with pytest.raises(ConfigError, match=r"airflow-bits-1\.0\.dist-info, which does not say its name, owns"):
        refuse_strangers([*sys.path, str(tmp_path)])


def test_a_list_of_files_that_are_not_there_is_nobodys_business(tmp_path: Path) -> None:
    _install(tmp_path, "airflow-bits", "pipeline")
    (tmp_path / "pipeline" / "__init__.py").unlink()
    (tmp_path / "pipeline").rmdir()
    refuse_strangers([*sys.path, str(tmp_path)])
