"""Which layer has which rule."""

from __future__ import annotations

from torch import nn

from fisher_forget.curvature.rules.convolution import ConvRule
from fisher_forget.curvature.rules.layers import (
    BatchNormRule,
    EmbeddingRule,
    GroupNormRule,
    LayerNormRule,
    LinearRule,
    RMSNormRule,
    Rule,
    TransposedLinearRule,
)

RULES: dict[type[nn.Module], type[Rule]] = {
    nn.Linear: LinearRule,
    nn.Conv1d: ConvRule,
    nn.Conv2d: ConvRule,
    nn.Conv3d: ConvRule,
    nn.Embedding: EmbeddingRule,
    nn.LayerNorm: LayerNormRule,
    nn.RMSNorm: RMSNormRule,
    nn.GroupNorm: GroupNormRule,
    nn.BatchNorm1d: BatchNormRule,
    nn.BatchNorm2d: BatchNormRule,
    nn.BatchNorm3d: BatchNormRule,
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module, by its class or a parent class; `None` if there is none."""
    if (
        type(module).__module__ == "transformers.pytorch_utils"
        and type(module).__name__ == "Conv1D"
    ):
        return TransposedLinearRule(module)
    for kind, rule in RULES.items():
        if isinstance(module, kind):
            return rule(module)
    return None
