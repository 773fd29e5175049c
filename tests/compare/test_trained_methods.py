"""Trained methods from end to end on tiny backbones, and the settings that they need: roles, votes, trees, a shared adapter.

1. Single-LLM RL, the shared adapter and NeuroMAS-3 have equally many trainable parameters, as given or by default.
2. A cell that was stopped goes on, and ends as if it had not been.
3. What is reported is what was spent.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import load_backbone, make_model, randomise, save_model

from neuromas import Backbone, Network, Topology
from neuromas.compare.code_version import sources_of
from neuromas.compare.grid import find_method
from neuromas.compare.methods import METHODS, CellResult, CellSpec
from neuromas.compare.methods.gptswarm import GPTSwarm
from neuromas.compare.methods.marft import MARFT_ROLES
from neuromas.compare.methods.networks import MALT_ROLES, ROLES, Trained
from neuromas.compare.methods.paper_sizes import paper_sizes
from neuromas.config import AdapterConfig, PromptConfig, TopologyConfig, TrainConfig
from neuromas.model.sizes import sizes
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.tasks import Navigate, get_task
from neuromas.training.load_run import load_run
from neuromas.training.loop import train_step
from neuromas.training.plan import resolve
from neuromas.training.reinforce import advantages
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import set_up
from neuromas.training.trainer import Trainer
from neuromas.types import Example, Request

pytestmark = pytest.mark.runs

EXAMPLE = Example("a", "Question a?", "Yes", Navigate.answer_format)
SMALL = AdapterConfig(rank=2, target_modules=("q_proj", "v_proj"))
STEPS = 3

Cell = Callable[[str], CellResult]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a backbone that rarely writes anything but Yes, No or nothing."""
    return save_model(make_model("qwen3", says=("Yes", "No")), tmp_path_factory.mktemp("speaker"))


@pytest.fixture
def spec(folder: Path) -> CellSpec:
    config = TrainConfig(
        backbone=str(folder), device="cpu", adapter=SMALL, num_steps=STEPS, examples_per_step=1, group_size=8,
        max_new_tokens=3, eval_size=6, eval_every=2, validation_size=4, save_every=2, lr=0.01,
    )  # fmt: skip
    return CellSpec("", config)


def trained(name: str) -> Trained:
    method = METHODS[name]
    assert isinstance(method, Trained)
    return method


# Cells


@pytest.fixture(scope="module")
def results() -> dict[str, CellResult]:
    """Cells that were run, by method: each is run once for all tests that use it."""
    return {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def cell(spec: CellSpec, results: dict[str, CellResult], runs: Path) -> Cell:
    """Return a function that runs a method in the folder of the run that it shares."""

    def run(name: str) -> CellResult:
        if name not in results:
            results[name] = METHODS[name].run(spec, runs / trained(name).trains_as)
        return results[name]

    return run


CALLS = {
    "single_rl": 1, "single_rl_vote_3": 3, "shared_adapter": 3, "neuromas_roles": 3, "magrpo": 3, "malt": 3, "neuromas_3": 3,
    "neuromas_5": 5, "neuromas_7": 7, "collm_dc": 3, "marft": 3, "at_grpo": 3,
}  # fmt: skip
"""Calls of an answer and of a training rollout, which has one vote."""
REPLAYED = {"at_grpo": 7 * 2 + 7}
"""Calls of a question's replays: 7 more texts of node 2, which node 3 answers, and 7 more of node 3."""


@pytest.mark.parametrize("name", CALLS)
def test_a_trained_cell_reports_answers_parameters_training_and_curve(spec: CellSpec, cell: Cell, name: str) -> None:
    result: CellResult = cell(name)
    assert (result.method, result.task, result.seed) == (name, "navigate", 0)
    wanted = get_task("navigate").examples("test", 6)
    answers = result.answers["test"]
    assert [(a.example, a.gold) for a in answers] == [(e.id, e.answer) for e in wanted]
    assert {a.calls for a in answers} == {CALLS[name]}
    assert {a.reward for a in answers} <= {0.0, 1.0}
    assert all((a.reward == 1.0) == (a.given == a.gold) for a in answers)
    assert all(a.calls <= a.sampled_tokens <= 3 * a.calls < a.prompt_tokens for a in answers)
    assert result.training is not None
    rollouts = STEPS * 8
    calls_a_rollout = CALLS[name] // trained(name).votes
    assert (result.training["steps"], result.training["questions"]) == (STEPS, STEPS)
    assert result.training["optimizer_steps"] <= STEPS
    assert (result.training["rollouts"], result.training["calls"]) == (
        rollouts, rollouts * calls_a_rollout + STEPS * REPLAYED.get(name, 0),
    )  # fmt: skip
    assert result.training["trainable_parameters"] == result.trainable_parameters
    first, last = result.curve
    assert (first.step, last.step) == (2, STEPS)
    assert 0 < first.sampled_tokens < last.sampled_tokens == result.training["sampled_tokens"]
    assert 0 <= first.accuracy <= 1
    # The first of equals is the best.
    assert result.best_step == (2 if first.accuracy >= last.accuracy else STEPS)
    assert [a.example for a in result.best_answers["test"]] == [a.example for a in answers]
    assert result.settings["lr"] == 0.01


def test_equal_parameters_for_any_graph(cell: Cell) -> None:
    # Two layers; q_proj 32 + 32 features, v_proj 32 + 16, rank 2: 2 * 2 * 112 a node.
    node = 448
    counts = {name: cell(name).trainable_parameters for name in CALLS}
    assert counts == dict.fromkeys(CALLS, 3 * node) | {"neuromas_5": 5 * node, "neuromas_7": 7 * node}
    assert {cell(name).settings["rank"] for name in ("single_rl", "single_rl_vote_3", "shared_adapter")} == {6}


@pytest.mark.parametrize("adapter", [AdapterConfig(), AdapterConfig(budget=40_000), AdapterConfig(rank=4, alpha=2.0)])
def test_equal_parameters_however_the_rank_is_given(spec: CellSpec, adapter: AdapterConfig) -> None:
    config = replace(spec.config, adapter=adapter)
    changed = [trained(name).change(config) for name in ("neuromas_3", "single_rl", "shared_adapter", "magrpo", "malt")]
    counts = [sizes(each.check()) for each in changed]
    # A budget leaves over what is less than one more rank of three nodes.
    spread = max(count.trainable for count in counts) - min(count.trainable for count in counts)
    assert spread <= (2 * counts[0].per_adapter // counts[0].rank if adapter.budget else 0)
    scales = {(each.adapter.alpha or 2.0 * count.rank) / count.rank for each, count in zip(changed, counts, strict=True)}
    assert len(scales) == 1


@pytest.mark.parametrize(
    ("name", "stages"),
    [("neuromas_5_grown", [5]), ("neuromas_7_grown", [5, 7]), ("neuromas_7_annealed", [5, 7])],
)
def test_a_network_that_grows_ends_as_large_as_one_from_scratch(
    spec: CellSpec, tmp_path: Path, name: str, stages: list[int]
) -> None:
    steps = 2 * (len(stages) + 1)
    config = replace(spec.config, num_steps=steps, max_new_tokens=2)
    changed = trained(name).change(config).check()
    assert [len(growth.grown.nodes) for growth in changed.growths()] == stages
    assert sizes(changed).trainable == sizes(trained(name[:10]).change(config).check()).trainable
    result = METHODS[name].run(replace(spec, config=config), tmp_path)
    assert result.trainable_parameters == sizes(changed).trainable
    assert {answer.calls for answer in result.answers["test"]} == {stages[-1]}
    assert result.training
    assert result.training["steps"] == steps


def test_a_network_that_grows_needs_steps_for_each_stage(spec: CellSpec) -> None:
    with pytest.raises(ValueError, match="--num-steps of at least 6, got 5"):
        trained("neuromas_7_grown").change(replace(spec.config, num_steps=5))


def test_a_bonus_for_form_is_learned_from_and_not_reported_as_reward(spec: CellSpec, tmp_path: Path) -> None:
    plain, shaped = (trained(name).change(spec.config) for name in ("neuromas_3", "neuromas_3_shaped"))
    assert shaped == replace(plain, format_bonus=0.2)
    seen = {}
    for name, config in {"plain": plain, "shaped": shaped}.items():
        run = RunDirectory.create(replace(config, run_dir=tmp_path / name, num_steps=1))
        run.initialise()
        trainer = Trainer(set_up(resolve(run.config)), run)
        metrics = train_step(trainer)
        seen[name] = (metrics["reward/mean"], metrics["signal/frac"], trainer.running_mean)
    # The same rollouts: the reward that is logged is the terminal one, what is learned from is more.
    assert seen["plain"][0] == seen["shaped"][0]
    assert seen["plain"][1] <= seen["shaped"][1]
    assert seen["plain"][2] < seen["shaped"][2] <= seen["plain"][2] + 0.2


def test_the_parameters_of_the_paper_from_its_configuration_alone() -> None:
    assert {title: size.trainable for title, size in paper_sizes().items()} == {
        "Single-LLM RL": 6_881_280, "NeuroMAS-3": 6_881_280, "NeuroMAS-5": 11_468_800, "NeuroMAS-7": 16_056_320,
    }  # fmt: skip
    assert f"{paper_sizes()['NeuroMAS-3'].backbone / 1e6:.0f}M" == "596M"


def test_a_stopped_cell_goes_on_as_if_it_had_not_been(spec: CellSpec, cell: Cell, tmp_path: Path) -> None:
    config = replace(trained("neuromas_3").change(spec.config), run_dir=tmp_path / "run")
    run, setup = RunDirectory.create(config), set_up(resolve(config))
    run.initialise(setup.plan.questions.task.held_out, setup.plan.questions.checksums())
    trainer = Trainer(setup, run)
    for _step in range(2):
        train_step(trainer)
    trainer.save()
    assert METHODS["neuromas_3"].run(spec, tmp_path) == replace(
        cell("neuromas_3"), settings={**cell("neuromas_3").settings, "run_dir": str(tmp_path / "run")}
    )


def test_votes_use_the_run_of_the_single_model(spec: CellSpec, cell: Cell, runs: Path) -> None:
    first = cell("single_rl")
    checkpoint = runs / "single_rl" / "run" / "checkpoints" / f"step-{STEPS:06d}" / "state.json"
    written = checkpoint.stat().st_mtime_ns
    second = METHODS["single_rl_vote_3"].run(spec, runs / "single_rl")
    assert checkpoint.stat().st_mtime_ns == written
    assert (second.training, second.curve) == (first.training, first.curve)
    assert second.answers == cell("single_rl_vote_3").answers


@pytest.mark.parametrize("name", ["direct", "self_consistency", "debate", "neuromas_untrained"])
def test_untrained_cells_answer_on_a_backbone(spec: CellSpec, tmp_path: Path, name: str) -> None:
    result = METHODS[name].run(spec, tmp_path)
    calls = {"direct": 1, "self_consistency": 3, "debate": 6, "neuromas_untrained": 3}[name]
    assert {a.calls for a in result.answers["test"]} == {calls}
    assert [a.example for a in result.answers["test"]] == [e.id for e in get_task("navigate").examples("test", 6)]
    assert (result.trainable_parameters, result.training, result.curve) == (0, None, ())
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_cell_draws_by_the_seed(spec: CellSpec, tmp_path: Path) -> None:
    def given(seed: int) -> list[tuple[str | None, int]]:
        result = METHODS["more_agents"].run(CellSpec("", replace(spec.config, seed=seed)), tmp_path)
        return [(a.given, a.sampled_tokens) for a in result.answers["test"]]

    assert given(0) == given(0) != given(1)


def test_a_swarm_cell_counts_its_learning(spec: CellSpec, tmp_path: Path) -> None:
    result = GPTSwarm(iterations=2).run(spec, tmp_path)
    assert result.training is not None
    assert (result.training["rollouts"], result.trainable_parameters) == (8, 36)
    assert result.settings["edges"]
    assert len(result.answers["test"]) == 6


# What networks can do for these methods


TERSE = PromptConfig(wording="terse")


def prompts_of(name: str, spec: CellSpec, backbone: Backbone) -> dict[int, str]:
    """Return what each node of a method's network reads after the question, if nodes name themselves."""
    config = trained(name).change(spec.config).check()
    topology = config.topology.build()

    def say(request: Request) -> str:
        whole = backbone.detokenize((*request.prompt.prefix_ids, *request.prompt.suffix_ids))
        read[request.node] = whole.split("\n\n", 1)[1]
        return " ".join(f"TO node {r}: {request.node}" for r in topology.recipients(request.node)) or "Answer: Yes"

    read: dict[int, str] = {}
    network = Network(
        topology, backbone, adapter=config.adapter, engine=ScriptedEngine(say), read=get_task("navigate").parse_answer,
        prompt=TERSE,
    )  # fmt: skip
    network.rollout([EXAMPLE], 1, seed=(0,))
    return read


def test_roles_are_read_and_nothing_else_differs(spec: CellSpec, folder: Path) -> None:
    plain = prompts_of("neuromas_3", spec, load_backbone(folder))
    with_roles = prompts_of("neuromas_roles", spec, load_backbone(folder))
    for node, role in enumerate(ROLES, start=1):
        first, rest = plain[node].split("\n", 1)
        assert with_roles[node] == f"{first}\n{role}\n{rest}"


def test_roles_are_as_many_as_nodes() -> None:
    with pytest.raises(ValueError, match=r"topology\.roles must be 3 sentences, one for each node, or none, got 1"):
        TopologyConfig(roles=("You plan.",)).build()


def test_a_malt_refiner_reads_answer_and_criticism(spec: CellSpec, folder: Path) -> None:
    read = prompts_of("malt", spec, load_backbone(folder))
    assert [read[node].splitlines()[1] for node in (1, 2, 3)] == list(MALT_ROLES)
    assert read[2].splitlines()[2] == "From node 1: 1"
    assert read[3].splitlines()[2:5] == ["From node 1: 1", "From node 2: 2", Navigate.answer_format]


def test_parallel_agents_all_answer_and_the_majority_is_the_answer(spec: CellSpec, folder: Path) -> None:
    read = prompts_of("magrpo", spec, load_backbone(folder))
    assert [read[node].splitlines()[:2] for node in (1, 2, 3)] == [
        [f"You are node {node} in the output layer.", Navigate.answer_format] for node in (1, 2, 3)
    ]
    says = {1: "Answer: No", 2: "so Answer: Yes", 3: "Answer: Yes"}
    topology = Topology.layered([3], vote=True)
    network = Network(
        topology, load_backbone(folder), adapter=SMALL, engine=ScriptedEngine(lambda request: says[request.node]),
        read=get_task("navigate").parse_answer, prompt=TERSE,
    )  # fmt: skip
    ((rollout,),) = network.rollout([EXAMPLE], 1, seed=(0,))
    assert (rollout.answer, rollout.winner) == ("so Answer: Yes", 1)
    assert [completion.node for completion in rollout.completions] == [1, 2, 3]


def test_several_answers_want_a_vote() -> None:
    with pytest.raises(ValueError, match=r"topology\.widths must end in 1"):
        TopologyConfig(widths=(3,)).build()
    with pytest.raises(ValueError, match=r"--topology\.vote must be left out with --topology.edges, got True"):
        TopologyConfig(edges=((1, 2),), vote=True).build()


def test_rollouts_of_a_tree_share_what_comes_before_their_branches(folder: Path) -> None:
    engine = ScriptedEngine(lambda request: f"TO node 2: {request.seed[-2]} TO node 3: {request.seed[-2]}")
    topology = Topology.layered([1, 1, 1], skip=True)
    network = Network(topology, load_backbone(folder), adapter=SMALL, engine=engine)
    network.rollout([EXAMPLE], 8, seed=(0,), branches=2)
    drawn = {node: [request.seed[-2] for request in engine.requests if request.node == node] for node in (1, 2, 3)}
    assert drawn == {1: [0] * 4 + [1] * 4, 2: [0, 0, 1, 1, 2, 2, 3, 3], 3: list(range(8))}


def test_other_trained_teams_differ_in_shape_and_credit(spec: CellSpec) -> None:
    plain = trained("neuromas_3").change(spec.config)
    side_by_side = TopologyConfig(widths=(3,), vote=True)
    assert trained("collm_cc").change(spec.config) == replace(plain, topology=side_by_side, credit="central_critic")
    assert trained("collm_dc").change(spec.config) == replace(plain, topology=side_by_side, credit="own_critics")
    assert trained("at_grpo").change(spec.config) == replace(
        trained("neuromas_roles").change(spec.config), credit="turn_groups"
    )
    sequence = TopologyConfig(widths=(1, 1, 1), skip=True, roles=MARFT_ROLES)
    assert trained("marft").change(spec.config) == replace(plain, topology=sequence, credit="sequential_critic")


def test_any_trained_network_may_have_another_credit_scheme(spec: CellSpec) -> None:
    method = find_method("single_rl_vote_3:value")
    assert isinstance(method, Trained)
    assert (method.name, method.trains_as, method.votes) == ("single_rl_vote_3:value", "single_rl:value", 3)
    assert method.title == "Single-LLM RL + vote@3, credit value"
    # A method that is its credit scheme is another one without it.
    assert find_method("collm_cc:replay").title == "CoLLM-CC-style, one critic, credit replay in place of central_critic"
    assert method.change(spec.config) == replace(trained("single_rl").change(spec.config), credit="value")
    # A change of the file that defines the method makes its cells anew.
    assert b"def collm_cc" in sources_of(find_method("collm_cc:value"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("neuromas_3:", "method neuromas_3:: the part after the colon must be one of shared, per_node, replay, "),
        ("neuromas_3:luck", "method neuromas_3:luck: the part after the colon must be one of shared, per_node, replay, "),
        ("debate:replay", "method debate:replay: debate trains no network by the common loop; leave out :replay"),
        ("malt:replay", "method malt:replay: --branches must be left out with --credit replay, got 2"),
        ("magrpo:tree", "method magrpo:tree: --centring must be left out with --credit tree, got 'group_mean'"),
    ],
)
def test_a_credit_scheme_that_does_not_fit_is_told(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        find_method(name)


def test_a_tree_gives_each_text_the_value_of_its_leaves() -> None:
    """Return the weight of a text that rollouts share in the sum over them, for the 8 rewards of a tree of 2 branches."""
    leaves = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
    summed = advantages(leaves, "leave_one_out", shared_by=4).view(2, 4).sum(1)
    # Values of the two first texts: 3/4 and 1/4. What is left out is the other one's: four leaves, each 3/4 - 1/4 on average.
    assert summed.tolist() == pytest.approx([2.0, -2.0])


def test_a_tree_has_as_many_leaves_as_rollouts(spec: CellSpec) -> None:
    with pytest.raises(ValueError, match="--group-size must be 8 with --branches 2 and 3 layers, got 4"):
        replace(spec.config, branches=2, group_size=4).check()
    with pytest.raises(ValueError, match="malt: --group-size must be a cube"):
        trained("malt").change(replace(spec.config, group_size=16))
    assert trained("malt").change(replace(spec.config, group_size=27)).branches == 3


def test_one_adapter_serves_all_nodes_and_is_stored_and_loaded(spec: CellSpec, tmp_path: Path) -> None:
    config = replace(trained("shared_adapter").change(spec.config), run_dir=tmp_path / "run")
    run, setup = RunDirectory.create(config), set_up(resolve(config))
    run.initialise(setup.plan.questions.task.held_out, setup.plan.questions.checksums())
    trainer = Trainer(setup, run)
    randomise(trainer.bank)
    metrics = train_step(trainer)
    trainer.save()
    assert [trainer.network.policy.routing.adapter_of(node) for node in (1, 2, 3)] == [0, 0, 0]
    # What was sampled is what the learner recomputes: both read through the one adapter.
    assert metrics["logprob_gap/max"] < 1e-4
    assert [path.name for path in (tmp_path / "run" / "adapters").iterdir()] == ["1"]
    loaded = load_run(tmp_path / "run").network
    for name, tensor in trainer.bank.parameters().items():
        assert torch.equal(loaded.adapters.parameters()[name], tensor)
    assert loaded.ask("Question a?").answer == trainer.network.ask("Question a?").answer
