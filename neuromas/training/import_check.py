"""Whether an export's adapters are those of the backbone and the network that are here."""

from pathlib import Path

from safetensors import SafetensorError

from neuromas.training.exported import Export
from neuromas.training.load_run import network_at
from neuromas.training.setup import build_society


def check_weights(export: Export, folder: Path) -> None:
    """Load the backbone and each adapter; ValueError if the backbone has other weights, or an adapter other shapes."""
    config = export.config
    answering = build_society(config) if config.society.rounds else network_at(config, export.step)
    if (found := answering.backbone.checksum()) != (stored := export.head["backbone_checksum"]):
        raise ValueError(
            f"--backbone {config.backbone} has other weights (checksum {found}) than the adapters in {folder} were trained on "
            f"({stored}); name that backbone by --backbone"
        )
    for node in answering.adapters.nodes:
        try:
            answering.adapters.load_peft(node, folder / "adapters" / str(node))
        except SafetensorError as error:
            raise ValueError(f"export {folder}: the adapter of node {node} is no safetensors file ({error})") from error
