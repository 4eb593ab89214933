"""The rivals of the paper's tables, behind one interface: `make_baseline`, `SupervisedLearner`."""

from modaltune.baselines.baseline import Baseline
from modaltune.baselines.heads import CoxHead, HazardHead, make_survival_head
from modaltune.baselines.learner import Predictions, SupervisedLearner, SupervisedModel
from modaltune.baselines.registry import BASELINES, BaselineKind, make_baseline

__all__ = [
    "BASELINES",
    "Baseline",
    "BaselineKind",
    "CoxHead",
    "HazardHead",
    "Predictions",
    "SupervisedLearner",
    "SupervisedModel",
    "make_baseline",
    "make_survival_head",
]
