"""Encrypt: one framing for five ciphers, and its way back. ``docs/format.md`` is the full text.

The compressed bytes are cut into chunks of 1 MiB; each is sealed by itself, under a nonce that counts the chunks and
marks the last one (STREAM: Hoang, Reyhanitabar, Rogaway and Vizár, CRYPTO 2015; as in age). So bytes can be released
chunk by chunk, each one authenticated, and chunks that are missing, swapped, doubled or cut off do not open. The keys
of an object come from the data key, a fresh salt and the object's own header: a changed header opens nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.contracts import Buffer, Keyring
from pipeline.errors import ConfigError, IntegrityError
from pipeline.objects import Header

#: Bytes before encryption in every chunk but the last; fixed by the format.
CHUNK = 1 << 20
SALT_SIZE = 32
_CONTEXT = b"walship 1 object"
#: Offset of the JSON in ``Header.encoded()``: behind magic and length.
_JSON = 12
_LAST = 1


class Sealer(Protocol):
    """One object's cipher with its keys. ``nonce`` is 12 bytes: an 11-byte counter and the flag."""

    #: Bytes that a sealed chunk has more than the plain one, at most (exactly, for a chunk of 1 MiB).
    overhead: int

    def seal(self, nonce: bytes, plain: Buffer, out: memoryview) -> int:
        """Write the sealed chunk into ``out``; how many bytes it is."""
        ...

    def open(self, nonce: bytes, sealed: Buffer, out: memoryview) -> int:
        """Write the plain chunk into ``out``; how many bytes it is. InvalidTag before anything is decrypted wrongly."""
        ...


class _Aead:
    """AES-256-GCM or ChaCha20-Poly1305: ciphertext and a tag of 16 bytes."""

    overhead = 16

    def __init__(self, cipher: AESGCM | ChaCha20Poly1305) -> None:
        self._cipher = cipher

    def seal(self, nonce: bytes, plain: Buffer, out: memoryview) -> int:
        return self._cipher.encrypt_into(nonce, plain, None, out[: len(plain) + 16])

    def open(self, nonce: bytes, sealed: Buffer, out: memoryview) -> int:
        return self._cipher.decrypt_into(nonce, sealed, None, out[: max(0, len(sealed) - 16)])


class _Cbc:
    """AES-CBC, then HMAC-SHA256 over nonce and ciphertext; PKCS#7 padding.

    The IV of a chunk is HMAC-SHA256 of its nonce under a key of its own, cut to 16 bytes: unpredictable without the
    key, as CBC requires, and no byte of it needs to be stored.
    """

    overhead = 16 + 32

    def __init__(self, key: bytes, mac_key: bytes, iv_key: bytes) -> None:
        self._aes = algorithms.AES(key)
        self._mac_key = mac_key
        self._iv_key = iv_key

    def _iv(self, nonce: bytes) -> modes.CBC:
        return modes.CBC(hmac.digest(self._iv_key, nonce, "sha256")[:16])

    def _mac(self, nonce: bytes, ciphertext: Buffer) -> bytes:
        mac = hmac.new(self._mac_key, nonce, "sha256")
        mac.update(ciphertext)
        return mac.digest()

    def seal(self, nonce: bytes, plain: Buffer, out: memoryview) -> int:
        whole = len(plain) - len(plain) % 16
        view = memoryview(plain)
        pad = 16 - len(plain) % 16
        encryptor = Cipher(self._aes, self._iv(nonce)).encryptor()
        encryptor.update_into(view[:whole], out)
        out[whole : whole + 16] = encryptor.update(bytes(view[whole:]) + bytes([pad]) * pad)
        size = whole + 16
        out[size : size + 32] = self._mac(nonce, out[:size])
        return size + 32

    def open(self, nonce: bytes, sealed: Buffer, out: memoryview) -> int:
        view = memoryview(sealed)
        ciphertext, tag = view[:-32], view[-32:]
        if not hmac.compare_digest(self._mac(nonce, ciphertext), tag):
            raise InvalidTag
        size = len(ciphertext)
        if size < 16 or size % 16:
            raise InvalidTag
        decryptor = Cipher(self._aes, self._iv(nonce)).decryptor()
        decryptor.update_into(ciphertext, out)
        pad = out[size - 1]
        if not 1 <= pad <= 16 or bytes(out[size - pad : size]) != bytes([pad]) * pad:
            raise InvalidTag
        return size - pad


def _cbc(key_size: int) -> Callable[[bytes], Sealer]:
    return lambda keys: _Cbc(keys[:key_size], keys[key_size : key_size + 32], keys[key_size + 32 :])


#: Every cipher of format 1: bytes of key material, and what makes a sealer of them.
_CIPHERS: dict[str, tuple[int, Callable[[bytes], Sealer]]] = {
    "aes-256-gcm": (32, lambda keys: _Aead(AESGCM(keys))),
    "chacha20-poly1305": (32, lambda keys: _Aead(ChaCha20Poly1305(keys))),
    "aes-256-cbc": (32 + 64, _cbc(32)),
    "aes-192-cbc": (24 + 64, _cbc(24)),
    "aes-128-cbc": (16 + 64, _cbc(16)),
}
CIPHERS = (*_CIPHERS, "none")


class Encrypt:
    """The stage. ``cipher_for`` tells the cipher for an object's name, or ``none``; ``random`` gives n random bytes."""

    def __init__(
        self, keyring: Keyring, cipher_for: Callable[[str], str], *, random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._keyring = keyring
        self._cipher_for = cipher_for
        self._random = random

    def describe(self, header: Header) -> Header:
        cipher = self._cipher_for(header.name)
        if cipher not in CIPHERS:
            raise ConfigError(f"there is no cipher {cipher!r}", hint=f"choose one of {', '.join(CIPHERS)}")
        if cipher == "none":
            return replace(header, cipher=cipher, key="", salt="")
        key = self._keyring.current()
        return replace(header, cipher=cipher, key=key.id, salt=self._random(SALT_SIZE).hex())

    def forward(self, header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        if header.cipher == "none":
            return iter(pieces)
        return _seal(self._sealer(header), pieces)

    def backward(self, header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        if header.cipher == "none":
            if header.key or header.salt:
                raise IntegrityError(f"{header.name} says it is not encrypted, and names a key all the same")
            return iter(pieces)
        return _open(header.name, self._sealer(header), pieces)

    def _sealer(self, header: Header) -> Sealer:
        """The keys of one object: HKDF-SHA256 of the data key, bound to the exact bytes of its header."""
        if header.cipher not in _CIPHERS:
            raise IntegrityError(
                f"{header.name} is encrypted with the unknown cipher {header.cipher!r}",
                hint=f"this walship knows {', '.join(CIPHERS)}; a newer one may know more",
            )
        if not is_hex(header.salt, SALT_SIZE):
            raise IntegrityError(f"{header.name} has a salt that is not {SALT_SIZE} bytes of hex")
        size, make = _CIPHERS[header.cipher]
        info = b"\0".join((_CONTEXT, header.cipher.encode(), hashlib.sha256(header.encoded()[_JSON:]).digest()))
        hkdf = HKDF(SHA256(), size, salt=bytes.fromhex(header.salt), info=info)
        return make(hkdf.derive(self._keyring.find(header.key).secret))


def is_hex(text: str, size: int) -> bool:
    """Whether the text is ``size`` bytes as lower-case hex, and nothing else (``bytes.fromhex`` skips spaces)."""
    return len(text) == 2 * size and not set(text) - set("0123456789abcdef")


def _nonce(number: int, last: int) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _seal(sealer: Sealer, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    out = memoryview(bytearray(CHUNK + sealer.overhead))
    for number, (chunk, last) in enumerate(_chunks(pieces, CHUNK)):
        size = sealer.seal(_nonce(number, last), chunk, out)
        yield out[:size]


def _open(name: str, sealer: Sealer, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    # 15 bytes more than a chunk: what AES wants to have room for while it decrypts.
    out = memoryview(bytearray(CHUNK + sealer.overhead + 15))
    for number, (chunk, last) in enumerate(_chunks(pieces, CHUNK + sealer.overhead)):
        try:
            size = sealer.open(_nonce(number, last), chunk, out)
        except InvalidTag:
            raise IntegrityError(
                f"{name} does not decrypt: chunk {number} was changed, cut or moved, or the header was",
                hint="read it from another destination; if that fails too, the data key may be a wrong one",
            ) from None
        if (size == 0 and number > 0) or (size != CHUNK and not last):
            raise IntegrityError(f"{name} is no object that walship made: chunk {number} holds {size} bytes")
        if size:
            yield out[:size]


def _chunks(pieces: Iterable[Buffer], size: int) -> Iterator[tuple[Buffer, int]]:
    """Pieces of any length → chunks of exactly ``size`` and one last of 1 to ``size`` bytes (0 if there is nothing).

    A chunk is handed on only once it is known whether it is the last. What lies whole in one piece is not copied. Each
    chunk is valid until the next is asked for.
    """
    carry = memoryview(bytearray(size))
    held = 0
    for piece in pieces:
        view = memoryview(piece)
        while view:
            if held == size:
                yield carry, 0
                held = 0
            if held == 0 and len(view) > size:
                yield view[:size], 0
                view = view[size:]
                continue
            taken = min(size - held, len(view))
            carry[held : held + taken] = view[:taken]
            held += taken
            view = view[taken:]
    yield carry[:held], _LAST
