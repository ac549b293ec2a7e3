"""Command lines of manifests, units and documents, read by the parser that will read them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import click

from infra.cli.group import cli


def parsed(words: Sequence[str]) -> click.Context:
    """The context of the verb that the words behind ``walship`` call. Raises click.UsageError where they are wrong.

    Nothing of the verb is run.
    """
    command: click.Command = cli
    context: click.Context | None = None
    rest = [*words]
    while isinstance(command, click.Group):
        context = click.Context(command, parent=context, info_name=command.name)
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
    return command.make_context(command.name, rest, parent=context)


def folders_of_a_drill(words: Sequence[str], *, here: str) -> Mapping[str, PurePosixPath]:
    """Where a drill that is started in ``here`` writes: option → folder. The work folder has to be named: the system's
    is too small for a cluster.
    """
    context = parsed(words)
    assert context.command.name == "drill"
    work = context.params["work_dir"]
    assert work is not None, "no --work-dir"
    return {
        name: PurePosixPath(here) / str(folder)
        for name, folder in (("--work-dir", work), ("--report", context.params["report_dir"]))
    }


def below(place: PurePosixPath, folders: Sequence[str]) -> bool:
    """Whether it is one of the folders, or in one."""
    return any(place.is_relative_to(folder) for folder in folders)
