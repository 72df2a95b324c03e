"""Which layer has which rule: one file a family of layers, one line a layer here."""

from __future__ import annotations

from torch import nn

from fisher_forget.curvature.rules.base import Rule
from fisher_forget.curvature.rules.convolution import ConvRule
from fisher_forget.curvature.rules.embedding import EmbeddingRule
from fisher_forget.curvature.rules.linear import LinearRule, TransposedLinearRule
from fisher_forget.curvature.rules.normalisation import (
    BatchNormRule,
    GroupNormRule,
    LanguageModelNormRule,
    LayerNormRule,
    RMSNormRule,
)

RULES: dict[type[nn.Module] | str, type[Rule]] = {
    nn.Linear: LinearRule,
    "transformers.pytorch_utils.Conv1D": TransposedLinearRule,
    nn.Conv1d: ConvRule,
    nn.Conv2d: ConvRule,
    nn.Conv3d: ConvRule,
    nn.Embedding: EmbeddingRule,
    nn.LayerNorm: LayerNormRule,
    nn.RMSNorm: RMSNormRule,
    "RMSNorm": LanguageModelNormRule,  # each model of transformers has a class of its own
    "T5LayerNorm": LanguageModelNormRule,
    nn.GroupNorm: GroupNormRule,
    nn.BatchNorm1d: BatchNormRule,
    nn.BatchNorm2d: BatchNormRule,
    nn.BatchNorm3d: BatchNormRule,
}
"""Rules by class; by its full name, or how that ends, where the class is of a library that need not
be installed."""


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module, by its class or a parent class; `None` if there is none.

    A name may mislead: the rule is compared with autograd before it is used.
    """
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    for kind, rule in RULES.items():
        if name.endswith(kind) if isinstance(kind, str) else isinstance(module, kind):
            return rule(module)
    return None
