"""Log-probabilities of chosen tokens and entropies, computed from hidden states in chunks so that not all logits are kept."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from neuromas.model import kernels
from neuromas.model.ops import wide_product

LOGITS_AT_ONCE = 2**24
"""Number of logits in a chunk; they take 64 MiB in float32."""
LOGITS_AT_ONCE_ON_A_GPU = 2**27
"""The same on a GPU, where products of a hundred tokens would leave most of it idle."""


def tokens_at_once(vocabulary: int, device: torch.device) -> int:
    """Return how many tokens have their logits in one chunk."""
    return max(1, (LOGITS_AT_ONCE_ON_A_GPU if device.type == "cuda" else LOGITS_AT_ONCE) // vocabulary)


def logits_of(hidden_KC: Tensor, weight_VC: Tensor, bias_V: Tensor | None) -> Tensor:
    """Return float32 logits."""
    if _in_two_parts(hidden_KC, bias_V):
        return kernels.logits(hidden_KC, weight_VC)
    if hidden_KC.is_cuda and bias_V is None:
        return wide_product(hidden_KC, weight_VC.T)
    return functional.linear(hidden_KC, weight_VC, bias_V).float()


def _in_two_parts(hidden_KC: Tensor, bias_V: Tensor | None) -> bool:
    """Say whether logits are computed in two parts: where bfloat16 alone would be too coarse, and loops can add them."""
    return hidden_KC.dtype == torch.bfloat16 and hidden_KC.device.type == "cpu" and bias_V is None


class _ChosenLogprobs(torch.autograd.Function):
    """Computes log softmax(head h / temperature) at one token each, and if it is asked for the entropy of that softmax p.

    The head is frozen, so the gradient at h of a log-probability is (row of the token - mean row under p) / temperature, and
    that of the entropy H is the rows weighted by -p (log p + H) / temperature. Both are computed together with the logits, one
    chunk of tokens at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_KC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, ids_K: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logprobs_K = torch.empty(len(ids_K), dtype=torch.float32, device=hidden_KC.device)
        entropies_K = torch.empty_like(logprobs_K) if entropy else None
        gradients = [torch.empty_like(hidden_KC) for _ in range(1 + entropy)] if ctx.needs_input_grad[0] else []
        chunk = tokens_at_once(len(weight_VC), hidden_KC.device)
        for start in range(0, len(ids_K), chunk):
            part, ids = slice(start, start + chunk), ids_K[start : start + chunk, None]
            if _in_two_parts(hidden_KC, bias_V) and entropies_K is None:
                logprobs_K[part], difference = kernels.chosen(hidden_KC[part], weight_VC, ids[:, 0], temperature)
                if gradients:
                    gradients[0][part] = difference @ weight_VC / -temperature
                continue
            logits = logits_of(hidden_KC[part], weight_VC, bias_V)
            if temperature != 1:
                logits /= temperature
            total = logits.logsumexp(-1, keepdim=True)
            logprobs_K[part] = (logits.gather(1, ids) - total)[:, 0]
            if entropies_K is not None:
                logp = logits - total
                p = logp.exp()
                entropies_K[part] = -torch.linalg.vecdot(p, logp)
                if gradients:
                    weights = logp.add_(entropies_K[part, None]).mul_(p)
                    gradients[1][part] = weights.to(weight_VC.dtype) @ weight_VC / -temperature
            if gradients:
                difference = logits.sub_(total).exp_()
                difference.scatter_add_(1, ids, difference.new_full(ids.shape, -1.0))
                gradients[0][part] = difference.to(weight_VC.dtype) @ weight_VC / -temperature
        ctx.save_for_backward(*gradients)
        return logprobs_K, entropies_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None, None]:
        first_KC, *others = [
            gradient_KC * grad_K[:, None].to(gradient_KC.dtype)
            for gradient_KC, grad_K in zip(ctx.saved_tensors, grads, strict=False)
            if grad_K is not None
        ]
        gradient_KC = first_KC + others[0] if others else first_KC
        return gradient_KC, None, None, None, None, None


def chosen_logprobs(
    hidden_KC: Float[Tensor, "K C"], head: nn.Linear, ids_K: Int[Tensor, " K"], temperature: float, *, entropy: bool = False
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"] | None]:
    """Return the float32 log-probability of one token after each hidden state, under a frozen head.

    With `entropy` also the entropy of each distribution, in nats.
    """
    logprobs_K, entropies_K = _ChosenLogprobs.apply(hidden_KC, head.weight, head.bias, ids_K, temperature, entropy)
    return logprobs_K, entropies_K
