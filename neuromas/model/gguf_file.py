"""GGUF files as backbones: converted once into the cache, in the format of transformers."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuromas.system.process import total_memory

COPIES = 3
"""Times the weights in float32 that a conversion holds at once: as read, as loaded, and in the model that is saved."""


def converted(file: Path) -> Path:
    """Return the folder of a GGUF file's model, converted if it is not in the cache yet.

    Weights are float32; what the file's quantization has lost is lost. Raises ValueError if the packages that read GGUF are
    missing, the file is damaged, its architecture or quantization is not known, or memory is too small.
    """
    with file.open("rb") as opened:
        checksum = hashlib.file_digest(opened, "blake2b").hexdigest()[:16]
    folder = cache_folder() / f"{file.stem}-{checksum}"
    if not (folder / "config.json").is_file():
        _check(file)
        _convert(file, folder)
    return folder


def cache_folder() -> Path:
    """Return where converted models are kept: NEUROMAS_CACHE, or the user's cache folder."""
    own = os.environ.get("NEUROMAS_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuromas"


def _check(file: Path) -> None:
    """Raise ValueError for a file that cannot be read, before anything large is."""
    try:
        import accelerate  # noqa: F401  # transformers asks for it
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(f"it is a GGUF file, which needs the extra gguf; pip install 'neuromas[gguf]' ({error})") from error
    try:
        elements = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    except Exception as error:  # the reader raises what numpy and struct raise
        raise ValueError(f"it is no GGUF file, or cut off: {' '.join(str(error).split())[:200]}") from error
    needed, there = 4 * COPIES * elements, total_memory()
    if there is not None and needed > there:
        raise ValueError(
            f"to convert its {elements:,} weights needs {needed / 2**30:,.1f} GiB of memory, there are {there / 2**30:,.1f}"
        )


def _convert(file: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        read: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
        config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
        # What was read calls itself quantized and refuses to be saved.
        model = type(read)(config)
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError:
        # Another process may have been faster.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
