"""``synchronous_standby_names``: read as the server reads it, and what it means for commits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.postgres.sync import NotUnderstoodError, SyncNames, meaning, order, parse, quoted, quoted_all

#: Also asked of a real server: test_stream_check.
TAKEN = [
    ("walship", "first", 1, ("walship",)),
    ("a, b,c", "first", 1, ("a", "b", "c")),
    ("2 (a, b)", "first", 2, ("a", "b")),
    ("2(a,b)", "first", 2, ("a", "b")),
    ("FIRST 1 (a, b)", "first", 1, ("a", "b")),
    ("fIrSt 1(a)", "first", 1, ("a",)),
    ("ANY 2 (a, b, c)", "any", 2, ("a", "b", "c")),
    ("any 2 (*)", "any", 2, ("*",)),
    ("*", "first", 1, ("*",)),
    ('"*"', "first", 1, ("*",)),
    ('"wal-ship"', "first", 1, ("wal-ship",)),
    ('"a ""b"" c", d', "first", 1, ('a "b" c', "d")),
    ('"any", "FIRST"', "first", 1, ("any", "FIRST")),
    ("1", "first", 1, ("1",)),
    ("1, 2", "first", 1, ("1", "2")),
    ("2 (1, 2)", "first", 2, ("1", "2")),
    (" \n a\t", "first", 1, ("a",)),
    ("_a$1", "first", 1, ("_a$1",)),
    ("größe", "first", 1, ("größe",)),
    ('""', "first", 1, ("",)),
]
REFUSED = [
    " ", "wal-ship", "a b", "a,", ",a", "a,,b", "ANY (a)", "ANY 1", "ANY 1 a", "FIRST", "any", "any, b", "2 (a",
    "2 ()", "a)", "(a)", '"a', "0 (a)", "FIRST 0 (a)", "2 (a) b", "1 (first)", "-1 (a)", "1.5 (a)", "a.b", "2 (a))",
    "1 2",
]  # fmt: skip


@pytest.mark.parametrize(("text", "method", "count", "names"), TAKEN)
def test_what_a_server_takes(text: str, method: str, count: int, names: tuple[str, ...]) -> None:
    assert parse(text) == SyncNames(method, count, names)  # type: ignore[arg-type] # a Literal, from a table


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_server_refuses(text: str) -> None:
    with pytest.raises(NotUnderstoodError):
        parse(text)
    assert meaning(text, "walship").wait == "unknown"


_NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(st.lists(_NAMES, min_size=1, max_size=5), st.integers(1, 9), st.booleans())
def test_quoted_names_come_back(names: list[str], count: int, any_of: bool) -> None:
    listed = ", ".join(quoted(name) for name in names)
    read = parse(f"{'ANY' if any_of else 'FIRST'} {count} ({listed})")
    assert read == SyncNames("any" if any_of else "first", count, tuple(names))
    assert parse(listed) == SyncNames("first", 1, tuple(names))


@given(st.text('aA1,()*" -$anyfirst', max_size=16))
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        read = parse(text)
    except NotUnderstoodError:
        return
    assert read is None or (read.count >= 1 and read.names)


@pytest.mark.parametrize(
    ("text", "wait", "words"),
    [
        ("", "none", "commits wait for nobody"),
        ("walship", "ours", "commits wait until walship has stored them: "),
        ("WALship", "ours", "until walship has stored"),
        ("FIRST 2 (walship, s1)", "ours", "until walship has stored them, and for s1"),
        ("ANY 2 (s1, walship)", "ours", "and for s1"),
        ("2 (walship, WALSHIP, s1)", "ours", "and for s1"),
        ("*", "shared", "commits wait for any connection: "),
        ("FIRST 1 (walship, *)", "shared", "the first 1 connected of walship and any connection"),
        ("walship, s1", "shared", "lets s1 release them without walship, while it is not connected"),
        ("s1, walship", "shared", "whenever the others are quicker or come first"),
        ("ANY 1 (walship, s1)", "shared", "any 1 of walship and s1"),
        ("ANY 2 (walship, s1, s2)", "shared", "lets s1 and s2 release them"),
        ("walship1", "others", "commits wait for walship1, not for walship"),
        ("ANY 2 (s1, s2, s3)", "others", "any 2 of s1, s2 and s3, not for walship"),
        ("2 (walship)", "never", "commits wait for 2 standbys"),
        ("ANY 3 (walship, s1)", "never", "names 2: they wait for ever"),
    ],
)
def test_what_commits_wait_for(text: str, wait: str, words: str) -> None:
    found = meaning(text, "walship")
    assert (found.wait, words in found.fact) == (wait, True), found
    assert bool(found.hint) is (wait not in ("none", "ours"))


@given(st.lists(st.sampled_from(["s1", "s2", "s3", "walship", "WALSHIP"]), min_size=1, max_size=5), st.integers(1, 5))
def test_ours_means_that_nobody_else_is_enough(names: list[str], count: int) -> None:
    """Against the rule itself: each name connected once, who of them can release a commit without us?"""
    others = {name for name in names if name.lower() != "walship"}
    ours = any(name.lower() == "walship" for name in names)
    wait = meaning(f"ANY {count} ({', '.join(names)})", "walship").wait
    if not ours:
        assert wait == "others"
    elif len(others) >= count:
        assert wait == "shared"
    else:
        assert wait == ("ours" if len(others) + 1 == count else "never")


def test_what_is_advised_is_right() -> None:
    assert (
        order("walship") == "in psql: ALTER SYSTEM SET synchronous_standby_names = 'walship'; SELECT pg_reload_conf();"
    )
    assert quoted("wal-ship") == '"wal-ship"'
    assert quoted("First") == '"First"'
    advised = meaning('walship, "s-1"', "walship").hint
    assert 'FIRST 2 (walship, "s-1")' in advised
    assert meaning(quoted_all(2, ("walship", "s-1")), "walship").wait == "ours"
