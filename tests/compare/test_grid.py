"""Comparison files: what they resolve to, and one clear line for what is wrong with them."""

import re
from pathlib import Path
from typing import Any

import pytest
from paths import CONFIGS, DOCS, RIVALS

from neuromas.compare.grid import Grid, find_method, load_grid
from neuromas.compare.methods.networks import Trained
from neuromas.compare.run import check_questions, with_dtypes
from neuromas.config import TrainConfig
from neuromas.graph.topology import Topology
from neuromas.types import Example

PRESETS = ("bundled", "paper_table1", "backbone_sweep")
HEAD = 'methods = ["direct", "single_rl", "neuromas_3"]\ntasks = ["navigate", "web_of_lies"]\nseeds = [0, 1]\n'


def load(tmp_path: Path, text: str, quick: bool = False) -> Grid:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_grid(path, quick=quick)


def test_cells_go_seed_by_seed_with_every_method_on_the_same_settings(tmp_path: Path) -> None:
    grid = load(tmp_path, HEAD)
    assert [(c.method, c.config.task.name, c.config.seed) for c in grid.cells][:4] == [
        ("direct", "navigate", 0), ("single_rl", "navigate", 0), ("neuromas_3", "navigate", 0), ("direct", "web_of_lies", 0),
    ]  # fmt: skip
    assert [c.config.seed for c in grid.cells] == [0] * 6 + [1] * 6
    assert {c.config.backbone for c in grid.cells} == {"bundled"}


def test_cells_say_which_number_format_auto_is_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []
    monkeypatch.setattr("neuromas.compare.run.resolve_dtype", lambda *what: asked.append(what) or "bfloat16")
    grid = with_dtypes(load(tmp_path, HEAD + '[train]\ndtype = "auto"\n[task.web_of_lies]\ndtype = "float32"\n'))
    assert {(c.config.task.name, c.config.dtype) for c in grid.cells} == {("navigate", "bfloat16"), ("web_of_lies", "float32")}
    assert asked == [("auto", "bundled", "auto")]


def test_a_long_call_on_a_real_model_is_told_that_it_may_work_and_how_to_end() -> None:
    """Its turn is not begun by the answer, so that it has a use of its length."""
    long = [c.config.prompt for c in load_grid(CONFIGS / "real.toml").cells if c.method.startswith("single_rl_long")]
    assert long
    example = Example("", "", "", 'Write "Answer: Yes" or "Answer: No".')
    told = "You are node 1 in the output layer. You may work first; end with the answer.\n" + example.answer_format
    for wording in {prompt.build() for prompt in long}:
        assert wording.begins((), example.answer_format) == ()
        assert wording.render(Topology.layered([1]), 1, example, []) == told


def test_settings_lie_over_each_other(tmp_path: Path) -> None:
    text = HEAD + (
        "[train]\nlr = 1e-4\nnum_steps = 50\neval_size = 7\n[task.web_of_lies]\nlr = 2e-4\nmax_new_tokens = 9\n"
        "[method.single_rl]\nlr = 3e-4\n[method.single_rl.adapter]\nrank = 48\n"
        '[quick]\nseeds = [3]\ntasks = ["web_of_lies"]\n[quick.train]\nnum_steps = 2\n'
    )
    full = {(c.method, c.config.task.name): c.config for c in load(tmp_path, text).cells}
    assert [full[key].lr for key in (("direct", "navigate"), ("direct", "web_of_lies"), ("single_rl", "web_of_lies"))] == [
        1e-4, 2e-4, 3e-4,
    ]  # fmt: skip
    assert (full["direct", "web_of_lies"].max_new_tokens, full["single_rl", "navigate"].adapter.rank) == (9, 48)
    quick = load(tmp_path, text, quick=True)
    assert {(c.config.task.name, c.config.seed, c.config.num_steps, c.config.eval_size) for c in quick.cells} == {
        ("web_of_lies", 3, 2, 7)
    }
    assert quick.name == "mine-quick"


def test_the_reference_meets_every_method_that_no_pair_names(tmp_path: Path) -> None:
    text = 'reference = "single_rl"\nmatched = ["calls_per_answer"]\ntolerance = 0.1\n' + HEAD
    text += '[[pairs]]\ncompare = ["neuromas_3", "single_rl"]\nmatched = ["updates"]\nasks = "Why?"\ntolerance = 0\n'
    pairs = load(tmp_path, text).pairs
    assert [(p.first, p.second, p.matched, p.tolerance, p.asks) for p in pairs] == [
        ("neuromas_3", "single_rl", ("updates",), 0.0, "Why?"), ("direct", "single_rl", ("calls_per_answer",), 0.1, ""),
    ]  # fmt: skip
    short = load(tmp_path, text + '[quick]\nmethods = ["direct", "single_rl"]\n', quick=True)
    assert [(p.first, p.second) for p in short.pairs] == [("direct", "single_rl")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed = 1", r"unknown key 'seed'; known are backbones, .*tolerance"),
        ("[quick]\nfast = 1", "unknown key 'quick.fast'"),
        ("[train]\nspeed = 1", "unknown key 'train.speed'"),
        ("[train]\nseed = 1", r"\[train\] may not set 'seed': it is the same for all methods"),
        ("[train.engine]\nname = 'tinker'", "--engine tinker is for `neuromas train`; a comparison runs on torch or vllm"),
        ("[method.direct]\neval_size = 1", r"\[method.direct\] may not set 'eval_size'"),
        ("[method.malt]\nlr = 1", r"\[method.malt\] is about none of the methods direct, neuromas_3, single_rl"),
        ("[task.dyck]\nlr = 1", r"\[task.dyck\] is about none of the tasks navigate, web_of_lies"),
        ("[train]\nlr = -1.0", "direct on navigate: --lr must be above 0"),
        ("train = 1", "train must be a table, got 1"),
        ('reference = "malt"', "reference must be one of the methods direct, single_rl, neuromas_3, got 'malt'"),
        ('pairs = ["direct"]', r'pairs must hold \["METHOD", "METHOD"\] or tables, got \'direct\''),
        ("pairs = 3", "pairs must be a list, got 3"),
        ("pairs = [[[1], [2]]]", r"pairs.compare must name two of the methods .*, got \[\[1\], \[2\]\]"),
        ('reference = "direct"\npairs = [{compare = 3}]', "pairs.compare must name two of the methods .*, got 3"),
        ('matched = [["calls"]]\npairs = [["direct", "single_rl"]]', r"matched must name .*, got \[\['calls'\]\]"),
        ("[quick]\ntrain = 3", "quick: train must be a table, got 3"),
        ('pairs = [["direct", "malt"]]', r"pairs.compare must name two of the methods .*, got \['direct', 'malt'\]"),
        ('pairs = [["direct", "direct"]]', "pairs.compare must name two of the methods"),
        ('pairs = [["direct", "single_rl"]]', r"direct and single_rl: matched must name one or more of .*, got \[\]"),
        ('matched = ["money"]\npairs = [["direct", "single_rl"]]', r"matched must name .*calls_per_answer.*got \['money'\]"),
        ('[[pairs]]\ncompare = ["direct", "single_rl"]\nwhy = 1', "unknown key 'pairs.why'"),
        ("[tuning]\nseeds = [5]", r"tuning.lr must be a list of one or more learning rates above 0, such as 1e-3, got None"),
        ("[tuning]\nlr = [-1e-3]", r"tuning.lr must be a list .*, got \[-0.001\]"),
        ("[tuning]\nlr = [1e-3, 2e-3]", r"tuning.seeds must be one or more seeds of at least 0 that are not scored, got \[\]"),
        ("[tuning]\nlr = [1e-3, 2e-3]\nseeds = [1]", r"that are not scored, got \[1\] with scored seeds \[0, 1\]"),
        ("[tuning]\nlr = [1e-3]\nrank = [0]", r"tuning.rank must be at least 1, got \[0\]"),
        ("[tuning]\nlr = [1e-3]\nalpha = [1]", "unknown key 'tuning.alpha'; known are tuning.lr, tuning.rank, tuning.seeds"),
        ("[tuning]\nlr = [1e-3]\n[method.single_rl]\nlr = 1e-4", r"\[method.single_rl\] may not set 'lr': \[tuning\] chooses"),
        ("[method.neuromas_3.topology]\nwidths = [2, 1]", "topology is what neuromas_3 itself sets; .* class:FILE.py:NAME"),
        ("[train.topology]\nedges = [[1, 2]]", "topology is what direct itself sets"),
        ('tolerance = 2\nmatched = ["updates"]\npairs = [["direct", "single_rl"]]', "tolerance must be a share .*, got 2"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        # Keys come before tables.
        load(tmp_path, HEAD + change)
    assert "\n" not in str(raised.value)
    assert "mine.toml" in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"direct"', '"clever"', "method must be one of at_grpo, .* or class:FILE.py:CLASS, got 'clever'"),
        ('"direct"', '"class:nowhere.py:A"', "method class: must be followed by FILE.py:CLASS .*, got 'nowhere.py:A'"),
        ('"navigate"', '"chess"', "direct on chess: task must be one of"),
        ("[0, 1]", "[0, 0]", r"seeds must be a list of one or more different ints, got \[0, 0\]"),
        ("[0, 1]", "[-1]", r"seeds must be at least 0, got \[-1\]"),
        ("[0, 1]", '["a"]', "seeds must be a list"),
        ('tasks = ["navigate", "web_of_lies"]\n', "", "tasks must be a list of one or more different strs, got None"),
        ("seeds =", "seeds", "is not TOML"),
        ('"direct", "single_rl", "neuromas_3"', '"single_rl_long_continued"', "trains as long as neuromas_3; add that"),
    ],
)  # fmt: skip
def test_unknown_methods_tasks_and_seeds_are_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, HEAD.replace(old, new))


def test_a_class_that_lacks_something_is_no_method(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("class Empty: ...\n")
    with pytest.raises(
        ValueError, match=r"own.py must have a class or object 'Empty' with name, title, source, trained and run"
    ):
        load(tmp_path, HEAD.replace('"direct"', f'"class:{tmp_path}/own.py:Empty"'))


def test_a_team_of_ones_own_and_an_adapter_for_its_tokens_are_objects_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the page, by their names and in their file."""
    page = (DOCS / "compare.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (file,) = [text for text in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "jsonl:" in text]
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(program)
    Path("questions.jsonl").write_text("".join(f'{{"question": "Is {n} even?", "answer": "Yes"}}\n' for n in range(20)))
    grid = load(tmp_path, file)
    team, one = (find_method(name) for name in grid.methods)
    assert isinstance(team, Trained)
    assert isinstance(one, Trained)
    assert one.tokens_of == grid.methods[0]
    assert team.change(TrainConfig()).topology.build().edges == ((1, 2), (1, 3), (2, 4), (3, 4))
    assert one.change(TrainConfig()).max_new_tokens == 4 * TrainConfig().max_new_tokens


def test_settings_are_judged_as_the_method_changes_them(tmp_path: Path) -> None:
    lists = 'methods = ["collm_dc", "multiagent_ft", "neuromas_3:own_critics"]\ntasks = ["navigate"]\nseeds = [0]\n'
    text = lists + "[train]\ngroup_size = 1\n"
    grid = load(tmp_path, text)
    check_questions(grid)
    assert [spec.config.group_size for spec in grid.cells] == [1, 1, 1]
    message = "neuromas_3 on navigate: --group-size must be at least 2 with --centring leave_one_out, got 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, text.replace("neuromas_3:own_critics", "neuromas_3"))


def test_two_methods_may_not_have_one_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"methods class:\S+:Rival and class:\S+:Fine have the same name 'rival'"):
        load(tmp_path, HEAD.replace('"direct"', f'"class:{RIVALS}:Rival", "class:{RIVALS}:Fine"'))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_grid(tmp_path / "none.toml")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve(preset: str, quick: bool) -> None:
    grid = load_grid(CONFIGS / f"{preset}.toml", quick=quick)
    assert len(grid.cells) == len(grid.methods) * len(grid.tasks) * len(grid.seeds) * len(grid.backbones)
    assert {"single_rl", "neuromas_3", "single_rl_vote_3"} <= set(grid.methods)
    assert ("neuromas_3", "single_rl_vote_3") in {(pair.first, pair.second) for pair in grid.pairs}
    assert load_grid(CONFIGS / f"{preset}.toml", backbones=["bundled"]).backbones == ("bundled",)


def test_the_command_line_goes_before_the_lists_of_the_file() -> None:
    for quick in (False, True):
        grid = load_grid(CONFIGS / "bundled.toml", quick=quick, tasks=["dyck_languages"], seeds=[7, 8])
        assert (grid.tasks, grid.seeds) == (("dyck_languages",), (7, 8))
        assert {cell.config.seed for cell in grid.cells} == {7, 8}


@pytest.mark.parametrize("quick", [False, True])
def test_methods_of_the_command_line_leave_out_the_pairs_of_all_others(quick: bool) -> None:
    grid = load_grid(CONFIGS / "bundled.toml", quick=quick, methods=["single_rl", "neuromas_3"])
    assert grid.methods == ("single_rl", "neuromas_3")
    assert {cell.method for cell in grid.cells} == {"single_rl", "neuromas_3"}
    assert {frozenset((pair.first, pair.second)) for pair in grid.pairs} == {frozenset(grid.methods)}


def test_a_reference_that_the_command_line_leaves_out_has_no_pairs(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("""methods = ["single_rl", "neuromas_3", "shared_adapter"]
tasks = ["navigate"]
seeds = [0]
matched = ["training_steps"]
reference = "neuromas_3"
""")
    assert len(load_grid(path).pairs) == 2
    assert load_grid(path, methods=["single_rl", "shared_adapter"]).pairs == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["nosuchmethod"]}, "^--methods: method must be one of"),
        ({"methods": ["single_rl_continued"]}, "^--methods: method single_rl_continued trains as long as neuromas_3; add that"),
        ({"seeds": [1, 1]}, "^--seeds: seeds must be a list of one or more different ints"),
        ({"seeds": [-1]}, r"^--seeds: seeds must be at least 0, got \[-1\]"),
        ({"tasks": ["nosuchtask"]}, "^--tasks: direct on nosuchtask: task must be one of"),
        ({"backbones": ["a", "a"]}, "^--backbone: backbones must be a list"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_told_by_its_flag(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_grid(CONFIGS / "bundled.toml", **given)


def test_the_bundled_preset_covers_what_it_must_show() -> None:
    from neuromas.tasks import TASKS

    grid = load_grid(CONFIGS / "bundled.toml")
    larger = {f"tracking_shuffled_objects_{count}_objects" for count in ("five", "seven")}
    assert {"navigate", "dyck_languages"} <= set(grid.tasks) <= set(TASKS) - larger
    assert len(grid.tasks) >= 3
    assert len(grid.seeds) >= 5
    assert {"neuromas_3", "single_rl_vote_3", "shared_adapter", "single_rl_long_continued"} <= set(grid.methods)
    rivals = {pair.second: set(pair.matched) for pair in grid.pairs if pair.first == "neuromas_3"}
    assert "most_tokens_per_answer" in rivals["single_rl_long"]
    assert {"most_tokens_per_answer", "training_sampled_tokens"} <= rivals["single_rl_long_continued"]
    assert grid.tuning is not None
    assert len(grid.tuning.lrs) >= 3
    longest = {}
    for name in ("neuromas_3", "single_rl_long"):
        method = find_method(name)
        assert isinstance(method, Trained)
        longest[name] = method.change(next(spec.config for spec in grid.cells if spec.method == name)).max_new_tokens
    assert longest["single_rl_long"] == 3 * longest["neuromas_3"]


@pytest.mark.parametrize("quick", [False, True])
def test_the_path_dependence_preset_has_arms_that_differ_in_the_path_alone(quick: bool) -> None:
    grid = load_grid(CONFIGS / "path_dependence.toml", quick=quick)
    budgets = set()
    for spec in grid.cells:
        method = find_method(spec.method)
        assert isinstance(method, Trained)
        config = method.change(spec.config).check()
        budgets.add((config.num_steps, config.step_tokens, config.adapter.rank))
        growths = config.growths()
        # Stages are of one length, and what joins starts at zero.
        assert [growth.at_step * (len(growths) + 1) for growth in growths] == [
            config.num_steps * (k + 1) for k in range(len(growths))
        ]
        assert all(source is None for growth in growths for _, source in growth.copies)
    ((steps, step_tokens, rank),) = budgets
    assert step_tokens > 0
    assert rank == 8
    for pair in grid.pairs:
        assert set(pair.matched) == {"training_steps", "training_sampled_tokens"}
        # Each run may end one step's tokens from its budget; twice of that is apart, more is a mistake.
        assert 2 / steps <= pair.tolerance < 3 / steps
