"""Overlearning: what a model knows that its task does not need, and how it forgets it."""

from fisher_forget.overlearn.decensor import Decensored, Decensoring
from fisher_forget.overlearn.forget import AttributeForgotten, forget_attribute, leace
from fisher_forget.overlearn.probe import LayerProbe, Probe, Probed
from fisher_forget.overlearn.repurpose import Repurposed, Repurposing

__all__ = [
    "AttributeForgotten",
    "Decensored",
    "Decensoring",
    "LayerProbe",
    "Probe",
    "Probed",
    "Repurposed",
    "Repurposing",
    "forget_attribute",
    "leace",
]
