"""Logits and log-probabilities of a head in bfloat16, by compiled loops."""

import torch
from torch import Tensor

from neuromas.model.kernels import loops
from neuromas.model.kernels.launch import run


def _in_two_parts(hidden_KC: Tensor, weight_VC: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits in bfloat16, and what their rounding has left out.

    A logit of 20 in bfloat16 is up to 0.06 off. The second product is added to the first one's result, negated, before it is
    rounded; both together take a third of the time of a product in float32.
    """
    rounded = hidden_KC @ weight_VC.T
    return rounded, torch.addmm(rounded, hidden_KC, weight_VC.T, beta=-1)


def logits(hidden_KC: Tensor, weight_VC: Tensor) -> Tensor:
    """Return logits as precise as if they were not rounded to bfloat16, in float32."""
    logits_KV = torch.empty(hidden_KC.shape[0], weight_VC.shape[0], dtype=torch.float32)
    run(loops.add_parts, *_in_two_parts(hidden_KC, weight_VC), logits_KV)
    return logits_KV


def chosen(hidden_KC: Tensor, weight_VC: Tensor, ids_K: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits / temperature) at one token each, and softmax minus 1 at that token, (K, V), in bfloat16."""
    rounded, rest = _in_two_parts(hidden_KC, weight_VC)
    logprobs_K = torch.empty(hidden_KC.shape[0], dtype=torch.float32)
    run(loops.chosen, rounded, rest, ids_K, 1 / temperature, logprobs_K)
    return logprobs_K, rounded
