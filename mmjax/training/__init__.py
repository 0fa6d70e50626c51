"""The trainer: experiments as frozen data, stages, the step, the loop; names are imported on first use."""

from typing import TYPE_CHECKING

from mmjax.lazy import attach

if TYPE_CHECKING:
    from mmjax.training.compose import LlavaFromParts
    from mmjax.training.experiment import Experiment, Stage, Train
    from mmjax.training.features import KeepFeatures, keep_features
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
    from mmjax.training.parts import ExportParts, load_parts, save_parts, with_parts
    from mmjax.training.peft import (
        ExportAdapter,
        export_adapter,
        export_merged,
        load_adapter,
        load_tuned,
        save_adapter,
    )
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
    "ExportAdapter",
    "ExportParts",
    "FromConfig",
    "FromFolder",
    "Interrupted",
    "KeepFeatures",
    "Linear",
    "LlavaFromParts",
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
    "keep_features",
    "load_adapter",
    "load_parts",
    "load_tuned",
    "make_optimizer",
    "make_train_step",
    "mean_loss",
    "merge",
    "merge_lora",
    "read_metrics",
    "save_adapter",
    "save_parts",
    "train",
    "unmerge_lora",
    "with_parts",
]
__getattr__, __dir__ = attach(
    __name__,
    {
        "compose": ("LlavaFromParts",),
        "experiment": ("Experiment", "Stage", "Train"),
        "features": ("KeepFeatures", "keep_features"),
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
        "parts": ("ExportParts", "load_parts", "save_parts", "with_parts"),
        "peft": (
            "ExportAdapter",
            "export_adapter",
            "export_merged",
            "load_adapter",
            "load_tuned",
            "save_adapter",
        ),
        "schedules": ("FROZEN", "Constant", "Cosine", "Linear"),
        "source": ("FromConfig", "FromFolder"),
        "state": ("TrainState", "create_state", "flatten", "merge"),
        "step": ("Task", "make_train_step"),
        "tasks": ("Classification", "Contrastive", "MaskedImage", "Sigmoid"),
        "tasks_language": ("NextToken", "mean_loss"),
    },
)
