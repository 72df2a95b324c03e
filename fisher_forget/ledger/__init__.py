"""Who asked for what to be forgotten, and what became of it; altering the record shows."""

from fisher_forget.ledger.entries import Entry, Event
from fisher_forget.ledger.evidence import evidence, model_fingerprint
from fisher_forget.ledger.keys import key_fingerprint, new_keys, read_private, read_public
from fisher_forget.ledger.ledger import Ledger
from fisher_forget.ledger.requests import RequestLog
from fisher_forget.ledger.states import Request
from fisher_forget.ledger.verify import Reading, examine, verify

__all__ = [
    "Entry",
    "Event",
    "Ledger",
    "Reading",
    "Request",
    "RequestLog",
    "evidence",
    "examine",
    "key_fingerprint",
    "model_fingerprint",
    "new_keys",
    "read_private",
    "read_public",
    "verify",
]
