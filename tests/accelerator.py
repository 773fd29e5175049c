"""The code for other devices than a CPU, run on a CPU: by torch's own implementation there of the same calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def flex_on_cpu(block: int = 16) -> Iterator[None]:
    """Have attention computed by torch's flex attention, with its gradients, which torch otherwise refuses on a CPU.

    Torch computes every score there and looks at no table of blocks. These are smaller here, so that there are several.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromas.model.flex.uses_flex", lambda _: True)
        patch.setattr("neuromas.model.flex.BLOCK", block)
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
        patch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield
