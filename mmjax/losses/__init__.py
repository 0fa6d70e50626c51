"""Losses as pure functions of arrays."""

from mmjax.losses.classification import cross_entropy, masked_l1
from mmjax.losses.info_nce import infonce
from mmjax.losses.next_token import next_token, token_losses
from mmjax.losses.pairwise_sigmoid import sigmoid

__all__ = ["cross_entropy", "infonce", "masked_l1", "next_token", "sigmoid", "token_losses"]
