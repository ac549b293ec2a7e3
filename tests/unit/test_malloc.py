"""Large blocks go back to the system when they are freed: else threads' heaps keep what a burst has left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

#: Frees a block, whereupon glibc would put others of its size on a heap; one that is freed below another stays there.
_PROGRAM = """
import re, sys
from pathlib import Path
from infra.malloc import give_back_large_blocks

if sys.argv[1] == "give back":
    give_back_large_blocks()
del (block := bytearray(20 << 20))[:]
blocks = [bytearray(b"x") * (16 << 20) for _ in range(4)]
small = [bytes(1000) for _ in range(1000)]
del blocks
print(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def _rss(word: str) -> int:
    """Kilobytes that such a program has in the end."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _PROGRAM, word]
    return int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_is_freed_is_given_back() -> None:
    assert _rss("give back") < 40 << 10
