"""Log-probabilities of chosen tokens, computed from hidden states in chunks so that not all logits are kept in memory."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

LOGITS_AT_ONCE = 2**24
"""Number of logits in a chunk; they take 64 MiB in float32."""


class _ChosenLogprobs(torch.autograd.Function):
    """Computes log softmax(head h / temperature) at one token each.

    The head is frozen, so the gradient at h is a number times (row of the token - mean row under the softmax) / temperature.
    It is computed together with the logits, one chunk of tokens at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_KC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, ids_K: Tensor, temperature: float
    ) -> Tensor:
        logprobs_K = torch.empty(len(ids_K), dtype=torch.float32, device=hidden_KC.device)
        gradient_KC = torch.empty_like(hidden_KC) if ctx.needs_input_grad[0] else None
        chunk = max(1, LOGITS_AT_ONCE // len(weight_VC))
        for start in range(0, len(ids_K), chunk):
            part, ids = slice(start, start + chunk), ids_K[start : start + chunk, None]
            logits = functional.linear(hidden_KC[part], weight_VC, bias_V).float()
            if temperature != 1:
                logits /= temperature
            total = logits.logsumexp(-1, keepdim=True)
            logprobs_K[part] = (logits.gather(1, ids) - total)[:, 0]
            if gradient_KC is not None:
                difference = logits.sub_(total).exp_()
                difference.scatter_add_(1, ids, difference.new_full(ids.shape, -1.0))
                gradient_KC[part] = difference.to(weight_VC.dtype) @ weight_VC / -temperature
        if gradient_KC is not None:
            ctx.save_for_backward(gradient_KC)
        return logprobs_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_KC,) = ctx.saved_tensors
        return gradient_KC * grads[0][:, None].to(gradient_KC.dtype), None, None, None, None


def chosen_logprobs(
    hidden_KC: Float[Tensor, "K C"], head: nn.Linear, ids_K: Int[Tensor, " K"], temperature: float
) -> Float[Tensor, " K"]:
    """Return the float32 log-probability of one token after each hidden state, under a frozen head."""
    logprobs_K = _ChosenLogprobs.apply(hidden_KC, head.weight, head.bias, ids_K, temperature)
    assert isinstance(logprobs_K, Tensor)
    return logprobs_K
