"""``.env``: lines of NAME=value, word for word, and refused where they may mean something else than they say."""

from __future__ import annotations

import io
import re
import stat
from collections.abc import Collection
from pathlib import Path

from pipeline.errors import ConfigError

#: Where python-dotenv sees a comment behind a value without quotes.
COMMENT = re.compile(r"\s#")


def read_dotfile(path: Path, secrets: Collection[str]) -> dict[str, str]:
    """What a ``.env`` file says: ``$`` has no meaning. No file says nothing.

    ``secrets``: names of settings whose value no comment may follow, unless the value stands in quotes: it would be cut
    off there, and a repository made with half a passphrase. Raises ConfigError, which never has a value in it.
    """
    from dotenv.parser import parse_stream

    written: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(_text(path))):
        original = binding.original.string
        before = original[: -len(original.lstrip()) or None]
        line = binding.original.line + before.count("\n")
        if binding.error or (binding.key is not None and binding.value is None):
            raise ConfigError(
                f"line {line} of {path} is not NAME=value",
                hint="a value with # or spaces stands in single quotes, and in those \\' is a quote",
            )
        if binding.key is None:
            continue
        given = original.partition("=")[2]
        if binding.key in secrets and not given.lstrip().startswith(("'", '"')) and COMMENT.search(given.rstrip()):
            raise ConfigError(
                f"line {line} of {path}: in {binding.key}, what follows the # would be taken for a comment",
                hint="put the value into single quotes, and a comment on a line of its own. What was made with such a"
                " line has only what stands before the #, without the space, for its secret",
            )
        written[binding.key] = binding.value or ""
    return written


def _text(path: Path) -> str:
    """Empty if there is no such file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path} is not a file", hint="it holds lines of NAME=value, or is not there at all")
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text", hint="save it as UTF-8") from None
