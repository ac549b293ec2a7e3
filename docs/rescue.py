"""Read a walship repository without walship.

Needs Python 3.11, `cryptography` 50 or later and one zstd library: Python 3.14's own, `backports.zstd` or `zstandard`
(and `lz4`, if objects were stored with that codec). FOLDER is a local copy of a destination, or of one cluster's folder
in it: any tool that copies files or a bucket makes one. What is read is checked as docs/format.md asks.

    rescue.py FOLDER list                            what there is: backups, WAL, and every other object
    rescue.py FOLDER get NAME FILE                   decode one object, for example wal/00000002.history
    rescue.py FOLDER archive BACKUP ARCHIVE FILE     join the parts of an archive (base, or a tablespace's oid) to a tar
    rescue.py FOLDER wal DIR                         decode all WAL into DIR, for restore_command = 'cp DIR/%f %p'

What several workers have stored is several archives (base.1, base.2 …): unpack them all into one folder. An incremental
backup is not put together here: unpack it, and all that it builds on (`list` names them), into a folder each, `get`
base/BACKUP/backup_manifest into each, and run PostgreSQL's own: pg_combinebackup FULL INCREMENT … -o RESULT.

`wal` also joins the tails of segments that are not stored finished, and pads them with zeros, as PostgreSQL wants
them. If several destinations are left, copy them into one FOLDER first: each may have tails that the others lack.

The passphrase is taken from BACKUP_ENCRYPTION_PASSWORD or from --passphrase-file, else asked for. Whoever has the
private key of a recipient needs none: --identity-file names its file, as `walship key new-identity` has made it.
"""

# A script to be read, copied and changed in a hurry, not a library:
# ruff: noqa: ANN001, ANN002, ANN201, ANN202, ANN204, N818

import argparse
import base64
import getpass
import hashlib
import hmac
import json
import os
import re
import sys
import unicodedata
import zlib
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

MAGIC = b"WALSHIP\x01"
CHUNK = 1 << 20
MAX_PLAIN = 1 << 30
MEMBERS = {"name", "system_id", "codec", "cipher", "key", "salt", "plain_size", "fingerprint", "created", "backup"}
CBC_KEY_SIZE = {"aes-256-cbc": 32, "aes-192-cbc": 24, "aes-128-cbc": 16}


class Damaged(Exception):
    """An object is not what walship wrote."""


def require(truth, fact):
    if not truth:
        raise Damaged(fact)


def strict_json(text):
    """JSON with no member doubled."""

    def once(pairs):
        require(len(dict(pairs)) == len(pairs), "a JSON member is doubled")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def context(purpose, *values):
    return "\0".join((f"walship 1 {purpose}", *values)).encode()


def hkdf(secret, size, info, salt=None):
    return HKDF(SHA256(), size, salt=salt, info=info).derive(secret)


def hpke_open(sealed, private, info):
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    return suite.decrypt(sealed, X25519PrivateKey.from_private_bytes(private), info)


def decompress(codec, data, size):
    """One whole frame to exactly `size` bytes, without allocating more."""
    if codec == "none":
        return data
    if codec == "gzip":
        stream = zlib.decompressobj(31)
        plain = stream.decompress(data, size + 1)
        require(stream.eof and not stream.unused_data, "the gzip stream does not end where the object does")
        return plain
    require(codec in ("zstd", "lz4"), f"unknown codec {codec}")
    if codec == "lz4":
        import lz4.frame

        stream = lz4.frame.LZ4FrameDecompressor()
    else:
        try:
            from compression import zstd
        except ImportError:
            try:
                from backports import zstd
            except ImportError:
                import zstandard

                require(zstandard.frame_content_size(data) in (-1, size), "its size is not what its header says")
                return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
        stream = zstd.ZstdDecompressor()
    plain = stream.decompress(data, size + 1)
    require(stream.eof and not stream.unused_data, f"the {codec} stream does not end where the object does")
    return plain


def decrypt(header, raw, data, secret):
    """Frames to compressed bytes: chunks of 1 MiB, a nonce of an 11-byte counter and a last-chunk flag."""
    cipher = header["cipher"]
    size = CBC_KEY_SIZE.get(cipher)
    require(size or cipher in ("aes-256-gcm", "chacha20-poly1305"), f"unknown cipher {cipher}")
    info = b"walship 1 object\0" + cipher.encode() + b"\0" + hashlib.sha256(raw).digest()
    keys = hkdf(secret, size + 64 if size else 32, info, salt=bytes.fromhex(header["salt"]))
    step = CHUNK + (48 if size else 16)
    plain = bytearray()
    for number in range(max(1, -(-len(data) // step))):
        chunk = data[number * step : (number + 1) * step]
        last = (number + 1) * step >= len(data)
        nonce = number.to_bytes(11, "big") + bytes([last])
        if not size:
            aead = AESGCM(keys) if cipher == "aes-256-gcm" else ChaCha20Poly1305(keys)
            piece = aead.decrypt(nonce, chunk, None)
        else:
            key, mac_key, iv_key = keys[:size], keys[size : size + 32], keys[size + 32 :]
            text, tag = chunk[:-32], chunk[-32:]
            require(hmac.compare_digest(hmac.digest(mac_key, nonce + text, "sha256"), tag), f"chunk {number} is forged")
            iv = hmac.digest(iv_key, nonce, "sha256")[:16]
            decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
            piece = decryptor.update(text) + decryptor.finalize()
            piece = piece[: -piece[-1]]
        require(piece or number == 0, "the last chunk is empty")
        plain += piece
    return bytes(plain)


def read_identity(path):
    """The X25519 private key of a recipient, as `walship key new-identity` writes it."""
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    text = "".join(line for line in lines if not line.startswith("#"))
    prefix = "walship-identity-1-"
    require(re.fullmatch(f"{prefix}[a-z2-7]{{58}}", text), f"{path} holds no private key of a recipient")
    raw = base64.b32decode(text.removeprefix(prefix).upper() + "======")
    require(hashlib.sha256(prefix.encode() + raw[:32]).digest()[:4] == raw[32:], f"the key in {path} is mistyped")
    return raw[:32]


class Repository:
    """One cluster's folder. `identity` is a recipient's private key, or None: then the passphrase is asked for."""

    def __init__(self, folder, passphrase, identity=None):
        clusters = [f for f in folder.iterdir() if f.is_dir() and f.name.isdigit()]
        if clusters and not folder.name.isdigit():
            require(len(clusters) == 1, f"several clusters here, choose one: {', '.join(sorted(map(str, clusters)))}")
            folder = clusters[0]
        self.folder = folder
        self.system_id = folder.name
        self.policy = {"wal": False, "base": False}
        self.private, self.makers = None, []
        rings = [name for name in self.names("keys/ring-") if re.fullmatch(r"keys/ring-\d{8}", name)]
        if rings:
            self.open_ring(rings[-1], passphrase, identity)

    def names(self, prefix=""):
        files = (f.relative_to(self.folder).as_posix() for f in self.folder.rglob("*") if f.is_file())
        return sorted(name for name in files if name.startswith(prefix) and name != "repository.json")

    def read(self, name, backup=""):
        """The plaintext of an object and its digest, checked. `backup` is the id it must belong to; None: any."""
        try:
            stored = (self.folder / name).read_bytes()
            require(stored[:8] == MAGIC, "no walship object of format 1")
            require(hashlib.sha256(stored[:-32]).digest() == stored[-32:], "damaged: its checksum does not match")
            end = 12 + int.from_bytes(stored[8:12], "big")
            require(end <= 12 + 65536 and end + 32 <= len(stored), "its header is cut")
            raw, data = stored[12:end], stored[end:-32]
            header = strict_json(raw)
            require(header.keys() == MEMBERS, "its header has other members than format 1")
            require((header["name"], header["system_id"]) == (name, self.system_id), "it is another object")
            require(backup is None or header["backup"] == backup, "it belongs to another base backup")
            require(0 <= header["plain_size"] <= MAX_PLAIN, "its size is impossible")
            kind = "base" if name.startswith("base/") else "wal"
            if header["cipher"] != "none":
                data = decrypt(header, raw, data, self.data_key(header["key"]))
            elif self.policy[kind] and not name.startswith("keys/"):
                raise Damaged("it is not encrypted, and this repository encrypts such objects")
            plain = decompress(header["codec"], data, header["plain_size"])
            require(len(plain) == header["plain_size"], "its size is not what its header says")
        except Damaged as error:
            raise Damaged(f"{name}: {error}") from None
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  # the libraries have many ways to say that bytes are wrong
            raise Damaged(f"{name}: {type(error).__name__} {error}") from None
        return plain, stored[-32:].hex()

    def signed(self, name, key):
        """The JSON of a ring or data key, None if it is forged; `key` is asked for the MAC key and given the JSON."""
        line, mac, empty = self.read(name)[0].split(b"\n")
        members = strict_json(line)
        require(not empty and members["system_id"] == self.system_id, f"{name} is of another cluster")
        right = hmac.digest(key(members), line, "sha256").hex().encode()
        return members if hmac.compare_digest(right, mac) else None

    def open_ring(self, name, passphrase, identity):
        def unwrap(members):
            wraps = [wrap for wrap in members["wraps"] if isinstance(wrap, dict)]
            for wrap in (w for w in wraps if identity and w.get("kind") == "recipient"):
                try:
                    private = hpke_open(bytes.fromhex(wrap["sealed"]), identity, context("recipient", self.system_id))
                except InvalidTag:
                    continue
                self.private = private
                return hkdf(self.private, 32, context("ring"))
            if identity:
                raise SystemExit(f"rescue: the private key opens no wrap of {name}")
            phrase = unicodedata.normalize("NFC", passphrase()).encode()
            for wrap in (w for w in wraps if w.get("kind") == "scrypt"):
                require(wrap["n"] <= 1 << 18 and wrap["r"] == 8 and wrap["p"] <= 16, "unreasonable scrypt parameters")
                scrypt = Scrypt(bytes.fromhex(wrap["salt"]), 32, wrap["n"], wrap["r"], wrap["p"])
                key = scrypt.derive(phrase)
                try:
                    sealed, aad = bytes.fromhex(wrap["sealed"]), context("passphrase", self.system_id)
                    self.private = AESGCM(key).decrypt(bytes(12), sealed, aad)
                except InvalidTag:
                    continue
                return hkdf(self.private, 32, context("ring"))
            raise SystemExit(f"rescue: the passphrase does not open {name}")

        members = self.signed(name, unwrap)
        require(members and f"keys/ring-{members['ring']:08d}" == name, f"{name} is forged, or another ring")
        inner = hpke_open(bytes.fromhex(members["sealed"]), self.private, context("ring", self.system_id))
        inner = strict_json(inner)
        self.policy = inner["policy"]
        # A rotated repository lists what its former keys may still open.
        self.makers = [(self.private, bytes.fromhex(inner["writer_secret"]), None)]
        for old in inner["former"]:
            keys = (bytes.fromhex(old["private_key"]), bytes.fromhex(old["writer_secret"]))
            self.makers.append((*keys, old["data_keys"]))

    def data_key(self, key_id):
        require(re.fullmatch("[0-9a-f]{32}", key_id), "the id of its data key is impossible")
        name = f"keys/data-{key_id}"
        require(self.makers, "it is encrypted, and there is no key ring")
        for private, secret, only in self.makers:
            if only is not None and key_id not in only:
                continue
            members = self.signed(name, lambda _, secret=secret: hkdf(secret, 32, context("data key")))
            if members:
                require(members["id"] == key_id, f"{name} is another key")
                return hpke_open(bytes.fromhex(members["sealed"]), private, context("data key", self.system_id, key_id))
        raise Damaged(f"{name} is forged")


def list_all(repository):
    for name in repository.names():
        print(f"{(repository.folder / name).stat().st_size:>12}  {name}")
        if name.endswith("/backup_info"):
            info = strict_json(repository.read(name, None)[0])
            print(
                f"{'':>12}  ^ {info['kind']} backup from {info['start_lsn']} to {info['stop_lsn']}, {info['stopped']}"
            )
            if info.get("parent"):
                print(f"{'':>12}    builds on {info['parent']}, and is of no use without it")
            for archive in info["archives"]:
                print(f"{'':>12}    archive {archive['name']}: {archive['size']} bytes of tar")


def join_archive(repository, backup, archive, out):
    info = strict_json(repository.read(f"base/{backup}/backup_info", None)[0])
    chosen = [a for a in info["archives"] if a["name"] == archive]
    require(chosen, f"{backup} has no archive {archive}; it has {', '.join(a['name'] for a in info['archives'])}")
    size = 0
    with Path(out).open("xb") as tar:
        for number, digest in enumerate(chosen[0]["parts"], 1):
            name = f"base/{backup}/data/{archive}/{number:08d}"
            plain, found = repository.read(name, info["id"])
            require(found == digest, f"{name} is not the part that backup_info names")
            size += tar.write(plain)
    require(size == chosen[0]["size"], f"{archive} has {size} bytes, not {chosen[0]['size']}")


def extract_wal(repository, out):
    out.mkdir(parents=True, exist_ok=True)
    for name in repository.names("wal/"):
        (out / name.rsplit("/", 1)[1]).write_bytes(repository.read(name)[0])
    tails = {}
    for name in repository.names("tail/"):
        match = re.fullmatch(r"tail/([0-9A-F]{24})/([0-9a-f]{8})-([0-9a-f]{8})-([0-9a-f]{8})", name)
        if match and not (out / match[1]).exists():
            epoch, start, end = (int(number, 16) for number in match.groups()[1:])
            tails.setdefault(match[1], []).append((epoch, end, start, name))
    about = repository.folder / "repository.json"
    size = strict_json(about.read_bytes())["segment_size"] if about.exists() else 16 << 20
    for segment, found in tails.items():
        joined = join_tails(repository, found)
        print(f"{segment}: {len(joined)} bytes from tails", file=sys.stderr)
        if joined:
            (out / segment).write_bytes(joined.ljust(size, b"\0"))


def join_tails(repository, found):
    """The bytes of a segment, from its first one on: a tail says by a hash what must come before it."""
    joined = bytearray()
    while fitting := [tail for tail in found if tail[2] <= len(joined) < tail[1]]:
        tail = max(fitting)  # the newest writer's, and of those the longest
        found.remove(tail)
        _, end, start, name = tail
        try:
            plain = repository.read(name)[0]
            require(len(plain) == 32 + end - start, f"{name}: its name says another length")
            there = len(joined) - start
            right = plain[:32] == hashlib.sha256(joined[:start]).digest() and plain[32 : 32 + there] == joined[start:]
            require(right, f"{name} does not go on from what was joined up to offset {len(joined)}")
            joined += plain[32 + there :]
        except Damaged as error:
            print(f"passed over: {error}", file=sys.stderr)
    if lost := [name for _, end, _, name in found if end > len(joined)]:
        print(f"{lost[0]} and {len(lost) - 1} others lie behind a hole at offset {len(joined)}", file=sys.stderr)
    return joined


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("verb", choices=("list", "get", "archive", "wal"))
    parser.add_argument("rest", nargs="*", metavar="ARGUMENT", help="see above")
    parser.add_argument("--passphrase-file", type=Path)
    parser.add_argument("--identity-file", type=Path)
    args = parser.parse_args()
    if len(args.rest) != {"list": 0, "get": 2, "archive": 3, "wal": 1}[args.verb]:
        parser.error(f"wrong number of arguments for {args.verb}")

    def passphrase():
        if args.passphrase_file:
            return args.passphrase_file.read_text("utf-8").rstrip("\r\n")
        return os.environ.get("BACKUP_ENCRYPTION_PASSWORD") or getpass.getpass("passphrase: ")

    try:
        identity = read_identity(args.identity_file) if args.identity_file else None
        repository = Repository(args.folder.resolve(), passphrase, identity)
        if args.verb == "list":
            list_all(repository)
        elif args.verb == "get":
            with Path(args.rest[1]).open("xb") as out:
                out.write(repository.read(args.rest[0], None)[0])
        elif args.verb == "archive":
            join_archive(repository, *args.rest)
        else:
            extract_wal(repository, Path(args.rest[0]))
    except (Damaged, OSError) as error:
        sys.exit(f"rescue: {error}")


if __name__ == "__main__":
    main()
