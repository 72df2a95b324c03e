"""Which training samples did what to a model, and which are worth forgetting."""

from fisher_forget.influence.influence import Influence
from fisher_forget.influence.suggest import Suggestions, suggest

__all__ = ["Influence", "Suggestions", "suggest"]
