r"""Deletion requests that are chosen to do harm.

Threat model: the attacker owns some training samples and changes none of them. It knows model and
data (white box: the worst case), and asks for the deletion of those of its samples whose absence
does most harm. Nothing tells such a request from an honest one but what it does.

    "harm"    largest g_t . H^-1 g_n / N: by how much the mean loss of target samples would rise
              without the sample, to first order (`Influence.on`): a class's boundary, a minority
    "step"    largest g_n^T H^-1 g_n: the correction is long, so that it may leave what the
              curvature vouches for, and takes long
    "random"  the control

Exact retraining does harm, too: without its best examples a class is answered worse by any model.
That is the yardstick; what is beyond it is the attack on the correction itself. The guard before
publishing is `harm_by_group(...).check(limit)`.

Source: the danger is that of Marchant et al. 2022 (arXiv:2109.08266) for cost, and of Hu et al.
2023 (arXiv:2309.08230) for harm to others; the choice by influence follows from Koh and Liang 2017
(arXiv:1703.04730).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Unpack, get_args

import numpy as np
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget._util.checks import is_number, is_whole
from fisher_forget.data.split import Indices, Split, resolve_split
from fisher_forget.errors import ConfigError, NumericalError, SplitError
from fisher_forget.evaluate.groups import Harm, harm_by_group
from fisher_forget.influence import Influence
from fisher_forget.influence.influence import InfluenceKeywords
from fisher_forget.unlearn.forget import forget
from fisher_forget.unlearn.result import ForgetResult

Aim = Literal["harm", "step", "random"]
ForgetFn = Callable[[nn.Module, Split], ForgetResult]
RetrainFn = Callable[[Indices], nn.Module]
Data = DataLoader[Any] | Dataset[Any] | Split


@dataclass(frozen=True)
class Damage:
    """What requests did.

    Attributes:
        chosen: Indices that were asked for.
        seconds: Wall time of forgetting.
        steps: Sub-steps that the flow took.
        rejected: Sub-steps that left the budget of the retained samples, and were taken back.
        harm: What became of each group of unseen samples.
        retrained: The same by exact retraining, where that was asked for.
        warned: What the result's own check says is wrong; empty if nothing is.
        refused: What the guard says to publish it; empty if it passes.
    """

    chosen: Indices
    seconds: float
    steps: int
    rejected: int
    harm: Harm
    retrained: Harm | None
    warned: str
    refused: str

    def to_dict(self) -> dict[str, Any]:
        """What JSON takes."""
        return asdict(self) | {
            "chosen": self.chosen.tolist(),
            "harm": self.harm.to_dict(),
            "retrained": None if self.retrained is None else self.retrained.to_dict(),
        }

    def __str__(self) -> str:
        worst, score = self.harm.worst, self.harm.score
        text = (
            f"{len(self.chosen):,} samples deleted in {self.seconds:.1f} s, {self.steps} sub-steps "
            f"taken and {self.rejected} taken back. {worst.name!r} lost most: from "
            f"{score.format(worst.score[0])} to {score.format(worst.score[1])}"
        )
        if self.retrained is not None:
            same = next(g for g in self.retrained.groups if g.name == worst.name)
            text += f"; by retraining {score.format(same.score[1])}"
        return f"{text}. The guard {'refuses it' if self.refused else 'lets it pass'}."


@dataclass(frozen=True)
class ChosenRequests:
    """Requests of an attacker; see the module.

    Attributes:
        aim: "harm", "step" or "random".
        count: Samples that are asked for.
        seed: Of the control, and of the curvature.

    Raises:
        ConfigError: If a value is out of range.
    """

    aim: Aim = "harm"
    count: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.aim not in get_args(Aim):
            got = f"aim={self.aim!r}"
            raise ConfigError(got, f"one of {get_args(Aim)}", "Pass one of these names.")
        if not is_whole(self.count, 1):
            raise ConfigError(f"count={self.count!r}", "at least 1", "Pass count=50, say.")
        if not is_whole(self.seed, 0):
            raise ConfigError(f"seed={self.seed!r}", "at least 0", "Pass seed=0, say.")

    def choose(
        self,
        model: nn.Module,
        data: Data,
        owned: Sequence[int] | Indices | range,
        target: Data | None = None,
        **options: Unpack[InfluenceKeywords],
    ) -> Indices:
        """Whom to ask for.

        Args:
            model: Trained, in eval mode.
            data: What it was trained on.
            owned: Indices of the attacker's samples.
            target: Whom to harm, for "harm": samples of a group.
            **options: As for `Influence.of`.

        Returns:
            Sorted indices [count].

        Raises:
            SplitError: If fewer are owned than are asked for, or they are no training samples.
            ConfigError: "harm" without a target.
        """
        split = resolve_split(data, [], allow_empty=True)
        own = np.unique(np.asarray(owned))
        if own.dtype.kind not in "iu":
            got = f"samples owned of {own.dtype}"
            raise SplitError(got, "indices of training samples", "Pass whole numbers.")
        if len(own) < self.count or not np.isin(own, split.retain).all():
            got = f"{len(own)} samples owned, {self.count} to ask for"
            raise SplitError(got, "at least as many, all of them in the data", "Correct `owned`.")
        if self.aim == "random":
            rng = np.random.default_rng(self.seed)
            return np.sort(rng.choice(own, self.count, replace=False))
        if self.aim == "harm" and target is None:
            raise ConfigError("no target", "samples of those to harm", "Pass target=.")
        changes: InfluenceKeywords = {"seed": self.seed, **options}
        influence = Influence.of(model, split, **changes)
        harm = self.aim == "harm" and target is not None
        score = influence.on(target) if harm else influence.own()  # type: ignore[arg-type]
        mine = np.isin(influence.samples, own)
        order = np.argsort(-score.numpy()[mine], kind="stable")[: self.count]
        return np.sort(influence.samples[mine][order])

    def run(
        self,
        model: nn.Module,
        data: Data,
        owned: Sequence[int] | Indices | range,
        unseen: Dataset[Any] | Split,
        *,
        target: Data | None = None,
        limit: float = 0.02,
        forget_fn: ForgetFn | None = None,
        retrain_fn: RetrainFn | None = None,
        **options: Unpack[InfluenceKeywords],
    ) -> Damage:
        """Ask, forget, and look at every class of unseen samples.

        Args:
            model: Trained, in eval mode; untouched.
            data: What it was trained on.
            owned: Indices of the attacker's samples.
            unseen: Samples that show the harm, by class.
            target: As for `choose`.
            limit: Of the guard: the most that a class's score may fall by.
            forget_fn: Takes the model and the split, and forgets; by default `forget`.
            retrain_fn: Takes indices and trains on these: the yardstick.
            **options: `likelihood`, `weight_decay` and others, as for `choose`; the first two are
                for forgetting, too.

        Raises:
            SplitError, ConfigError: As for `choose`.
            ModelError, DataError, NumericalError: As for `forget` and `harm_by_group`.
        """
        if not is_number(limit):
            raise ConfigError(f"limit={limit!r}", "a number of at least 0", "Pass .02, say.")
        chosen = self.choose(model, data, owned, target, **options)
        split = resolve_split(data, chosen)
        kind = options.get("likelihood", "categorical")
        plain: Any = {key: options[key] for key in ("likelihood", "weight_decay") if key in options}
        begun = time.perf_counter()
        if forget_fn is None:
            result = forget(model, split, chosen, progress=False, **plain)
        else:
            result = forget_fn(model, split)
        seconds = time.perf_counter() - begun
        harm = harm_by_group(model, result.model, unseen, likelihood=kind)
        refused, exact = "", None
        try:
            harm.check(limit)
        except NumericalError as error:
            refused = error.got
        if retrain_fn is not None:
            exact = harm_by_group(model, retrain_fn(split.retain), unseen, likelihood=kind)
        taken = len(result.newton.accepted)
        return Damage(
            chosen=chosen,
            seconds=seconds,
            steps=taken,
            rejected=len(result.newton.path) - taken,
            harm=harm,
            retrained=exact,
            warned=" ".join(finding.says for finding in result.check.wrong),
            refused=refused,
        )
