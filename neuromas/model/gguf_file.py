"""GGUF files as backbones: converted once into the cache, in the format of transformers."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuromas.model.sources import cache_folder, cache_workplace, writing_to_cache
from neuromas.system.files import digest_of
from neuromas.system.process import total_memory
from neuromas.system.terminal import in_short, one_line

COPIES = 2
"""Times the weights in float32 that a conversion holds at once: as read, and as loaded."""
BESIDE = 2**29
"""Bytes that it takes besides: libraries and the tokenizer."""
WEIGHTS_A_SECOND = 7_000_000
"""About, on one core; it is told before a conversion begins."""
LISTING = "converted.json"
"""File of a converted model with the SHA-256 of every other file: the last that is written."""


def converted(file: Path) -> Path:
    """Return the folder of a GGUF file's model, converted if it is not in the cache yet.

    Weights are float32; what the file's quantization has lost is lost. Raises ValueError if the packages that read GGUF are
    missing, the file is damaged, its architecture or quantization is not known, memory or disk is too small, or the cache
    cannot be written to.
    """
    # Its name tells a person what it is; a long one, or one that is no UTF-8, would be no name of a folder.
    folder = cache_folder() / f"{os.fsencode(file.stem)[:64].decode(errors='ignore')}-{digest_of(file)[:16]}"
    if not _is_whole(folder):
        elements = _check(file)
        with cache_workplace() as partial:
            _check_disk(partial, elements)
            told = f"{file.name}: its {elements:,} weights are converted to float32 into {folder}, once, in about "
            print(one_line(f"{told}{max(1, round(elements / WEIGHTS_A_SECOND))} s"), file=sys.stderr, flush=True)
            _convert(file, partial)
            with writing_to_cache():
                (partial / LISTING).write_text(json.dumps(_digests(partial)))
            # Another process may have been faster.
            if not _is_whole(folder):
                _replace(folder, partial)
    return folder


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a converted model."""
    return {path.name: digest_of(path) for path in folder.iterdir() if path.name != LISTING}


def _is_whole(folder: Path) -> bool:
    """Say whether a folder holds what a conversion has written: a loss of power, a copy or a disk may leave something else."""
    try:
        return json.loads((folder / LISTING).read_bytes()) == _digests(folder)
    except (OSError, ValueError):
        return False


def _replace(folder: Path, whole: Path) -> None:
    """Put a whole folder in the place of one that is damaged or not there."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        whole.rename(folder)
    except OSError as error:
        raise ValueError(
            f"its converted model {folder} is damaged and cannot be replaced ({error.strerror}); delete it, or set the "
            "environment variable NEUROMAS_CACHE to another folder"
        ) from error


def _check_disk(folder: Path, elements: int) -> None:
    """Raise ValueError if the converted weights do not fit on the disk."""
    needed, free = 4 * elements, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"its {elements:,} weights take {needed / 2**30:,.2f} GiB in {folder.parent} when converted, {free / 2**30:,.2f} "
            "are free; make room there, or set the environment variable NEUROMAS_CACHE to another folder"
        )


def _check(file: Path) -> int:
    """Return the number of a file's weights; ValueError for one that cannot be read, before anything large is."""
    try:
        import accelerate  # noqa: F401  # transformers asks for it
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise ValueError(f"it is a GGUF file, which needs the extra gguf; pip install 'neuromas[gguf]' ({error})") from error

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **named: Any) -> Any:
            # Otherwise nothing would be read behind the end, as often as a damaged length of a list says.
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends before what it says it holds")
            return super()._get(offset, dtype, count, *more, **named)

    try:
        tensors = Reader(file).tensors
    except Exception as error:  # the reader raises what numpy and struct raise
        raise ValueError(f"it is no GGUF file, or cut off: {in_short(error)}") from error
    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors}.items():
        try:
            dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except NotImplementedError as error:
            raise ValueError(f"its tensor {tensor.name} is quantized as {kind.name}, which is not known here") from error
    elements = sum(int(tensor.n_elements) for tensor in tensors)
    needed, there = 4 * COPIES * elements + BESIDE, total_memory()
    if there is not None and needed > there:
        raise ValueError(
            f"to convert its {elements:,} weights needs {needed / 2**30:,.1f} GiB of memory, there are {there / 2**30:,.1f}"
        )
    return elements


def _convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder."""
    where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, output_loading_info=True, **where)
    read, report = loaded
    # Otherwise transformers would fill missing weights with random numbers, and the converted model would lack none.
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} weights, e.g. {missing[0]}: a model in several files has to be merged first")
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    # What was read calls itself quantized and refuses to be saved: another model takes its tensors over.
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    with writing_to_cache():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
