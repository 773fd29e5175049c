"""Cells on a Ray cluster: every cell once, whatever happens to the nodes."""

import json
import time
from pathlib import Path

import pytest
from clusters import HERE, add_node, cluster, kill_node, start
from paths import RIVALS

# Ray leaves processes and files of its own to the end of this one.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
CELLS = 40
METHOD, KILLED = f"class:{HERE / 'clusters.py'}:Placed", f"class:{RIVALS}:Killed"
GRID = f"""
methods = ["{METHOD}"]
reference = "{METHOD}"
tasks = ["navigate"]
seeds = {list(range(CELLS))}
[train]
eval_size = 12
num_steps = 6
"""


def test_40_cells_over_three_nodes_of_which_one_is_killed_and_one_joins(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    out = tmp_path / "out"
    with cluster(3) as (nodes, (first, second, third)):
        process = start(nodes.address, "compare", "grid.toml", "--workers", "ray", "--out", str(out), cwd=tmp_path)
        while len(list(out.glob("cells/*.json"))) < 8:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        kill_node(second)
        joined = add_node(nodes)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        # A cell that kills its process each time costs itself alone.
        (tmp_path / "grid.toml").write_text(GRID.replace(METHOD, KILLED).replace(str(list(range(CELLS))), "[0, 1]"))
        process = start(nodes.address, "compare", "grid.toml", "--workers", "ray", "--out", "other", cwd=tmp_path)
        assert "its process died 4 times (WorkerCrashedError)" in process.communicate(timeout=300)[1]
        assert len(list(tmp_path.glob("other/cells/*.json"))) == 2
        used = {node_id for path in out.glob("runs/*/nodes") for node_id in path.read_text().split()}
        assert used == {node.node_id for node in (first, second, third, joined)}
    stored = [json.loads(path.read_text()) for path in out.glob("cells/*.json")]
    assert sorted(cell["config"]["seed"] for cell in stored) == list(range(CELLS))
    assert not [cell["error"] for cell in stored if cell["error"]]
    assert err.count("right on test") == CELLS
    begun = [len(path.read_text().split()) for path in out.glob("runs/*/nodes")]
    # The one that the killed node was making was begun twice.
    assert sorted(set(begun)) == [1, 2]
    assert begun.count(2) == 1
