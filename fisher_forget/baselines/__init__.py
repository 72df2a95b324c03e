"""Published unlearning methods, one file each, to compare with.

`METHODS` maps names to classes. To add one that trains, write an `SgdMethod` or
`TrainingMethod` with its `losses` (`finetune` is the shortest) and add it here. Exact
unlearning by sharding is `SISA`, and `Sharded` that class as a method.
"""

from fisher_forget.baselines.bad_teacher import BadTeacher
from fisher_forget.baselines.base import DirectMethod, Method, SgdMethod, TrainingMethod
from fisher_forget.baselines.delta_grad import DeltaGrad
from fisher_forget.baselines.finetune import FineTune
from fisher_forget.baselines.fisher import FisherForget
from fisher_forget.baselines.golatkar import GolatkarCode, GolatkarPaper
from fisher_forget.baselines.influence import Lissa, WoodFisher
from fisher_forget.baselines.l1_sparse import L1Sparse
from fisher_forget.baselines.last_layers import CFk, EUk
from fisher_forget.baselines.neg_grad import NegGrad, NegGradPlus
from fisher_forget.baselines.ntk import Ntk, NtkFisher
from fisher_forget.baselines.other_label import OtherLabel
from fisher_forget.baselines.protocol import Range, Unlearned, Unlearner
from fisher_forget.baselines.random_labels import Amnesiac, RandomLabels
from fisher_forget.baselines.retrain import Retrain
from fisher_forget.baselines.rewind_to_delete import RewindToDelete
from fisher_forget.baselines.salun import SalUn, SalUn2023
from fisher_forget.baselines.scrub import Scrub
from fisher_forget.baselines.sisa.ensemble import SISA
from fisher_forget.baselines.sisa.method import Sharded
from fisher_forget.baselines.ssd import Ssd
from fisher_forget.baselines.unsir import Unsir
from fisher_forget.baselines.variational import Variational

METHODS: dict[str, type[Unlearner]] = {
    method.name: method
    for method in (
        FisherForget,
        Retrain,
        FineTune,
        NegGrad,
        NegGradPlus,
        RandomLabels,
        Amnesiac,
        OtherLabel,
        BadTeacher,
        Scrub,
        SalUn,
        SalUn2023,
        Ssd,
        Ntk,
        NtkFisher,
        WoodFisher,
        Lissa,
        L1Sparse,
        CFk,
        EUk,
        Unsir,
        Variational,
        DeltaGrad,
        RewindToDelete,
        Sharded,
        GolatkarPaper,
        GolatkarCode,
    )
}

__all__ = [
    "METHODS",
    "SISA",
    "DirectMethod",
    "Method",
    "Range",
    "SgdMethod",
    "TrainingMethod",
    "Unlearned",
    "Unlearner",
]
