"""Reads the records of a dataset on the Hugging Face hub; an error is one line that names the alternative."""

import logging
from collections.abc import Mapping

from neuromas.system.terminal import in_short
from neuromas.tasks.item_files import Record

PROBE_SECONDS = 5.0
"""Most seconds that the hub may take to answer a first request."""


def load(task: str, hub_id: str, config: str | None, splits: Mapping[str, str]) -> dict[str, list[Record]]:
    """Return the records of each split by our names; from the cache of `datasets` if the hub does not answer.

    Raises ValueError, of one line and within seconds, if they are not available.
    """
    import datasets  # these take a second to import, and tasks from files do not need them
    import datasets.config
    import huggingface_hub

    unreachable = None
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(hub_id, timeout=PROBE_SECONDS)
    except Exception as error:
        # Any error: a proxy, a name that does not resolve, a gated dataset. The cache may still have the data.
        unreachable = error
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    logging.getLogger("datasets").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    records: dict[str, list[Record]] = {}
    for name, hub_name in splits.items():
        try:
            rows = datasets.load_dataset(hub_id, config, split=hub_name)
        except Exception as error:
            raise ValueError(
                f"task {task}: {hub_id} cannot be read from the Hugging Face hub ({in_short(unreachable or error)}); "
                "give its files instead: --task.data FILE or FOLDER (docs/tasks.md says which)"
            ) from error
        source = f"{hub_id} {config or ''} {hub_name}"
        records[name] = [Record(f"{source}, row {number}", row) for number, row in enumerate(rows, start=1)]  # type: ignore[arg-type]  # rows are dicts
    return records
