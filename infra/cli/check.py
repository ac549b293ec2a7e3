"""``walship check``."""

from __future__ import annotations

import click

from infra.checkup import examine
from infra.cli.exits import exit_code
from infra.cli.verb import asynchronous, emit, json_option, say, settings
from pipeline.errors import WalshipError

_MARKS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


@click.command("check")
@json_option
@click.pass_context
@asynchronous
async def command(context: click.Context, as_json: bool) -> None:
    """Try every setting, permission and round trip; say what is wrong, and what to do about it.

    The exit code is that of the first error; warnings exit with 0.

    \b
    Examples:
      walship check
      walship check --json
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    findings, first = [], None
    async for finding in examine(settings(), waits=(lambda _: None) if as_json else say):
        findings.append(
            {"subject": finding.subject, "severity": finding.severity, "fact": finding.fact, "hint": finding.hint}
        )
        first = first or finding.error
        if not as_json:
            click.echo(f"{_MARKS[finding.severity]}  {finding.subject}: {finding.fact}")
            if finding.hint:
                click.echo(f"         hint: {finding.hint}")
    if as_json:
        emit({"healthy": first is None, "findings": findings}, [], as_json=True)
    code = _code(first)
    if code:
        context.exit(code)


def _code(error: WalshipError | None) -> int:
    return exit_code(error) if error else 0
