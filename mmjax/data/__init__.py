"""Sources of images and captions, and grain pipelines over them; names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmjax.lazy import attach

if TYPE_CHECKING:
    from mmjax.data.captions import CaptionsData
    from mmjax.data.config import DataConfig
    from mmjax.data.digits import DIGIT_NAMES, DIGIT_TEMPLATES, DigitsData
    from mmjax.data.examples import Example, Examples, batches
    from mmjax.data.faults import FAULTS, BadSample, FaultTally, check_faults, fault_counts
    from mmjax.data.features import FeatureStore, write_features
    from mmjax.data.folders import ImageFolderData
    from mmjax.data.instruction_batches import InstructionBatches
    from mmjax.data.instructions import InstructionData
    from mmjax.data.mixture import MixtureData
    from mmjax.data.packing import PackedBatches
    from mmjax.data.pipeline import Batches, BatchIterator
    from mmjax.data.scenes import Scene, Thing, make_scene
    from mmjax.data.scenes_data import (
        ScenesData,
        SceneTextData,
        scene_conversation,
        scene_tokenizer,
        told_conversation,
    )
    from mmjax.data.scenes_dialogues import SceneDialogueData
    from mmjax.data.scenes_questions import (
        Question,
        blind_guesses,
        presence_probes,
        scene_question,
        scene_questions,
        thing_question,
    )
    from mmjax.data.scenes_text import scene_caption, scene_captions
    from mmjax.data.synthetic import SyntheticData
    from mmjax.data.text import ChatData, TextData
    from mmjax.data.webdataset import WebDatasetData

_HOMES = {
    "captions": ("CaptionsData",),
    "config": ("DataConfig",),
    "digits": ("DIGIT_NAMES", "DIGIT_TEMPLATES", "DigitsData"),
    "examples": ("Example", "Examples", "batches"),
    "faults": ("FAULTS", "BadSample", "FaultTally", "check_faults", "fault_counts"),
    "features": ("FeatureStore", "write_features"),
    "folders": ("ImageFolderData",),
    "instruction_batches": ("InstructionBatches",),
    "instructions": ("InstructionData",),
    "mixture": ("MixtureData",),
    "packing": ("PackedBatches",),
    "pipeline": ("BatchIterator", "Batches"),
    "scenes": ("Scene", "Thing", "make_scene"),
    "scenes_data": (
        "ScenesData",
        "SceneTextData",
        "scene_conversation",
        "scene_tokenizer",
        "told_conversation",
    ),
    "scenes_dialogues": ("SceneDialogueData",),
    "scenes_questions": (
        "Question",
        "blind_guesses",
        "presence_probes",
        "scene_question",
        "scene_questions",
        "thing_question",
    ),
    "scenes_text": ("scene_caption", "scene_captions"),
    "synthetic": ("SyntheticData",),
    "text": ("ChatData", "TextData"),
    "webdataset": ("WebDatasetData",),
}
__getattr__, __dir__ = attach(__name__, _HOMES)

__all__ = [
    "DIGIT_NAMES",
    "DIGIT_TEMPLATES",
    "FAULTS",
    "BadSample",
    "BatchIterator",
    "Batches",
    "CaptionsData",
    "ChatData",
    "DataConfig",
    "DigitsData",
    "Example",
    "Examples",
    "FaultTally",
    "FeatureStore",
    "ImageFolderData",
    "InstructionBatches",
    "InstructionData",
    "MixtureData",
    "PackedBatches",
    "Question",
    "Scene",
    "SceneDialogueData",
    "SceneTextData",
    "ScenesData",
    "SyntheticData",
    "TextData",
    "Thing",
    "WebDatasetData",
    "batches",
    "blind_guesses",
    "check_faults",
    "fault_counts",
    "make_scene",
    "presence_probes",
    "scene_caption",
    "scene_captions",
    "scene_conversation",
    "scene_question",
    "scene_questions",
    "scene_tokenizer",
    "thing_question",
    "told_conversation",
    "write_features",
]
