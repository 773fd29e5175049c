"""The bundled backbone."""

from pathlib import Path

BUNDLED = Path(__file__).parent
