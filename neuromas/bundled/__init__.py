"""The bundled backbone, and where any backbone's files are."""

import json
from pathlib import Path

from neuromas.system.files import read_file

BUNDLED = Path(__file__).parent
MOST_LAYERS = 1000


def find_backbone(name: str) -> str:
    """Return where a backbone's files are; ValueError if it is meant as a folder and is none."""
    source = str(BUNDLED) if name == "bundled" else name
    path = Path(source)
    if (path.is_absolute() or source.startswith(".")) and not (path / "config.json").is_file():
        raise ValueError(f"--backbone {name}: expected a folder with a config.json, found none")
    _check_layers(name, path / "config.json")
    return source


def _check_layers(name: str, path: Path) -> None:
    """Raise ValueError for a config that would take forever to lay out."""
    try:
        config = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        # A model of the hub, or one of which whoever loads it says what is wrong.
        return
    for part in (config, config.get("text_config")) if isinstance(config, dict) else ():
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise ValueError(f"--backbone {name}: its config has {layers:,} layers, at most {MOST_LAYERS:,} are read")
