"""The trainer: experiments as frozen data, stages, the step, the loop; names are imported on first use."""

from typing import TYPE_CHECKING

from mmjax.lazy import attach

if TYPE_CHECKING:
    from mmjax.training.experiment import Experiment, Stage, Train
    from mmjax.training.interrupts import Interrupted
    from mmjax.training.loop import train
    from mmjax.training.lora import (
        LoraConfig,
        LoraFromFolder,
        LoraModel,
        adapt,
        init_lora,
        merge_lora,
        unmerge_lora,
    )
    from mmjax.training.optimizer import Rule, make_optimizer
    from mmjax.training.outcome import Outcome, export_hub, read_metrics
    from mmjax.training.overrides import apply_overrides
    from mmjax.training.peft import export_adapter, export_merged, load_adapter, save_adapter
    from mmjax.training.schedules import FROZEN, Constant, Cosine, Linear
    from mmjax.training.source import FromConfig, FromFolder
    from mmjax.training.state import TrainState, create_state, flatten, merge
    from mmjax.training.step import Task, make_train_step
    from mmjax.training.tasks import Classification, Contrastive, MaskedImage, Sigmoid
    from mmjax.training.tasks_language import NextToken, mean_loss

__all__ = [
    "FROZEN",
    "Classification",
    "Constant",
    "Contrastive",
    "Cosine",
    "Experiment",
    "FromConfig",
    "FromFolder",
    "Interrupted",
    "Linear",
    "LoraConfig",
    "LoraFromFolder",
    "LoraModel",
    "MaskedImage",
    "NextToken",
    "Outcome",
    "Rule",
    "Sigmoid",
    "Stage",
    "Task",
    "Train",
    "TrainState",
    "adapt",
    "apply_overrides",
    "create_state",
    "export_adapter",
    "export_hub",
    "export_merged",
    "flatten",
    "init_lora",
    "load_adapter",
    "make_optimizer",
    "make_train_step",
    "mean_loss",
    "merge",
    "merge_lora",
    "read_metrics",
    "save_adapter",
    "train",
    "unmerge_lora",
]
__getattr__, __dir__ = attach(
    __name__,
    {
        "experiment": ("Experiment", "Stage", "Train"),
        "interrupts": ("Interrupted",),
        "loop": ("train",),
        "lora": (
            "LoraConfig",
            "LoraFromFolder",
            "LoraModel",
            "adapt",
            "init_lora",
            "merge_lora",
            "unmerge_lora",
        ),
        "optimizer": ("Rule", "make_optimizer"),
        "outcome": ("Outcome", "export_hub", "read_metrics"),
        "overrides": ("apply_overrides",),
        "peft": ("export_adapter", "export_merged", "load_adapter", "save_adapter"),
        "schedules": ("FROZEN", "Constant", "Cosine", "Linear"),
        "source": ("FromConfig", "FromFolder"),
        "state": ("TrainState", "create_state", "flatten", "merge"),
        "step": ("Task", "make_train_step"),
        "tasks": ("Classification", "Contrastive", "MaskedImage", "Sigmoid"),
        "tasks_language": ("NextToken", "mean_loss"),
    },
)
