"""What ``synchronous_standby_names`` makes commits wait for. Pure: the setting as text in, sentences out.

Sources: PostgreSQL documentation, "synchronous_standby_names" and "Synchronous Replication"; the grammar and the
scanner of the server (syncrep) for what the documentation leaves out: FIRST and ANY in any case are words of the
grammar unless quoted, a number may be a name, ``"*"`` in quotes still means everybody, and names are compared without
regard to case.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

#: A name of this kind means every connection.
EVERYBODY = "*"

_TOKEN = re.compile(
    r"""(?P<space>[ \t\n\r\f\v]+)
    |"(?P<quoted>(?:[^"]|"")*)"
    |(?P<word>[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]*)
    |(?P<number>[0-9]+)
    |(?P<star>\*)
    |(?P<mark>[,()])""",
    re.VERBOSE,
)

_Kind = Literal["name", "number", "any", "first", "mark"]
_Token = tuple[_Kind, str]


class NotUnderstoodError(ValueError):
    """The text is nothing that a server takes as ``synchronous_standby_names``."""


@dataclass(frozen=True, slots=True)
class SyncNames:
    """The setting, understood."""

    #: ``first``: the named that come first and are connected must confirm. ``any``: whichever of them are quickest.
    method: Literal["first", "any"]
    #: How many must confirm.
    count: int
    #: As written; the earlier one has priority.
    names: tuple[str, ...]

    def matches(self, application_name: str) -> bool:
        """Whether a connection of that name is one of the named."""
        return any(name == EVERYBODY or _same(name, application_name) for name in self.names)

    @property
    def everybody(self) -> bool:
        return EVERYBODY in self.names

    def others(self, application_name: str) -> tuple[str, ...]:
        """The other names, each once, in their order."""
        found: dict[str, str] = {}
        for name in self.names:
            if name != EVERYBODY and not _same(name, application_name):
                found.setdefault(_folded(name), name)
        return tuple(found.values())


@dataclass(frozen=True, slots=True)
class Meaning:
    """What commits wait for, by the names alone (who is connected is another matter)."""

    #: ``none``: commits wait for nobody. ``ours``: never without our confirmation. ``shared``: others can stand in for
    #: us. ``others``: they wait, and not for us. ``never``: more confirmations are asked for than can come.
    #: ``unknown``: the setting was not understood.
    wait: Literal["none", "ours", "shared", "others", "never", "unknown"]
    #: One sentence.
    fact: str
    hint: str = ""


def parse(text: str) -> SyncNames | None:
    """The setting as the server reads it; None if it is empty: commits then wait for nobody.

    Raises NotUnderstoodError, for example for a hyphen outside of quotes.
    """
    if not text:
        return None
    tokens = list(_tokens(text))
    method: Literal["first", "any"] = "first"
    kinds = [kind for kind, _ in tokens]
    if kinds[:1] in (["any"], ["first"]):
        method = "any" if kinds[0] == "any" else "first"
        tokens = tokens[1:]
        if [kind for kind, _ in tokens[:1]] != ["number"] or tokens[1:2] != [("mark", "(")]:
            raise NotUnderstoodError(f"{method.upper()} wants a number and a list in parentheses")
    count = 1
    if tokens[1:2] == [("mark", "(")] and tokens[0][0] == "number":
        count, tokens = int(tokens[0][1]), tokens[2:]
        if tokens[-1:] != [("mark", ")")]:
            raise NotUnderstoodError("the list has no closing parenthesis")
        tokens = tokens[:-1]
    if count < 1:
        raise NotUnderstoodError("the number of standbys must be greater than zero")
    return SyncNames(method, count, tuple(_list(tokens)))


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise NotUnderstoodError(f"{text[at]!r} cannot stand outside of double quotes")
        at = match.end()
        if match["quoted"] is not None:
            yield "name", match["quoted"].replace('""', '"')
        elif word := match["word"]:
            # Words of the grammar; a standby called "any" has to be quoted.
            folded = _folded(word)
            yield ("any", word) if folded == "any" else ("first", word) if folded == "first" else ("name", word)
        elif match["number"]:
            yield "number", match["number"]
        elif match["star"]:
            yield "name", EVERYBODY
        elif match["mark"]:
            yield "mark", match["mark"]


def _list(tokens: list[_Token]) -> Iterator[str]:
    """``a, 2, "b"`` → names; a number is one."""
    if not tokens:
        raise NotUnderstoodError("the list is empty")
    for position, (kind, word) in enumerate(tokens):
        if position % 2:
            if (kind, word) != ("mark", ","):
                raise NotUnderstoodError(f"a comma is missing before {word!r}")
        elif kind in ("name", "number"):
            yield word
        else:
            raise NotUnderstoodError(f"a name is missing at {word!r}")
    if len(tokens) % 2 == 0:
        raise NotUnderstoodError("a name is missing at the end")


def meaning(text: str, name: str) -> Meaning:
    """What the setting means for commits, and for the stream that connects as ``name`` (WALSHIP_SLOT)."""
    try:
        names = parse(text)
    except NotUnderstoodError as error:
        return Meaning("unknown", f"synchronous_standby_names = {text!r} is not understood: {error}", _only(name))
    if names is None:
        return Meaning("none", "commits wait for nobody: synchronous_standby_names is empty")
    said = f"synchronous_standby_names = {text!r}"
    if not names.matches(name):
        whom = _waits(names)
        return Meaning("others", f"commits wait for {whom}, not for {name}: {said}", _only(name))
    others = names.others(name)
    if names.everybody:
        return Meaning(
            "shared",
            f"commits wait for {_waits(names)}: {said}, where * matches every connection that streams WAL, and any of"
            f" them releases commits that {name} has not stored",
            _only(name),
        )
    if names.count > len(others) + 1:
        return Meaning(
            "never",
            f"commits wait for {names.count} standbys, and {said} names {len(others) + 1}: they wait for ever",
            _only(name),
        )
    if names.count <= len(others):
        when = "while it is not connected" if _leads(names, name) else "whenever the others are quicker or come first"
        return Meaning(
            "shared",
            f"commits wait for {_waits(names)}: {said} lets {_joined(others)} release them without {name}, {when}",
            f"ask for all of them: {quoted_all(len(others) + 1, (name, *others))}; or {_only(name)}",
        )
    also = f", and for {_joined(others)}" if others else ""
    return Meaning("ours", f"commits wait until {name} has stored them{also}: {said}")


def quoted(name: str) -> str:
    """The name as it has to be written in the setting: a hyphen wants quotes."""
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]*", name) and _folded(name) not in ("any", "first")
    return name if plain else '"' + name.replace('"', '""') + '"'


def quoted_all(count: int, names: Collection[str]) -> str:
    """The setting by which all of these must confirm."""
    return f"FIRST {count} ({', '.join(quoted(name) for name in names)})"


def order(name: str) -> str:
    """What makes commits wait for that name alone. ``psql -c`` would take both statements for one transaction."""
    return f"in psql: ALTER SYSTEM SET synchronous_standby_names = '{quoted(name)}'; SELECT pg_reload_conf();"


def _only(name: str) -> str:
    return f"for commits that wait for {name} alone: {order(name)}"


def _leads(names: SyncNames, name: str) -> bool:
    """Whether it is among those whose confirmation counts as long as all are connected."""
    if names.method == "any":
        return False
    distinct = list(dict.fromkeys(_folded(n) for n in names.names))
    return _folded(name) in distinct[: names.count]


def _waits(names: SyncNames) -> str:
    """``the first 2 connected of a, b and c``."""
    listed = tuple(dict.fromkeys("any connection" if n == EVERYBODY else n for n in names.names))
    if len(listed) == 1 and names.count == 1:
        return listed[0]
    which = f"any {names.count}" if names.method == "any" else f"the first {names.count} connected"
    return f"{which} of {_joined(listed)}"


def _joined(words: Collection[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _same(one: str, other: str) -> bool:
    return _folded(one) == _folded(other)


def _folded(name: str) -> str:
    """As the server compares: A to Z only, so that the result does not depend on anybody's locale."""
    return re.sub("[A-Z]+", lambda match: match[0].lower(), name)
