"""What in a folder tree still holds forgotten samples, and its removal."""

from fisher_forget.purge.artefacts import Artefact, artefacts, listed
from fisher_forget.purge.removal import Purged, purge

__all__ = ["Artefact", "Purged", "artefacts", "listed", "purge"]
