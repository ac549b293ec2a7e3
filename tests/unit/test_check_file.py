"""A file of checks: how it is read, what is refused and where, and what counts as expected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.check_file import TIMEOUT, Answer, Kind, parse, parse_expectation
from pipeline.errors import ConfigError


def one(value: str | None, *, boolean: bool = False) -> Answer:
    return Answer(1, 1, value, boolean=boolean)


def test_a_whole_file() -> None:
    checks = parse(
        """\ufeff-- What the shop has to be like: an ordinary comment.

-- name: orders are there
-- database: shop
-- expect: > 0
SELECT count(*) FROM orders;  -- a comment behind it

/* a block, /* nested */ ; */
-- Timeout: 1.5
-- expect: true
SELECT 'a;b' = 'it''s; --no' AND E'\\';' <> "odd;name" AND $q$ ; $$ ' $q$ <> $$;$$
  -- ordinary: inside a statement
  AND a$b = 1
;
SELECT 1;
-- database: postgres
SELECT 2;
""",
        "checks.sql",
    )
    assert [(c.name, c.database, c.line, str(c.expected), c.timeout) for c in checks] == [
        ("orders are there", "shop", 6, "> 0", TIMEOUT),
        ("line 11", "shop", 11, "true", 1.5),
        ("line 15", "shop", 15, "None", TIMEOUT),
        ("line 17", "postgres", 17, "None", TIMEOUT),
    ]
    assert checks[0].sql == "SELECT count(*) FROM orders"
    assert checks[1].sql.endswith("AND a$b = 1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "f.sql:1: there is no statement in it"),
        ("-- only words\n", "f.sql:1: there is no statement in it"),
        ("SELECT 1;\n\nSELECT\n 2\n", "f.sql:3: the statement that begins here does not end in a semicolon"),
        ("SELECT 1;;", "f.sql:1: there is no statement in front of this semicolon"),
        ("-- expects: 1\nSELECT 1;", "f.sql:1: expects: is not known"),
        ("-- expect: 1\n-- expect: 2\nSELECT 1;", "f.sql:2: expect: stands in front of this statement twice"),
        ("-- expect:\nSELECT 1;", "f.sql:1: expect: says nothing"),
        ("-- name:\nSELECT 1;", "f.sql:1: name: says nothing"),
        ("-- expect: > many\nSELECT 1;", "f.sql:1: expect: > compares numbers, and many is none"),
        ("-- expect: 'a\nSELECT 1;", "f.sql:1: expect: the quote of 'a does not end"),
        ("-- timeout: soon\nSELECT 1;", "f.sql:1: timeout: soon is not a number of seconds"),
        ("-- timeout: 0\nSELECT 1;", "f.sql:1: timeout: 0 is not a number of seconds"),
        ("SELECT 1; -- expect: 1\nSELECT 2;", "f.sql:1: expect: stands in a line of its own"),
        ("SELECT\n-- expect: 1\n1;", "f.sql:2: expect: stands in a line of its own"),
        ("SELECT 1;\n-- name: last\n", "f.sql:2: no statement follows this name:"),
        ("-- name: a\nSELECT 1;\n-- name: a\nSELECT 2;", "f.sql:4: two checks are called 'a', the other in line 2"),
        ("SELECT 'a\n;", "f.sql:1: the quote ' that begins here does not end"),
        ('\nSELECT "a;', 'f.sql:2: the quote " that begins here does not end'),
        ("SELECT $a$ $b$;", "f.sql:1: the text that begins here with $a$ does not end"),
        ("/* /* */ SELECT 1;", "f.sql:1: the comment that begins here does not end"),
        ("\\c shop\nSELECT 1;", "f.sql:1: commands of psql are not understood"),
    ],
)
def test_bad_input_names_file_and_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.sql")
    assert said in caught.value.fact


@pytest.mark.parametrize(
    ("expected", "answer", "met"),
    [
        ("42", one("42"), True),
        ("42", one("42.0"), True),
        ("42", one("43"), False),
        ("42", one(None), False),
        ("42", one("many"), False),
        ("> 0", one("1"), True),
        (">0", one("0"), False),
        (">= -1.5", one("-1.5"), True),
        ("< 1e3", one("Infinity"), False),
        ("<> 0", one("NaN"), False),
        ("<= 10", one("12345678901234567890123456789012345678901"), False),
        ("true", one("t", boolean=True), True),
        ("TRUE", one("f", boolean=True), False),
        ("!= true", one("f", boolean=True), True),
        ("true", one("true"), False),  # a text, and no boolean
        ("t", one("t"), True),
        ("null", one(None), True),
        ("<> null", one(None), False),
        ("<> null", one("x"), True),
        ("paid", one("paid"), True),
        ("<> paid", one("open"), True),
        ("<> paid", one(None), False),
        ("'42'", one("42"), True),
        ("'42'", one("42.0"), False),
        ("'it''s'", one("it's"), True),
        ("''", one(""), True),
        ("1", Answer(2, 1, "1"), False),
        ("1", Answer(1, 2, "1"), False),
        ("1", Answer(0, 1), False),
        ("<> 1", Answer(0, 1), False),
        ("<> null", Answer(0, 1), False),
        ("1", Answer(), False),
    ],
)
def test_what_counts_as_expected(expected: str, answer: Answer, met: bool) -> None:
    assert parse_expectation(expected).met_by(answer) is met


def test_answers_are_told_as_they_are() -> None:
    told = [one("7"), one(None), one("t", boolean=True), one("t"), Answer(3, 2, "1"), Answer(0, 1), Answer()]
    assert [str(a) for a in told] == ["7", "null", "true", "t", "3 rows of 2", "0 rows of 1", "no result"]


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        checks = parse(text, "f")
    except ConfigError:
        return
    assert checks
    assert all(check.sql for check in checks)


@given(st.text(st.characters(exclude_characters="\x00"), max_size=20), st.sampled_from(["'", '"', "$$", "$a$"]))
def test_what_is_quoted_ends_no_statement(text: str, quote: str) -> None:
    inside = text.replace(quote, "").replace("$", "").replace("\r\n", "\n")
    sql = f"SELECT {quote};{inside};{quote}"
    assert [check.sql for check in parse(f"{sql};", "f")] == [sql]


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_numbers_are_compared_as_numbers(number: object) -> None:
    expected = parse_expectation(f"{number}")
    assert expected.kind is Kind.NUMBER
    assert expected.met_by(one(f"{number}"))
    assert parse_expectation(str(expected)) == expected


def test_the_documents_show_files_that_are_read() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    shown = re.search(
        r"^    -- database: shop\n(?:(?:    .*)?\n)+", (docs / "drill.md").read_text("utf-8"), re.MULTILINE
    )
    assert shown is not None
    assert [check.database for check in parse(shown[0], "drill.md")] == ["shop"] * 4
    sample = (docs / "drill-sample.md").read_text("utf-8")
    for check in parse((docs / "drill-checks.sql").read_text("utf-8"), "drill-checks.sql"):
        assert f"| {check.name} | passed | {check.database} | {check.expected or 'runs without an error'} |" in sample


def test_a_value_that_is_too_long_to_look_at_is_nothing_that_stands_in_a_line() -> None:
    answer = Answer(1, 1, long=300_000_000)
    assert str(answer) == "a value of 300000000 bytes"
    for expected, met in (
        ("7", False),
        ("<> 7", False),
        ("'x'", False),
        ("<> 'x'", True),
        ("null", False),
        ("true", False),
    ):
        assert parse_expectation(expected).met_by(answer) == met, expected
    assert parse_expectation("<> null").met_by(answer)
