"""The stages in order, and the same stages backwards: plaintext ↔ the pieces of a stored object.

Forward, the header is described by every stage first, because its hash goes into the object key; then the bytes flow
through. Backward, nothing of an object is believed before it was checked: name, cluster, backup, sizes, and its exact
end. Plain functions on bytes; the caller runs a whole object in one hop to a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.contracts import Buffer, Keyring, Stage
from pipeline.errors import IntegrityError
from pipeline.objects import MAX_PLAIN, Header, begin_reading


@dataclass(frozen=True, slots=True)
class Expected:
    """What a reader asked for, so that an object that was put in its place is noticed."""

    name: str
    system_id: str
    #: Id of the base backup it must belong to; empty for WAL; None where the caller cannot know it yet.
    backup: str | None = ""
    #: The largest plaintext the caller is ready to hold.
    most: int = MAX_PLAIN


class Chain:
    """The way of every object: fingerprint (of WAL), then the stages in order (compress, encrypt, checksum)."""

    def __init__(self, stages: Sequence[Stage], keyring: Keyring, system_id: str) -> None:
        self._stages = tuple(stages)
        self._keyring = keyring
        self._system_id = system_id

    def encode(self, name: str, plain: Buffer, *, backup: str = "", created: datetime) -> Iterator[Buffer]:
        """Plaintext of one object → the pieces to store, each valid until the next is asked for.

        Encode an object once and keep the pieces: a second call draws another salt and makes other bytes.
        """
        header = Header(
            name=name,
            system_id=self._system_id,
            plain_size=len(plain),
            # What is compared by it are names that two servers may give: those of WAL. A backup's id is random.
            fingerprint="" if backup else self._keyring.fingerprint(name, plain),
            created=created.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            backup=backup,
        )
        for stage in self._stages:
            header = stage.describe(header)
        pieces: Iterable[Buffer] = (plain,)
        for stage in self._stages:
            pieces = stage.forward(header, pieces)
        yield header.encoded()
        yield from pieces

    def decode(self, expected: Expected, stored: Iterable[Buffer]) -> tuple[Header, bytearray]:
        """The pieces of a stored object → its header and all of its plaintext. Raises IntegrityError."""
        header, pieces = self._backward(expected, stored, self._stages)
        # Room for all of it at once: an array that grows is moved again and again, and leaves holes in the heap. What a
        # header claims is bounded by then, and costs no memory before it is written to.
        plain = bytearray(header.plain_size)
        view, done = memoryview(plain), 0
        for piece in _exactly(header, pieces):
            end = done + len(piece)
            view[done:end] = piece
            done = end
        view.release()
        return header, plain

    def pieces(self, expected: Expected, stored: Iterable[Buffer]) -> Iterator[Buffer]:
        """The plaintext of a stored object piece by piece, each valid until the next is asked for.

        Raises IntegrityError; the pieces are right only if they end without an error.
        """
        return _exactly(*self._backward(expected, stored, self._stages))

    def expand(self, expected: Expected, stored: Iterable[Buffer]) -> Iterator[Buffer]:
        """The same of an object that was compared with its checksum before, and comes without it.

        So the last stage, which is the checksum, is left out.
        """
        return _exactly(*self._backward(expected, stored, self._stages[:-1]))

    def _backward(
        self, expected: Expected, stored: Iterable[Buffer], stages: Sequence[Stage]
    ) -> tuple[Header, Iterable[Buffer]]:
        header, frames = begin_reading(expected.name, stored)
        self._compare(header, expected)
        pieces: Iterable[Buffer] = frames
        for stage in reversed(stages):
            pieces = stage.backward(header, pieces)
        return header, pieces

    def _compare(self, header: Header, expected: Expected) -> None:
        """An object must be what was asked for, whoever may have written to the bucket."""
        if header.name != expected.name:
            raise IntegrityError(
                f"{expected.name} holds an object named {header.name}",
                hint="it was copied or moved there; restore the original, or read from another destination",
            )
        if header.system_id != self._system_id or header.system_id != expected.system_id:
            raise IntegrityError(
                f"{expected.name} belongs to the cluster {header.system_id}, not to {expected.system_id}"
            )
        if expected.backup is not None and header.backup != expected.backup:
            raise IntegrityError(
                f"{expected.name} belongs to the base backup {header.backup or '(none)'},"
                f" not to {expected.backup or '(none)'}"
            )
        if header.plain_size > expected.most:
            raise IntegrityError(
                f"{expected.name} claims {header.plain_size} bytes of plaintext; at most {expected.most} were expected"
            )
        if header.cipher == "none" and self._keyring.must_encrypt(header.name):
            raise IntegrityError(
                f"{expected.name} is stored unencrypted, and this repository encrypts such objects",
                hint="somebody may have replaced it; --allow-unencrypted reads it all the same",
            )


def _exactly(header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    """The pieces, if they are as many bytes as the header claims. Raises IntegrityError."""
    left = header.plain_size
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise IntegrityError(f"{header.name} holds more than the {header.plain_size} bytes it claims")
        yield piece
    if left:
        raise IntegrityError(f"{header.name} holds {left} bytes less than the {header.plain_size} it claims")
