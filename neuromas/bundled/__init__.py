"""The bundled backbone, and where any backbone's files are."""

from pathlib import Path

BUNDLED = Path(__file__).parent


def find_backbone(name: str) -> str:
    """Return where a backbone's files are; ValueError if it is meant as a folder and is none."""
    source = str(BUNDLED) if name == "bundled" else name
    path = Path(source)
    if (path.is_absolute() or source.startswith(".")) and not (path / "config.json").is_file():
        raise ValueError(f"--backbone {name}: expected a folder with a config.json, found none")
    return source
