"""The number format that `--dtype auto` takes follows from timed products."""

import pytest
import torch

from neuromas.model import number_format
from neuromas.model.backbone import resolve_dtype
from neuromas.model.number_format import faster_dtype


@pytest.mark.parametrize(("gain", "chosen"), [(0.2, "float32"), (1.4, "float32"), (1.6, "bfloat16")])
def test_bfloat16_is_chosen_where_it_is_much_faster(gain: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_format, "_seconds", lambda _i, _o, dtype: gain if dtype == torch.float32 else 1.0)
    assert faster_dtype(576, 1536) == chosen


def test_products_are_timed_in_both_formats() -> None:
    assert faster_dtype(512, 512) in ("float32", "bfloat16")
    assert number_format._seconds(512, 512, torch.float32) > 0


def test_a_small_backbone_and_a_named_format_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_format, "_seconds", lambda *_: pytest.fail("timed"))
    assert resolve_dtype("auto", "bundled", "cpu") == "float32"
    assert resolve_dtype("bfloat16", "no such backbone", "cpu") == "bfloat16"
