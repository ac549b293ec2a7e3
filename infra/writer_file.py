"""What a host needs that is to write to a repository and not to read it, in one file: ``walship key export-writer``.

A JSON object. Secret: with it, and the right to write to the bucket, somebody can put objects there that readers take
for ours. What is stored it does not open.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from infra.ring import Policy, Writer
from infra.sealing import from_hex
from pipeline.errors import ConfigError, IntegrityError
from pipeline.objects import check_members, strict_json

_FORMAT = 1
_MEMBERS = {
    "walship_writer": int, "system_id": str, "ring": int, "public_key": str, "policy": dict, "writer_secret": str,
    "fingerprint_key": str,
}  # fmt: skip


def encode_writer(writer: Writer) -> str:
    """The file's content."""
    members = {
        "walship_writer": _FORMAT,
        "system_id": writer.system_id,
        "ring": writer.number,
        "public_key": writer.public_key.hex(),
        "policy": asdict(writer.policy),
        "writer_secret": writer.writer_secret.hex(),
        "fingerprint_key": writer.fingerprint_key.hex(),
    }
    return json.dumps(members, indent=1) + "\n"


def decode_writer(text: str, where: str) -> Writer:
    """The opposite; ``where`` names the file. Raises ConfigError, which never shows a value."""
    hint = "make it anew where the repository can be read: walship key export-writer FILE"
    try:
        found = strict_json(text.encode())
        form = found.get("walship_writer") if isinstance(found, dict) else None
        if type(form) is int and form != _FORMAT:
            raise ConfigError(f"{where} is of format {form}; this walship reads format {_FORMAT}", hint=hint)
        members = check_members(found, _MEMBERS)
        policy = check_members(members["policy"], {"wal": bool, "base": bool})
        keys = [from_hex(where, name, members[name], 32) for name in ("public_key", "writer_secret", "fingerprint_key")]
    except ValueError as error:
        raise ConfigError(f"{where} is no writer file: {error}", hint=hint) from None
    except IntegrityError as error:
        raise ConfigError(error.fact, hint=hint) from None
    return Writer(members["ring"], members["system_id"], Policy(**policy), *keys)
