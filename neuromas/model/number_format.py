"""Which number format the products of a backbone are faster in, on this processor."""

import torch

_SMALL = 2**18
"""Products with fewer weights take no longer than what is around them, in either format."""


def faster_dtype(features: int, outputs: int) -> str:
    """Return `bfloat16` if the processor has instructions for products of it and these are large, else `float32`.

    Nothing is timed: the choice is part of what a cell of a comparison is, and must not depend on what else a machine does.
    """
    return "bfloat16" if features * outputs >= _SMALL and has_bfloat16_products() else "float32"


def has_bfloat16_products() -> bool:
    """Return whether the processor has AMX or AVX512-BF16; with others, products in bfloat16 are slower than in float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
