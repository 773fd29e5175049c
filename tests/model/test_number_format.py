"""The number format that `--dtype auto` takes follows from the backbone's sizes and the processor's instructions."""

import pytest
import torch

from neuromas.model import number_format
from neuromas.model.backbone import resolve_dtype
from neuromas.model.number_format import faster_dtype, has_bfloat16_products


@pytest.mark.parametrize(("has", "chosen"), [(False, "float32"), (True, "bfloat16")])
def test_bfloat16_is_chosen_where_the_processor_multiplies_it(has: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_format, "has_bfloat16_products", lambda: has)
    assert faster_dtype(576, 1536) == chosen
    assert faster_dtype(128, 384) == "float32", "a small backbone"


@pytest.mark.parametrize("which", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", ""])
def test_one_of_two_kinds_of_instructions_is_enough(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == which)
    assert has_bfloat16_products() is bool(which)


def test_the_bundled_backbone_and_a_named_format_keep_theirs() -> None:
    assert resolve_dtype("auto", "bundled", "cpu") == "float32"
    assert resolve_dtype("bfloat16", "no such backbone", "cpu") == "bfloat16"
