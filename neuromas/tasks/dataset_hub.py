"""Records of a dataset on the Hugging Face hub, or one line that says how to do without it."""

import logging
from collections.abc import Mapping

from neuromas.tasks.item_files import Record

PROBE_SECONDS = 5.0
"""How long the hub may take to say that it is there."""


def load(task: str, hub_id: str, config: str | None, splits: Mapping[str, str]) -> dict[str, list[Record]]:
    """Return the records of each split, under our names; from the cache of `datasets` where the hub does not answer.

    Raises ValueError, of one line and within seconds, if they can't be had.
    """
    import datasets  # these take a second, and are not needed where files are given
    import datasets.config
    import huggingface_hub

    unreachable = None
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(hub_id, timeout=PROBE_SECONDS)
    except Exception as error:
        # Of whatever kind: a proxy, a name that does not resolve, a gate. The cache may still have it.
        unreachable = error
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    logging.getLogger("datasets").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    records: dict[str, list[Record]] = {}
    for name, hub_name in splits.items():
        try:
            rows = datasets.load_dataset(hub_id, config, split=hub_name)
        except Exception as error:
            reason = " ".join(str(unreachable or error).split())[:200]
            raise ValueError(
                f"task {task}: {hub_id} cannot be had from the Hugging Face hub ({reason}); "
                "give its files instead: --task.data FILE or FOLDER (docs/tasks.md says which)"
            ) from error
        place = f"{hub_id} {config or ''} {hub_name}"
        records[name] = [Record(f"{place}, row {number}", row) for number, row in enumerate(rows, start=1)]  # type: ignore[arg-type]  # rows are dicts
    return records
