"""The group of all verbs: finds the one that is meant, calls it, and makes an exit code of how it ended."""

from __future__ import annotations

import gc
import importlib
import sys

import click

from infra.cli import VERBS
from infra.cli.exits import INTERRUPTED, report
from infra.names import refuse_strangers
from pipeline.errors import ConfigError, WalshipError, foreseen


class Verbs(click.Group):
    """Finds a verb's command in the module of its name, so that ``fetch-wal`` does not load what ``demo`` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  the signature is click's
        return [*VERBS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002  likewise
        if name not in VERBS:
            return None
        # What is imported stays until the end. A collector that goes through it time and again, and once more at exit,
        # takes a quarter of the time of a short command.
        gc.disable()
        if not sys.stderr.isatty():
            _load_structlog_without_rich()
        module = importlib.import_module(f"infra.cli.{name.replace('-', '_')}")
        gc.freeze()
        gc.enable()
        command: click.Command = module.command
        command.short_help = VERBS[name]  # whole sentences for completion, which would cut the first one off
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Click knows what may have been meant only of commands that are loaded."""
        name = args[0]
        if name not in VERBS and not name.startswith("-") and not ctx.resilient_parsing:
            import difflib

            close = difflib.get_close_matches(name, VERBS, n=1)
            more = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"No such command {name!r}.{more}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  likewise
        with formatter.section("Commands"):
            formatter.write_dl([*VERBS.items()])


def _load_structlog_without_rich() -> None:
    """It draws tracebacks with rich, on terminals, if that can be imported; which takes 40 ms of any command."""
    if "rich" not in sys.modules:
        sys.modules["rich"] = None  # type: ignore[assignment]  # the way to have an import of it fail
        importlib.import_module("structlog")
        del sys.modules["rich"]


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings are environment variables or .env; each is explained in .env.example (of a wheel:"
    " share/walship/env.example). Exit codes: 0 done, 1 done but the result could not be printed, 2 settings or usage,"
    " 10 PostgreSQL or spool, 11 store, 12 integrity, 13 the target cannot be reached, 130 and 143 stopped by Ctrl-C or"
    " SIGTERM (for run, SIGTERM is 0).",
)
@click.version_option(package_name="walship", prog_name="walship")
def cli() -> None:
    """Continuous offsite backup for PostgreSQL: ship WAL and base backups, restore to any moment."""


def call() -> int:
    """Run the verb that ``sys.argv`` names, and tell why it failed if it did. Returns the exit code."""
    as_json = "--json" in sys.argv
    try:
        refuse_strangers()
        # What a verb gave to Context.exit comes back as a value here.
        code = int(cli.main(prog_name="walship", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # its message is the help
        code = error.exit_code
    except click.ClickException as error:
        code = _usage(error, as_json=as_json)
    except click.Abort:
        print("walship: stopped", file=sys.stderr)
        code = INTERRUPTED
    except (WalshipError, BaseExceptionGroup) as error:
        ours = foreseen(error)
        if ours is None:
            raise
        code = report(ours, as_json=as_json)
    except KeyboardInterrupt:
        print("walship: interrupted", file=sys.stderr)
        code = INTERRUPTED
    return code


def _usage(error: click.ClickException, *, as_json: bool) -> int:
    """A mistyped command line is a wrong setting: exit code 2, and JSON if that was asked for."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context else "walship"
    return report(ConfigError(error.format_message(), hint=f"`{path} --help` shows what there is"), as_json=as_json)
