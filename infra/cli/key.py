"""``walship key``: who may read the repository. What the changes are is in ``infra.key_changes``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click

from infra import key_changes
from infra.at_hand import AtHand, look_at_hand, refuse_placeholder, weakness
from infra.cli.verb import asynchronous, cluster_option, emit, json_option, say, settings
from infra.key_changes import Changed, Current
from infra.key_objects import openers
from infra.key_report import look_at_keys
from infra.recipients import make_identity, parse_recipient, read_secret, show_recipient, write_secret
from infra.records import recording
from infra.repository import find
from infra.ring import ring_name
from infra.settings import load
from infra.storage.rooted import Rooted
from infra.wiring import Site, open_destinations, open_site
from infra.writer_file import encode_writer
from pipeline.errors import ConfigError, ObjectConflict

_FILE = click.Path(path_type=Path)
#: Said after every change but one that replaces the repository's key.
_STAYS = (
    "the rings before stay in the bucket: who had a secret that opened one, and can read the bucket, still opens it,"
    " and reads all that is stored and will be. If a passphrase or a private key has leaked, replace the"
    " repository's key: walship key rotate --new-repository-key"
)
#: Said once another passphrase stands in the place of the one at hand.
_SET_IT = "set the new passphrase wherever the old one is set, before anything is started again there"
#: Said once the repository has another key.
_REPLACED = (
    "restart all services: what one of them writes until then can be read with the former key as well as with the new",
    (
        "what was stored before stays readable for whoever has the former key and can read the bucket, and so do the"
        " rings before. To end that, take a full backup, and let expire remove the older ones and their WAL"
    ),
    "writer files, and standbys that were restored to follow, are of the former key: export and restore them anew",
)


@click.group("key")
def command() -> None:
    """Who may read the repository: passphrases, recipients with key pairs, and hosts that only write.

    Each change makes a new key ring, and touches no data. What is to open it is proved before it is stored.
    """


@command.command("list", short_help="The key rings, who can open them, and where they are.")
@cluster_option
@json_option
@asynchronous
async def list_(cluster: str, as_json: bool) -> None:
    """The key rings, who can open the newest one, and whether each destination has it.

    Works with nothing at hand as well: it tells who could open the ring.

    \b
    Examples:
      walship key list
      walship key list --json
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    wanted = load(keyless=True)
    async with open_destinations(wanted) as destinations:
        facts = await find(destinations, cluster)
        stores = [Rooted(destination.root, facts.system_id) for destination in destinations]
        report = await look_at_keys(stores, facts.system_id, look_at_hand(wanted, _warn))
    emit(report.result(), report.lines(), as_json=as_json)


@command.command("add", short_help="Let one more passphrase or recipient read.")
@click.option("--passphrase-file", type=_FILE, help="File that holds the new passphrase and nothing else.")
@click.option("--recipient", metavar="PUBLICKEY", help="Public key of a recipient: walship-recipient-1-…")
@click.option("--label", default="", help="The recipient's name, for `walship key list`. Everybody can read it.")
@cluster_option
@json_option
@asynchronous
async def add(passphrase_file: Path | None, recipient: str | None, label: str, cluster: str, as_json: bool) -> None:
    """Let one more passphrase, or one more recipient, open the repository: all of it, also what is stored already.

    \b
    Examples:
      walship key add --passphrase-file new.txt
      walship key add --recipient walship-recipient-1-… --label 'the safe'
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    passphrase, public = _one_of(passphrase_file, recipient)
    if label and not public:
        raise ConfigError("--label is for a recipient, and --passphrase-file was given")
    if passphrase_file is not None:
        _check_new(passphrase, passphrase_file)

    async def change(current: Current, site: Site) -> Changed:
        return await key_changes.add(current, site.clock, passphrase=passphrase, recipient=public, label=label)

    words = ["add", f"--recipient {recipient}" if public else "--passphrase-file"]
    await _change(change, words, cluster, ["nothing was encrypted anew"], as_json=as_json)


@command.command("remove", short_help="Take a passphrase or a recipient away.")
@click.option("--passphrase-file", type=_FILE, help="File that holds the passphrase to take away.")
@click.option("--recipient", metavar="PUBLICKEY", help="Public key of the recipient to take away.")
@cluster_option
@json_option
@asynchronous
async def remove(passphrase_file: Path | None, recipient: str | None, cluster: str, as_json: bool) -> None:
    """Let a passphrase, or a recipient, open no later key ring. What remains is proved to open it first.

    That is for secrets that nobody has any more. Whoever still has one, and can read the bucket, opens the ring before;
    see `walship key rotate --new-repository-key`.

    \b
    Examples:
      walship key remove --passphrase-file old.txt
      walship key remove --recipient walship-recipient-1-…
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    passphrase, public = _one_of(passphrase_file, recipient)

    async def change(current: Current, site: Site) -> Changed:
        return await key_changes.remove(current, site.clock, passphrase=passphrase, recipient=public)

    words = ["remove", f"--recipient {recipient}" if public else "--passphrase-file"]
    await _change(change, words, cluster, [_STAYS], as_json=as_json)


@command.command("rotate", short_help="A new passphrase; or a new repository key, after a leak.")
@click.option("--passphrase-file", type=_FILE, multiple=True, help="File that holds the new passphrase.")
@click.option("--new-repository-key", is_flag=True, help="Also a new key pair and writer secret for what comes.")
@click.option(
    "--without", multiple=True, metavar="PUBLICKEY", help="With that: leave this recipient out, whose key has leaked."
)
@cluster_option
@json_option
@asynchronous
async def rotate(
    passphrase_file: tuple[Path, ...], new_repository_key: bool, without: tuple[str, ...], cluster: str, as_json: bool
) -> None:
    """A new passphrase in the place of the one at hand. Nothing is encrypted anew, neither backups nor WAL.

    With --new-repository-key what is written from now on cannot be read by whoever has the former passphrases, private
    keys or writer files. What was stored before can be, as long as they can read the bucket. The new ring opens with
    the passphrases given (several --passphrase-file), or with the one at hand if none is given, and with all recipients
    but those --without. Restart every service then, and export writer files anew.

    \b
    Examples:
      walship key rotate --passphrase-file new.txt
      walship key rotate --new-repository-key --passphrase-file new.txt --without walship-recipient-1-…
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    passphrases = [_passphrase(path) for path in passphrase_file]
    for passphrase, path in zip(passphrases, passphrase_file, strict=True):
        _check_new(passphrase, path)
    left_out = [parse_recipient(text) for text in without]
    if not new_repository_key and (len(passphrases) != 1 or left_out):
        raise ConfigError(
            "rotate puts one new passphrase in the place of the one at hand: give it with one --passphrase-file",
            hint="--without and several passphrases are for --new-repository-key; see also walship key add and remove",
        )

    async def change(current: Current, site: Site) -> Changed:
        if not new_repository_key:
            return await key_changes.rotate(current, site.clock, passphrases[0])
        return await _replace_key(current, site, passphrases, left_out)

    said = list(_REPLACED) if new_repository_key else [_SET_IT, _STAYS]
    if new_repository_key and not passphrases:
        said.insert(
            0, "the passphrase at hand opens the new ring too, if there is one: has it leaked? --passphrase-file"
        )
    await _change(change, ["rotate", *(["--new-repository-key"] if new_repository_key else [])], cluster, said,
                  as_json=as_json)  # fmt: skip


async def _replace_key(current: Current, site: Site, passphrases: list[str], left_out: list[bytes]) -> Changed:
    known = current.front.recipients
    for public in left_out:
        if public not in known:
            raise ConfigError(f"{show_recipient(public)} is no recipient of {current.name}")
    recipients = {public: label for public, label in known.items() if public not in left_out}
    given = passphrases or await _passphrase_at_hand(current)
    if current.front.passphrases > len(given):
        say(
            f"{current.name} has {current.front.passphrases} passphrases, and {len(given)} will open the new ring: one"
            " that is not given cannot be carried over"
        )
    if current.front.strange:
        say(f"what opens {current.name} and only a newer walship knows is not carried over")
    await _store_record_key(current, site)
    return await key_changes.replace_key(current, site.clock, given, recipients, say)


async def _passphrase_at_hand(current: Current) -> list[str]:
    """It stays, if it is one of the repository; a mistyped one must not become one. Raises ConfigError."""
    passphrase = current.at_hand.passphrase
    if passphrase and not await key_changes.opens(current, passphrase):
        raise ConfigError(
            f"BACKUP_ENCRYPTION_PASSWORD does not open {current.name}, only WALSHIP_IDENTITY_FILE does",
            hint="unset it, or give the passphrases of the new ring with --passphrase-file",
        )
    return [passphrase] if passphrase else []


async def _store_record_key(current: Current, site: Site) -> None:
    """The record of this is written under a data key of the former ring, which has to be there to be listed."""
    site.keys.write_under_known(site.clock.now())
    if site.keys.key_object is not None:
        for store in current.stores:
            with suppress(ObjectConflict):
                await store.put(*site.keys.key_object)


@command.command("accept", short_help="Take a data key for ours that key list names.")
@click.argument("data_key", metavar="DATA_KEY_ID")
@cluster_option
@json_option
@asynchronous
async def accept(data_key: str, cluster: str, as_json: bool) -> None:
    """Take a data key for ours that was made just as the repository's key was replaced, and is not listed.

    `walship key list` names such keys. Only if you know that a service or a command of yours began to write at that
    moment: whoever has the former writer secret could have made it, too.
    """

    async def change(current: Current, site: Site) -> Changed:
        return await key_changes.accept(current, site.clock, data_key)

    await _change(change, ["accept", data_key], cluster, [], as_json=as_json)


@command.command("new-identity", short_help="Make a recipient's key pair.")
@click.argument("path", type=_FILE, metavar="FILE")
@json_option
def new_identity(path: Path, as_json: bool) -> None:
    """Make a recipient's key pair: the private key into FILE (mode 0600), the public one is printed.

    Needs no repository: run it where the private key is to stay, never on the database host.

    Example: walship key new-identity restore.key
    """
    public = show_recipient(make_identity(path, datetime.now(UTC)))
    say(f"{path} holds the private key: keep a copy of it somewhere else. The public key is for walship key add")
    emit({"file": str(path), "recipient": public}, [public], as_json=as_json)


@command.command("export-writer", short_help="A file for a host that writes and does not read.")
@click.argument("path", type=_FILE, metavar="FILE")
@cluster_option
@json_option
@asynchronous
async def export_writer(path: Path, cluster: str, as_json: bool) -> None:
    """Write FILE (mode 0600) with what a host needs that is to write to the repository, and not to read it.

    There, WALSHIP_WRITER_FILE names it, and BACKUP_ENCRYPTION_PASSWORD is not set. With it nothing can be opened; but
    whoever has it, and may write to the bucket, can put objects there that readers take for yours.

    Example: walship key export-writer writer.json
    """
    async with _opened(cluster) as opened, recording(opened.site, "key", ["export-writer"], tell=say):
        write_secret(path, encode_writer(opened.current.ring.writer))
        current = opened.current
    result = {"file": str(path), "system_id": current.ring.system_id, "ring": current.ring.number}
    emit(
        result,
        [f"{path} lets a host write to cluster {current.ring.system_id} under {current.name}, and read nothing"],
        as_json=as_json,
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    site: Site
    current: Current


@asynccontextmanager
async def _opened(cluster: str) -> AsyncIterator[_Opened]:
    """The repository, and its newest ring opened with what is at hand."""
    wanted = settings()
    at_hand = look_at_hand(wanted, _warn)
    async with open_site(wanted, cluster=cluster) as site:
        site.keys.need_reading("a change of the keys")
        yield _Opened(site, await _current(site, at_hand))


async def _current(site: Site, at_hand: AtHand) -> Current:
    return await key_changes.open_current(site.stores, site.facts.system_id, at_hand)


async def _change(
    change: Callable[[Current, Site], Coroutine[None, None, Changed]],
    words: Sequence[str],
    cluster: str,
    said: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Do it, leave a record of it, and say what was done and what was not."""
    async with _opened(cluster) as opened, recording(opened.site, "key", words, tell=say) as entry:
        done = await change(opened.current, opened.site)
        entry.summary.update({"ring": done.number, "stored": list(done.stored), "away": sorted(done.away)})
    lines = [f"{ring_name(done.number)} opens with {openers(done.front)}; it is stored at {', '.join(done.stored)}"]
    for name, fact in done.away.items():
        lines.append(f"NOT at {name}: {fact}. There the former ring counts until `walship run` has copied the new one")
    result = {"ring": done.number, "stored": list(done.stored), "away": done.away, "remarks": list(said)}
    emit(result, [*lines, *said], as_json=as_json)


def _one_of(passphrase_file: Path | None, recipient: str | None) -> tuple[str, bytes]:
    """The passphrase or the public key that was given. Raises ConfigError unless it is one of the two."""
    if (passphrase_file is None) == (recipient is None):
        raise ConfigError("give one of --passphrase-file and --recipient")
    if passphrase_file is not None:
        return _passphrase(passphrase_file), b""
    return "", parse_recipient(recipient or "")


def _passphrase(path: Path) -> str:
    """Content of the file. Raises ConfigError if it is empty."""
    passphrase = read_secret(path, "--passphrase-file", _warn).rstrip("\r\n")
    if not passphrase.strip():
        raise ConfigError(f"--passphrase-file: {path} holds no passphrase: it is empty")
    return passphrase


def _check_new(passphrase: str, path: Path) -> None:
    """Of one that shall open the repository. Raises ConfigError for a placeholder; a short one is warned of."""
    refuse_placeholder(passphrase, f"the passphrase in {path}")
    if weak := weakness(passphrase):
        _warn(*weak)


def _warn(fact: str, hint: str) -> None:
    say(f"warning: {fact}\nhint: {hint}")
