"""The trainer: experiments as frozen data, stages, the step, the loop."""

from mmjax.training.experiment import Experiment, Stage, Train
from mmjax.training.loop import train
from mmjax.training.optimizer import Rule
from mmjax.training.outcome import Outcome, export_hub, read_metrics
from mmjax.training.overrides import apply_overrides
from mmjax.training.schedules import FROZEN, Constant, Cosine, Linear
from mmjax.training.source import FromConfig, FromFolder
from mmjax.training.state import TrainState, create_state
from mmjax.training.step import Task, make_train_step
from mmjax.training.tasks import Classification, Contrastive, MaskedImage, Sigmoid

__all__ = [
    "FROZEN",
    "Classification",
    "Constant",
    "Contrastive",
    "Cosine",
    "Experiment",
    "FromConfig",
    "FromFolder",
    "Linear",
    "MaskedImage",
    "Outcome",
    "Rule",
    "Sigmoid",
    "Stage",
    "Task",
    "Train",
    "TrainState",
    "apply_overrides",
    "create_state",
    "export_hub",
    "make_train_step",
    "read_metrics",
    "train",
]
