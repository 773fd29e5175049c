"""Log-probabilities of chosen tokens straight from hidden states: no logits are kept, whatever the vocabulary.

Beside the legend of shapes: H is the size of a hidden state.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

LOGITS_AT_ONCE = 2**24
"""Numbers, 64 MiB in float32."""


class _ChosenLogprobs(torch.autograd.Function):
    """log softmax(head h / temperature) at one token each.

    The head is frozen, so the gradient at h is a number times (row of the token - mean row under the softmax) / temperature.
    It is made while the logits are there, a chunk of tokens at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_KH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, ids_K: Tensor, temperature: float
    ) -> Tensor:
        logprobs_K = torch.empty(len(ids_K), dtype=torch.float32, device=hidden_KH.device)
        gradient_KH = torch.empty_like(hidden_KH) if ctx.needs_input_grad[0] else None
        chunk = max(1, LOGITS_AT_ONCE // len(weight_VH))
        for start in range(0, len(ids_K), chunk):
            part, ids = slice(start, start + chunk), ids_K[start : start + chunk, None]
            logits = functional.linear(hidden_KH[part], weight_VH, bias_V).float()
            if temperature != 1:
                logits /= temperature
            total = logits.logsumexp(-1, keepdim=True)
            logprobs_K[part] = (logits.gather(1, ids) - total)[:, 0]
            if gradient_KH is not None:
                away = logits.sub_(total).exp_()
                away.scatter_add_(1, ids, away.new_full(ids.shape, -1.0))
                gradient_KH[part] = away.to(weight_VH.dtype) @ weight_VH / -temperature
        if gradient_KH is not None:
            ctx.save_for_backward(gradient_KH)
        return logprobs_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_KH,) = ctx.saved_tensors
        return gradient_KH * grads[0][:, None].to(gradient_KH.dtype), None, None, None, None


def chosen_logprobs(
    hidden_KH: Float[Tensor, "K H"], head: nn.Linear, ids_K: Int[Tensor, " K"], temperature: float
) -> Float[Tensor, " K"]:
    """Return the float32 log-probability of one token behind each hidden state, under a frozen head."""
    logprobs_K = _ChosenLogprobs.apply(hidden_KH, head.weight, head.bias, ids_K, temperature)
    assert isinstance(logprobs_K, Tensor)
    return logprobs_K
