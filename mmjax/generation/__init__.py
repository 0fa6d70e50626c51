"""Text out of language models: samplers, the decode loop, streams, conversations, scores of answers."""

from typing import TYPE_CHECKING

from mmjax.lazy import attach

if TYPE_CHECKING:
    from mmjax.generation.samplers import BeamSearch, Greedy, Sampling
    from mmjax.generation.scoring import AnswerScores, score
    from mmjax.generation.streaming import Conversation, TokenStream, stream, stream_text
    from mmjax.generation.text import generate
    from mmjax.generation.warpers import keep_min_p, keep_top_k, keep_top_p, penalize_repetition

_HOMES = {
    "samplers": ("BeamSearch", "Greedy", "Sampling"),
    "scoring": ("AnswerScores", "score"),
    "streaming": ("Conversation", "TokenStream", "stream", "stream_text"),
    "text": ("generate",),
    "warpers": ("keep_min_p", "keep_top_k", "keep_top_p", "penalize_repetition"),
}
__getattr__, __dir__ = attach(__name__, _HOMES)

__all__ = [
    "AnswerScores",
    "BeamSearch",
    "Conversation",
    "Greedy",
    "Sampling",
    "TokenStream",
    "generate",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalize_repetition",
    "score",
    "stream",
    "stream_text",
]
