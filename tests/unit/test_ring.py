"""The key ring and the data keys, and what somebody who may write to the bucket tries with them."""

from __future__ import annotations

import hmac
import json
import os
import time
from dataclasses import asdict, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

import infra.sealing
from infra.ring import (
    Former,
    Policy,
    Ring,
    fresh_ring,
    make_data_key,
    open_data_key,
    open_ring,
    read_data_key,
    ring_name,
    seal_ring,
)
from infra.sealing import derive
from infra.wraps import SCRYPT_N
from pipeline.catalog import data_key_name
from pipeline.errors import ConfigError, IntegrityError
from tests.keys import NOW, SYSTEM_ID

NAME = ring_name(1)
POLICY = Policy(wal=True, base=False)
RECIPIENT = X25519PrivateKey.generate()
#: One ring for the whole file, with a cheap scrypt.
RING = fresh_ring(SYSTEM_ID, POLICY)
CONTENT = seal_ring(RING, ["first", "séc"], [RECIPIENT.public_key().public_bytes_raw()], NOW, scrypt_n=1024)


def by_recipient(content: bytes, ring: int = 1, system_id: str = SYSTEM_ID) -> Ring | None:
    """Opening without a passphrase is quick."""
    return open_ring(NAME, ring, system_id, content, identity=RECIPIENT.private_bytes_raw())


def members(content: bytes = CONTENT) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(content.split(b"\n")[0])
    return value


def signed(value: dict[str, Any], key: bytes | None = None) -> bytes:
    """The members as a ring; without ``key`` under the MAC of the genuine one, which does not fit."""
    line = json.dumps(value).encode()
    mac = CONTENT.split(b"\n")[1] if key is None else hmac.digest(key, line, "sha256").hex().encode()
    return line + b"\n" + mac + b"\n"


def test_each_passphrase_and_recipient_opens_it() -> None:
    assert open_ring(NAME, 1, SYSTEM_ID, CONTENT, passphrase="first") == RING
    assert open_ring(NAME, 1, SYSTEM_ID, CONTENT, passphrase="se\u0301c") == RING  # typed with a combining accent
    assert by_recipient(CONTENT) == RING
    assert RING.policy == POLICY


def test_nothing_else_opens_it() -> None:
    assert open_ring(NAME, 1, SYSTEM_ID, CONTENT, passphrase="First") is None
    assert open_ring(NAME, 1, SYSTEM_ID, CONTENT) is None
    assert open_ring(NAME, 1, SYSTEM_ID, CONTENT, identity=os.urandom(32)) is None


def test_it_shows_no_secret() -> None:
    assert RING.private_key.hex().encode() not in CONTENT
    assert RING.writer_secret.hex().encode() not in CONTENT
    assert "policy" not in members()
    for value in (repr(RING), repr(make_data_key(RING, NOW)[0])):
        assert RING.private_key.hex() not in value
        assert repr(RING.writer_secret) not in value
        assert "secret=" not in value.replace("writer_secret=", "secret=")


def test_an_empty_passphrase_makes_no_ring() -> None:
    with pytest.raises(ConfigError, match="BACKUP_ENCRYPTION_PASSWORD is empty"):
        seal_ring(RING, [""], [], NOW)


def test_a_passphrase_that_is_no_text() -> None:
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        seal_ring(RING, ["\udcff"], [], NOW)


def test_somebody_elses_policy_sealed_to_our_public_key_is_noticed() -> None:
    inner = {"policy": asdict(Policy(wal=False, base=False)), "writer_secret": "00" * 32, "former": []}
    sealed = infra.sealing.seal(json.dumps(inner).encode(), RING.public_key, infra.sealing.context("ring", SYSTEM_ID))
    for key in (None, os.urandom(32), derive(RING.writer_secret, "ring")):
        with pytest.raises(IntegrityError, match=f"{NAME} was changed by somebody who cannot open it"):
            by_recipient(signed({**members(), "sealed": sealed.hex()}, key))


@pytest.mark.parametrize(
    "change",
    [{"ring": 2}, {"system_id": "8"}, {"created": ""}, {"sealed": "00" * 200}, {"wraps": members()["wraps"][2:]}],
)
def test_every_changed_member_is_noticed(change: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match=f"{NAME} was changed"):
        by_recipient(signed({**members(), **change}))


def test_another_public_key_means_that_nothing_opens_it() -> None:
    assert by_recipient(signed({**members(), "public_key": "09" + "00" * 31})) is None


def test_a_ring_of_another_number_or_cluster_is_refused() -> None:
    with pytest.raises(IntegrityError, match=f"{NAME} is ring 1 of the cluster {SYSTEM_ID}, not ring 2"):
        by_recipient(CONTENT, ring=2)
    assert by_recipient(CONTENT, system_id="8") is None  # the wraps are bound to the cluster, too


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"{}\n",
        CONTENT[:-1],
        CONTENT + b"\n",
        CONTENT.replace(b"\n", b"\r\n"),
        CONTENT.upper(),
        b"[]\n" + b"0" * 64 + b"\n",
        b'{"ring":1,"ring":1}\n' + b"0" * 64 + b"\n",
        signed({**members(), "more": 1}),
        signed({**members(), "public_key": "zz"}),
        signed({**members(), "public_key": 7}),
        signed({**members(), "wraps": [{}] * 300}),
        signed({**members(), "wraps": [{"kind": "scrypt"}]}),
        signed({**members(), "wraps": [{"kind": "recipient", "public_key": "", "sealed": "0"}]}),
    ],
)
def test_what_is_no_ring_is_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError, match="ring-00000001"):
        by_recipient(content)


def test_what_a_new_wrap_costs() -> None:
    wrap = members(seal_ring(RING, ["first"], [], NOW))["wraps"][0]
    assert (wrap["n"], wrap["r"], wrap["p"]) == (65536, 8, 2)


def test_wraps_of_kinds_to_come_are_passed_over() -> None:
    strange: list[Any] = [{"kind": "hardware", "slot": 9}, "what", None, 7]
    value = {**members(), "wraps": strange + members()["wraps"]}
    assert by_recipient(signed(value, derive(RING.private_key, "ring"))) == RING


@pytest.mark.parametrize(
    "costs",
    [
        {"n": 1 << 19},
        {"n": 1 << 40},
        {"n": 0},
        {"n": 1},
        {"n": -65536},
        {"n": 65535},
        {"r": 9},
        {"r": 1 << 20},
        {"p": 0},
        {"p": 17},
        {"p": 1 << 30},
        {"n": 65536.0},
        {"n": "65536"},
        {"salt": ""},
        {"sealed": "xyz"},
    ],
)
def test_hostile_scrypt_parameters_are_refused_at_once(costs: dict[str, Any]) -> None:
    wrap = {**members()["wraps"][0], **costs}
    start = time.process_time()
    with pytest.raises(IntegrityError, match="ring-00000001"):
        open_ring(NAME, 1, SYSTEM_ID, signed({**members(), "wraps": [wrap]}), passphrase="first")
    assert time.process_time() - start < 0.2


def test_many_passphrases_together_are_bounded_as_well() -> None:
    wraps = [{**members()["wraps"][0], "n": SCRYPT_N}] * 17
    with pytest.raises(IntegrityError, match="asks for 17 times the work of one passphrase"):
        open_ring(NAME, 1, SYSTEM_ID, signed({**members(), "wraps": wraps}), passphrase="wrong")


def test_data_keys_open_with_the_private_key_only() -> None:
    writer = replace(RING, private_key=os.urandom(32))
    key, content = make_data_key(RING, NOW)
    assert key.secret.hex().encode() not in content
    sealed = read_data_key(RING, key.id, content)
    assert open_data_key(RING, sealed) == key
    with pytest.raises(IntegrityError, match=f"{data_key_name(key.id)} was sealed to another key"):
        open_data_key(writer, replace(sealed, private_key=writer.private_key))


def test_a_data_key_that_a_stranger_sealed_is_refused() -> None:
    stranger = replace(RING, writer_secret=os.urandom(32))  # knows the public key, as everybody does
    key, content = make_data_key(stranger, NOW)
    with pytest.raises(IntegrityError, match=f"{data_key_name(key.id)} was not made by a writer of this repository"):
        read_data_key(RING, key.id, content)


def test_a_data_key_under_another_name_or_of_another_cluster_is_refused() -> None:
    key, content = make_data_key(RING, NOW)
    with pytest.raises(IntegrityError, match=f"is the data key {key.id} of"):
        read_data_key(RING, "0" * 32, content)
    other, content = make_data_key(replace(RING, system_id="8"), NOW)
    with pytest.raises(IntegrityError, match="of the cluster 8"):
        read_data_key(RING, other.id, content)


def test_every_flipped_bit_of_a_data_key_is_noticed() -> None:
    key, content = make_data_key(RING, NOW)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        with pytest.raises(IntegrityError):
            read_data_key(RING, key.id, bytes(flipped))


def test_rotation_keeps_what_was_written_readable_and_takes_nothing_new_under_the_former_secret() -> None:
    old, old_content = make_data_key(RING, NOW)
    later, later_content = make_data_key(RING, NOW)
    fresh = fresh_ring(SYSTEM_ID, POLICY)
    former = Former(RING.private_key, RING.writer_secret, frozenset([old.id]))
    rotated = replace(fresh, number=2, former=(former,))
    identity = X25519PrivateKey.generate()
    content = seal_ring(rotated, [], [identity.public_key().public_bytes_raw()], NOW)
    ring = open_ring(ring_name(2), 2, SYSTEM_ID, content, identity=identity.private_bytes_raw())
    assert ring == rotated
    assert open_data_key(ring, read_data_key(ring, old.id, old_content)) == old
    new, new_content = make_data_key(ring, NOW)
    assert open_data_key(ring, read_data_key(ring, new.id, new_content)) == new
    with pytest.raises(IntegrityError, match="was not made by a writer"):
        read_data_key(ring, later.id, later_content)
    assert ring.fingerprint_key == RING.fingerprint_key
