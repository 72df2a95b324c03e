"""Ed25519 keys (RFC 8032) that sign a ledger, in PEM files; needs the extra `ledger`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisher_forget._util.files import write_file
from fisher_forget.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )


def new_keys(private: str | Path) -> Path:
    """Make a key pair: the private key at that path, for its owner's eyes alone; the public beside.

    Returns:
        Where the public key is: the same name with the ending `.pub`.

    Raises:
        StorageError: If there is such a file already, or it cannot be written.
        ConfigError: If `cryptography` is not installed.
    """
    path = Path(private)
    public = path.with_name(path.name + ".pub")
    for file in (path, public):
        if file.exists():
            fix = "Name another file: whoever has the old public key could verify nothing new."
            raise StorageError(f"{file}, which exists", "the name of a new file", fix)
    serialization, ed25519 = _library()
    key = ed25519.Ed25519PrivateKey.generate()
    own = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    known = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    write_file(path, lambda file: _secret(file, own))
    write_file(public, lambda file: file.write_bytes(known))
    return public


def read_private(path: str | Path) -> Ed25519PrivateKey:
    """The private key of a PEM file.

    Raises:
        StorageError: If it is missing, or no Ed25519 key without a password.
        ConfigError: If `cryptography` is not installed.
    """
    serialization, ed25519 = _library()
    key: Ed25519PrivateKey = _read(
        path, lambda pem: serialization.load_pem_private_key(pem, None), "private", ed25519
    )
    return key


def read_public(path: str | Path) -> Ed25519PublicKey:
    """The public key of a PEM file.

    Raises:
        StorageError: If it is missing, or no Ed25519 key.
        ConfigError: If `cryptography` is not installed.
    """
    serialization, ed25519 = _library()
    key: Ed25519PublicKey = _read(path, serialization.load_pem_public_key, "public", ed25519)
    return key


def key_fingerprint(public_key: str | Path | Ed25519PublicKey) -> str:
    """SHA-256 of a public key in DER (RFC 8410), by which two people see that theirs is the same:
    64 hexadecimal digits. `openssl pkey -pubin -in FILE -outform DER | sha256sum` says it, too.

    Raises:
        StorageError: If it is missing, or no Ed25519 key.
        ConfigError: If `cryptography` is not installed.
    """
    key = read_public(public_key) if isinstance(public_key, (str, Path)) else public_key
    serialization, _ = _library()
    content = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(content).hexdigest()


def sign(key: Ed25519PrivateKey, hash_: str) -> str:
    """The signature of an entry's hash: 128 hexadecimal digits."""
    return str(key.sign(bytes.fromhex(hash_)).hex())


def signed(key: Ed25519PublicKey, hash_: str, signature: str) -> bool:
    """Whether this signature of an entry's hash was made with the private key."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(bytes.fromhex(signature), bytes.fromhex(hash_))
    except (InvalidSignature, ValueError):
        return False
    return True


def _read(path: str | Path, load: Any, which: str, ed25519: Any) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    kind = getattr(ed25519, f"Ed25519{which.capitalize()}Key")
    expected = f"a PEM file with the {which} key of a pair of new_keys()"
    fix = "Name the file that ends in .pub." if which == "public" else "Check the path."
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        got = f"{path}: {getattr(error, 'strerror', None) or 'it cannot be read'}"
        raise StorageError(got, expected, fix) from error
    try:
        key = load(content)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StorageError(f"{path}, which holds {_held(content, which)}", expected, fix) from error
    if not isinstance(key, kind):
        raise StorageError(f"{path} with a key of another kind", expected, fix)
    return key


def _held(content: bytes, which: str) -> str:
    """What is in a file that is not the key that was looked for."""
    if b"ENCRYPTED" in content:
        return "a key with a password"
    for kind in ("private", "public"):
        if f" {kind.upper()} KEY-----".encode() in content:
            return f"a {kind} key" + (", damaged" if kind == which else "")
    return "no key"


def _secret(file: Path, content: bytes) -> None:
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(content)


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        got, expected = "a key without the package cryptography", "the extra `ledger`"
        fix = "Install it: pip install 'fisher-forget[ledger]'."
        raise ConfigError(got, expected, fix) from error
    return serialization, ed25519
