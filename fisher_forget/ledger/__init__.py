"""Who asked for what to be forgotten, and what became of it; altering the record shows."""

from fisher_forget.ledger.entries import Entry, Event
from fisher_forget.ledger.keys import new_keys, read_private, read_public
from fisher_forget.ledger.ledger import Ledger
from fisher_forget.ledger.requests import RequestLog
from fisher_forget.ledger.states import Request
from fisher_forget.ledger.verify import verify

__all__ = [
    "Entry",
    "Event",
    "Ledger",
    "Request",
    "RequestLog",
    "new_keys",
    "read_private",
    "read_public",
    "verify",
]
