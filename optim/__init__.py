"""Optimizers and learning-rate schedules. One import to write one of your own:

from optim import OPTIMIZER_REGISTRY, Option, OptimizerComponent, torch_groups

(Components of the model come from `model_components`, which optimizers build upon.)
"""

from common.registry import AnyBut, Option, above, at_least, between, fraction
from common.tensors import local_tensor
from model_builder import ParameterGroup
from optim.optimizers import AdamW, Lion, Muon, OptimizerComponent, begin_state, torch_groups
from optim.schedules import Decay, Schedule, WarmUp
from optim.strategy import ParallelStrategy
from training_config import OPTIMIZER_REGISTRY, SCHEDULE_REGISTRY, TrainingConfig

__all__ = [
    'OPTIMIZER_REGISTRY',
    'SCHEDULE_REGISTRY',
    'AdamW',
    'AnyBut',
    'Decay',
    'Lion',
    'Muon',
    'OptimizerComponent',
    'Option',
    'ParallelStrategy',
    'ParameterGroup',
    'Schedule',
    'TrainingConfig',
    'WarmUp',
    'above',
    'at_least',
    'begin_state',
    'between',
    'fraction',
    'local_tensor',
    'torch_groups',
]
