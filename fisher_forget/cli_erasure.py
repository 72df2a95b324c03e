"""The commands that show what was erased, and erase: ledger, artefacts and purge."""

from __future__ import annotations

import argparse
from typing import NoReturn

import shtab

from fisher_forget._util.files import fingerprint, load_tensors
from fisher_forget.errors import ConfigError, StorageError
from fisher_forget.ledger import Ledger, Reading, examine, key_fingerprint, new_keys
from fisher_forget.purge import artefacts, listed, purge
from fisher_forget.report.pages.ledger import (
    check_ledger,
    ledger_table,
    models_on_record,
    summary,
    write_ledger,
)


class Found(StorageError):
    """A command did what it was asked to, and what it looked at is not as it should be."""


def add_ledger(command: argparse.ArgumentParser) -> None:
    """Its options."""
    command.add_argument("folder", help="folder of the ledger").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    key = "check all signatures with this file"
    command.add_argument("--public-key", metavar="FILE", help=key).complete = shtab.FILE  # type: ignore[attr-defined]
    command.add_argument("--known", metavar="SEAL", help="seal of an entry that must be there")
    command.add_argument("--export", metavar="FOLDER", help="write a page, a table and JSON there")
    command.add_argument("--serve", metavar="REQUEST", help="record that who asked was told")
    told = "how, or what; it is recorded, with --serve"
    command.add_argument("--told", metavar="TEXT", help=told)
    although = "why it is served although its own check says no, with --serve"
    command.add_argument("--although", metavar="REASON", help=although)
    withdrawn = "record that it is not carried out, with --reason"
    command.add_argument("--withdraw", metavar="REQUEST", help=withdrawn)
    command.add_argument("--reason", metavar="TEXT", help="why not, with --withdraw")
    model = "say which model on record is in this safetensors file"
    command.add_argument("--model", metavar="FILE", help=model).complete = shtab.FILE  # type: ignore[attr-defined]
    signs = "private key of a signed ledger, with --serve or --withdraw"
    command.add_argument("--key", metavar="FILE", help=signs).complete = shtab.FILE  # type: ignore[attr-defined]
    command.add_argument("--new-key", metavar="FILE", help="make a key pair first")


def show_ledger(given: argparse.Namespace) -> None:
    """Record what is to be recorded, write what is to be written, check, and print.

    Raises:
        Found: If the ledger was altered, or is not signed with the key given, or does not know the
            model.
        FisherForgetError: If something given is wrong.
    """
    if given.new_key:
        print(f"Private key: {given.new_key}; public key: {new_keys(given.new_key)}")
    check_ledger(given.folder)
    _record(given)
    if given.export:
        written = write_ledger(given.folder, given.export, given.public_key, known=given.known)
        print("\n".join(map(str, written)))
    ledger = examine(given.folder, given.public_key, known=given.known)
    if ledger.findings:
        _refuse(ledger, given.public_key)
    if ledger.requests:
        print(ledger_table(ledger).to_string(index=False))
    checked = "signatures not checked: no --public-key"
    if given.public_key:
        checked = f"signatures checked, of the key {key_fingerprint(given.public_key)}"
    print(f"{summary(ledger)} The record is intact ({checked}).")
    print(f"Seal of the last entry: {ledger.seal} (keep it elsewhere, for --known)")
    if given.model:
        _tell_model(ledger, given.model)


def _record(given: argparse.Namespace) -> None:
    """Write what --serve and --withdraw say."""
    for option, goes_with in (
        ("although", "serve"),
        ("told", "serve"),
        ("withdraw", "reason"),
        ("reason", "withdraw"),
    ):
        if getattr(given, option) and not getattr(given, goes_with):
            fix = f"Add --{goes_with}, or leave --{option} out."
            raise ConfigError(f"--{option} without --{goes_with}", "both, or neither", fix)
    if given.serve or given.withdraw:
        ledger = Ledger(given.folder, key=given.key)
        if given.serve:
            told = {"told": given.told} if given.told else {}
            ledger.serve(given.serve, although=given.although or "", **told)
        if given.withdraw:
            ledger.withdraw(given.withdraw, given.reason)


def _refuse(ledger: Reading, public_key: str | None) -> NoReturn:
    """Say what is wrong with a ledger.

    Raises:
        Found: Always.
    """
    if public_key and not ledger.wrong:
        got = f"a ledger that is not signed with this key: {ledger.unproven.rstrip('.')}"
        mark = key_fingerprint(public_key)
        fix = f"Ask the owner of the ledger for the fingerprint of its key: that of this is {mark}."
        raise Found(got, "one that is", fix)
    got = "\n  ".join(["a ledger that is not as it was written:", *ledger.findings])
    fix = "Find out what happened, and restore it from a copy."
    raise Found(got.rstrip("."), "one that is", fix)


def _tell_model(ledger: Reading, path: str) -> None:
    """Say which model of a ledger is in a file.

    Raises:
        Found: If none is, or it may hold samples of somebody who asked.
    """
    mark = fingerprint(load_tensors(path, foreign=True)[0])
    said, clean = models_on_record(ledger, mark)
    if not said:
        fix = (
            "Find out which model it is; it must be saved whole, with the names of its state_dict."
        )
        raise Found(f"{path}, a model with the fingerprint {mark}", "a model on record", fix)
    print(f"{path} has the fingerprint {mark}. {' '.join(said)}")
    if not clean:
        fix = "Take it out of use; the last model on record is the one without all of them."
        raise Found(f"{path}, which may hold samples asked for", "a model without them", fix)


def add_artefacts(command: argparse.ArgumentParser) -> None:
    """Its options."""
    what = "of a run, a prepared model, SISA, or above several"
    command.add_argument("folder", help=what).complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    names = (
        "a run's forget set that is to be gone; may be repeated; by default those that somebody "
        "asked for, or all where nobody did"
    )
    command.add_argument("--set", metavar="NAME", action="append", default=[], help=names)


def show_artefacts(given: argparse.Namespace) -> None:
    """Print what still holds forgotten samples."""
    print(listed(artefacts(given.folder, given.set)))


def add_purge(command: argparse.ArgumentParser) -> None:
    """Its options."""
    add_artefacts(command)
    command.add_argument("--yes", action="store_true", help="do it; otherwise it is only listed")
    salts = "remove the salts of runs, too: nobody can tell then who was forgotten"
    command.add_argument("--salt", action="store_true", help=salts)
    signs = "private key of a signed ledger"
    command.add_argument("--key", metavar="FILE", help=signs).complete = shtab.FILE  # type: ignore[attr-defined]


def carry_out_purge(given: argparse.Namespace) -> None:
    """Remove it, and print what was done.

    Raises:
        ConfigError: Without --yes.
        Found: If something is left, or not known.
    """
    if not given.yes:
        show_artefacts(given)
        raise ConfigError("purge without --yes", "it, since removed is removed", "Add --yes.")
    purged = purge(given.folder, given.set, salt=given.salt, key=given.key)
    print(purged)
    if not purged.clean:
        got = f"{len(purged.left)} files left and {len(purged.unknown)} unknown, listed above"
        raise Found(got, "none", "Do what stands behind each.")
