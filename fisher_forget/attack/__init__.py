"""Attacks on a pair of releases: what does the change from one to the other tell of who was
deleted?"""

from fisher_forget.attack.after_release import (
    AfterRelease,
    FineTuning,
    Relearning,
    StillKnown,
)
from fisher_forget.attack.audit import audit
from fisher_forget.attack.chosen_requests import ChosenRequests, Damage
from fisher_forget.attack.findings import Audit, Finding
from fisher_forget.attack.inference import STATISTICS, DeletionInference
from fisher_forget.attack.membership import MembershipInference
from fisher_forget.attack.pairs import Pair
from fisher_forget.attack.quantisation import Quantisation, quantised
from fisher_forget.attack.reconstruct import ChangedAnswers, NewtonInversion, Reconstruction
from fisher_forget.attack.release import Model, Observer, Release
from fisher_forget.attack.shadow import FEATURES, ShadowInference
from fisher_forget.attack.shadow_models import shadow_pairs
from fisher_forget.attack.slow_down import SlowDown, SlowDownPoisoning

__all__ = [
    "FEATURES",
    "STATISTICS",
    "AfterRelease",
    "Audit",
    "ChangedAnswers",
    "ChosenRequests",
    "Damage",
    "DeletionInference",
    "Finding",
    "FineTuning",
    "MembershipInference",
    "Model",
    "NewtonInversion",
    "Observer",
    "Pair",
    "Quantisation",
    "Reconstruction",
    "Relearning",
    "Release",
    "ShadowInference",
    "SlowDown",
    "SlowDownPoisoning",
    "StillKnown",
    "audit",
    "quantised",
    "shadow_pairs",
]
