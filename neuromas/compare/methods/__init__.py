"""The compared methods by name, as `neuromas compare` takes them. Modules that load torch are imported when a method runs."""

from neuromas.compare.methods import (
    at_grpo,
    collm,
    debate,
    finetuned,
    gptswarm,
    macnet,
    marft,
    mixture,
    networks,
    pipeline,
    sampling,
    self_check,
    self_refine,
    tree_of_thoughts,
)
from neuromas.compare.methods.method import Answer, CellResult, CellSpec, CurvePoint, Method

_FILES = (
    sampling, self_refine, self_check, debate, mixture, pipeline, macnet, gptswarm, tree_of_thoughts,
    collm, marft, at_grpo, networks, finetuned,
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for file in _FILES for method in file.METHODS}
"""Untrained methods first, then trained ones."""

__all__ = ["METHODS", "Answer", "CellResult", "CellSpec", "CurvePoint", "Method"]
