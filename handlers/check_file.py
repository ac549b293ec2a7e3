"""A person's own checks of a restored cluster: plain SQL, and comment lines in front of a statement that say the rest.

    -- database: shop
    -- name: orders are there
    -- expect: > 0
    SELECT count(*) FROM orders;

Four words, each on a comment line of its own in front of the statement that it is for:

- ``name``: how the report calls it; without one, by its line;
- ``expect``: what the statement's one value has to be (``42``, ``> 0``, ``true``, ``null``, ``'text'``); without one it
  has to run without an error;
- ``timeout``: seconds that it may take, 300 if not said;
- ``database``: where it runs, and all that follow, up to the next such line; ``postgres`` at first.

A misspelled word would make a check that checks nothing, so whatever looks like one of these lines and is none is an
error, with file and line.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import NoReturn

from pipeline.errors import ConfigError

#: Seconds for a statement that names no other limit.
TIMEOUT = 300.0
_WORDS = ("name", "database", "expect", "timeout")
_OPERATORS: Mapping[str, Callable[[Decimal, Decimal], bool]] = {
    "=": operator.eq,
    "<>": operator.ne,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_EXPECT = re.compile(r"(<>|!=|>=|<=|=|>|<)?\s*(.*)")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_DIRECTIVE = re.compile(r"--+\s*([A-Za-z][A-Za-z_-]*)\s*:(?!//)\s*(.*)")
#: What matters for finding the semicolon that ends a statement (PostgreSQL's manual, "Lexical Structure"). A word is
#: taken whole, for a dollar sign in it begins no string; and what is quoted must end.
_TOKEN = re.compile(
    r"""
      (?P<blank>\s+)
    | (?P<line>--[^\n]*)
    | (?P<block>/\*)
    | (?P<quoted>[eE]'(?:[^'\\]|''|\\.)*' | '(?:[^']|'')*' | "(?:[^"]|"")*")
    | (?P<dollar>\$(?:[^\W\d]\w*)?\$)
    | (?P<word>[^\W\d][\w$]*)
    | (?P<end>;)
    | (?P<open>['"])
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_BLOCK_EDGE = re.compile(r"/\*|\*/")


class Kind(Enum):
    """How a value is compared."""

    NUMBER = "number"
    BOOLEAN = "boolean"
    TEXT = "text"
    NULL = "null"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a statement gave, as PostgreSQL prints it."""

    rows: int = 0
    columns: int = 0
    #: Of the first row's first column; None is NULL.
    value: str | None = None
    #: Whether that column is of type boolean (``t`` and ``f`` then).
    boolean: bool = False
    #: Bytes of a value that is too long to be looked at; then ``value`` is None.
    long: int = 0

    def __str__(self) -> str:
        if not self.columns:
            return "no result"
        if (self.rows, self.columns) != (1, 1):
            return f"{self.rows} {'row' if self.rows == 1 else 'rows'} of {self.columns}"
        if self.long:
            return f"a value of {self.long} bytes"
        if self.value is None:
            return "null"
        return {"t": "true", "f": "false"}[self.value] if self.boolean else self.value


@dataclass(frozen=True, slots=True)
class Expectation:
    """What one value has to be."""

    operator: str
    kind: Kind
    #: Without quotes; ``true`` or ``false``; empty for null.
    value: str

    def __str__(self) -> str:
        value = {Kind.NULL: "null", Kind.TEXT: repr(self.value)}.get(self.kind, self.value)
        return value if self.operator == "=" else f"{self.operator} {value}"

    def met_by(self, answer: Answer) -> bool:
        """Whether it is exactly one value, and that one as expected."""
        if (answer.rows, answer.columns) != (1, 1):
            return False
        if answer.long:  # neither null nor anything that stands in a line
            return self.kind in (Kind.NULL, Kind.TEXT) and self.operator != "="
        if self.kind is Kind.NULL:
            return (answer.value is None) == (self.operator == "=")
        if answer.value is None:
            return False
        if self.kind is Kind.NUMBER:
            try:
                found = Decimal(answer.value)
            except InvalidOperation:
                return False
            return not found.is_nan() and _OPERATORS[self.operator](found, Decimal(self.value))
        if self.kind is Kind.BOOLEAN and not answer.boolean:
            return False
        return (str(answer) == self.value) == (self.operator == "=")


@dataclass(frozen=True, slots=True)
class Check:
    """One statement, and what has to come of it."""

    name: str
    database: str
    #: Without the semicolon.
    sql: str
    #: Line of the file on which the statement begins.
    line: int
    #: None: it has to run without an error.
    expected: Expectation | None
    #: Seconds.
    timeout: float = TIMEOUT


def parse(text: str, file: str) -> tuple[Check, ...]:
    """The checks of a file's content, in its order. Raises ConfigError that names ``file`` and line."""
    reader = _Reader(text.removeprefix("\ufeff").replace("\r\n", "\n"), file)
    checks = reader.read()
    names: dict[str, int] = {}
    for check in checks:
        if check.name in names:
            reader.refuse(check.line, f"two checks are called {check.name!r}, the other in line {names[check.name]}")
        names[check.name] = check.line
    return checks


def parse_expectation(text: str) -> Expectation:
    """``> 0`` → the expectation. Raises ValueError with what is wrong."""
    match = _EXPECT.fullmatch(text.strip())
    sign, value = (match[1] or "=", match[2].strip()) if match else ("=", "")
    if not value:
        raise ValueError("expect: says nothing; leave the line out if it is enough that the statement runs")
    if _NUMBER.fullmatch(value):
        return Expectation(sign, Kind.NUMBER, value)
    if sign not in ("=", "<>", "!="):
        raise ValueError(f"expect: {sign} compares numbers, and {value} is none; compare in SQL and expect true")
    if value.lower() in ("true", "false"):
        return Expectation(sign, Kind.BOOLEAN, value.lower())
    if value.lower() == "null":
        return Expectation(sign, Kind.NULL, "")
    if value[0] in "'\"":
        if len(value) < 2 or value[-1] != value[0]:
            raise ValueError(f"expect: the quote of {value} does not end")
        value = value[1:-1].replace(value[0] * 2, value[0])
    return Expectation(sign, Kind.TEXT, value)


@dataclass
class _Reader:
    """Goes through the text once, token by token."""

    text: str
    file: str
    position: int = 0
    database: str = "postgres"
    #: Words that wait for their statement, each with its line.
    words: dict[str, tuple[str, int]] = field(default_factory=dict)
    #: Where the statement that is read began; None between two.
    begin: int | None = None
    checks: list[Check] = field(default_factory=list)

    def refuse(self, line: int, fact: str, hint: str = "") -> NoReturn:
        raise ConfigError(f"{self.file}:{line}: {fact}", hint=hint)

    def line(self, position: int) -> int:
        return self.text.count("\n", 0, position) + 1

    def read(self) -> tuple[Check, ...]:
        while self.position < len(self.text):
            self._token()
        if self.begin is not None:
            self.refuse(self.line(self.begin), "the statement that begins here does not end in a semicolon")
        for word, (_, line) in self.words.items():
            self.refuse(line, f"no statement follows this {word}:")
        if not self.checks:
            self.refuse(1, "there is no statement in it", "one SQL statement, and a semicolon behind it, is a check")
        return tuple(self.checks)

    def _token(self) -> None:
        match = _TOKEN.match(self.text, self.position)
        assert match is not None, "any character is a token"
        start, kind = self.position, match.lastgroup
        self.position = match.end()
        if kind == "blank":
            return
        if kind == "line":
            self._comment(match[0], start)
        elif kind == "block":
            self._skip_block(start)
        elif kind == "end":
            self._end(start)
        else:
            if self.begin is None:
                self._begin(match[0], start)
            if kind == "open":
                self.refuse(self.line(start), f"the quote {match[0]} that begins here does not end")
            if kind == "dollar":
                self._skip_dollar(match[0], start)

    def _begin(self, first: str, start: int) -> None:
        if first == "\\":
            self.refuse(
                self.line(start), "commands of psql are not understood, only SQL", "`-- database: NAME` in place of \\c"
            )
        self.begin = start

    def _skip_block(self, start: int) -> None:
        """Comments of this kind can be nested."""
        depth = 1
        while depth:
            edge = _BLOCK_EDGE.search(self.text, self.position)
            if edge is None:
                self.refuse(self.line(start), "the comment that begins here does not end")
            depth += 1 if edge[0] == "/*" else -1
            self.position = edge.end()

    def _skip_dollar(self, tag: str, start: int) -> None:
        end = self.text.find(tag, self.position)
        if end < 0:
            self.refuse(self.line(start), f"the text that begins here with {tag} does not end")
        self.position = end + len(tag)

    def _comment(self, comment: str, start: int) -> None:
        match = _DIRECTIVE.fullmatch(comment.rstrip())
        if match is None:
            return
        word, value, line = match[1].lower(), match[2].strip(), self.line(start)
        before = self.text[self.text.rfind("\n", 0, start) + 1 : start]
        if self.begin is not None or before.strip():
            if word in _WORDS:
                self.refuse(line, f"{word}: stands in a line of its own, in front of the statement that it is for")
            return
        if word not in _WORDS:
            self.refuse(
                line,
                f"{word}: is not known",
                f"there are {', '.join(_WORDS)}; another comment has no colon behind its first word",
            )
        if word in self.words:
            self.refuse(line, f"{word}: stands in front of this statement twice")
        if not value and word != "expect":
            self.refuse(line, f"{word}: says nothing")
        self.words[word] = value, line

    def _end(self, position: int) -> None:
        if self.begin is None:
            self.refuse(self.line(position), "there is no statement in front of this semicolon")
        line = self.line(self.begin)
        words, self.words = self.words, {}
        self.database = words["database"][0] if "database" in words else self.database
        self.checks.append(
            Check(
                name=words["name"][0] if "name" in words else f"line {line}",
                database=self.database,
                sql=self.text[self.begin : position].strip(),
                line=line,
                expected=self._expectation(*words["expect"]) if "expect" in words else None,
                timeout=self._seconds(*words["timeout"]) if "timeout" in words else TIMEOUT,
            )
        )
        self.begin = None

    def _expectation(self, text: str, line: int) -> Expectation:
        try:
            return parse_expectation(text)
        except ValueError as error:
            self.refuse(line, str(error))

    def _seconds(self, text: str, line: int) -> float:
        if not _NUMBER.fullmatch(text) or not 0 < float(text) <= 1e6:
            self.refuse(line, f"timeout: {text} is not a number of seconds")
        return float(text)
