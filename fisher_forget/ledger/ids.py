"""What names a sample or a person in a ledger, as text and bytes that mean one thing each."""

from __future__ import annotations

from contextlib import suppress

from fisher_forget.errors import ConfigError
from fisher_forget.ledger.entries import canonical


def text_of(who: object) -> str:
    """Words that can be written.

    Raises:
        ConfigError: If they cannot.
    """
    text = str(who)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text {text!r}", "text that can be written", "Correct it."
        ) from error
    return text


def id_of(sample: object) -> bytes:
    """42 and "42" are two ids; 42 of NumPy or torch is 42."""
    if type(sample) is int and abs(sample) < 2**63:
        return b"%d" % sample
    if getattr(sample, "size", None) == 1 or callable(getattr(sample, "numel", None)):
        with suppress(ValueError, RuntimeError):
            sample = sample.item()  # type: ignore[attr-defined]
    if isinstance(sample, int) and not abs(sample) < 2**63:
        raise ConfigError("an id of more than 63 bits", "a smaller one, or a text", "Correct it.")
    if isinstance(sample, bool) or not isinstance(sample, (int, str)):
        got = f"an id of type {type(sample).__name__}"
        raise ConfigError(got, "a whole number or a text", "Pass what names the sample.")
    return canonical(sample)
