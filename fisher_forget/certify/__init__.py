"""Models that forget with a certificate."""

from fisher_forget.certify.gaussian import delta_of, epsilon_of, mu_of
from fisher_forget.certify.removal import CertifiedLogistic, Removal

__all__ = ["CertifiedLogistic", "Removal", "delta_of", "epsilon_of", "mu_of"]
