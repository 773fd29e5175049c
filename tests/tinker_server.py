"""SkyRL's Tinker API on its JAX backend, in the environment of the Python that runs this file (make test-tinker makes one).

    python tests/tinker_server.py PORT MODEL FOLDER [ROWS]

FOLDER keeps the database and what is saved, so that a service that is started again has them. Every shape is compiled anew,
which takes longer than all else: samples are padded to ROWS rows, and rows are learned one by one.
"""

import os
import sys
from pathlib import Path

import uvicorn
from skyrl.tinker import api  # pyright: ignore[reportMissingImports]
from skyrl.tinker.config import EngineConfig, config_to_argv  # pyright: ignore[reportMissingImports]


def main(port: str, model: str, folder: str, rows: str = "32") -> None:
    # What was compiled serves the service that is started after this one too.
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    # SkyRL starts its engine by `uv run`, which would make an environment of its own.
    api._build_uv_run_cmd_engine = lambda parent, config: [
        sys.executable, "-m", "skyrl.tinker.engine", *config_to_argv(config),
    ]  # fmt: skip
    batches = {
        "max_lora_adapters": 16, "max_lora_rank": 8, "sample_max_num_sequences": int(rows), "train_micro_batch_size": 1,
    }  # fmt: skip
    api.app.state.engine_config = EngineConfig(
        base_model=model, backend="jax", backend_config=batches,
        checkpoints_base=Path(folder) / "checkpoints", database_url=f"sqlite:///{Path(folder) / 'tinker.db'}",
    )  # fmt: skip
    uvicorn.run(api.app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
