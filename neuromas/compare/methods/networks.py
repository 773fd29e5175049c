"""NeuroMAS and the networks that it is compared with: all train by the same loop and differ in one thing each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import cast, get_args

from neuromas.compare.methods.method import CellResult, CellSpec, Method
from neuromas.config import AdapterConfig, Credit, GrowthConfig, TopologyConfig, TrainConfig
from neuromas.graph.growth import Opening

PAPER = "arXiv 2605.16757"
NODES = 3
"""Nodes of the network that a cell's settings describe: a given rank is that of one of its nodes."""

VOTE_TEMPERATURE = 0.7
"""The temperature of self-consistency (Wang et al. 2023)."""

FORMAT_BONUS = 0.2
THREE, FIVE, SEVEN = (1, 1, 1), (2, 2, 1), (2, 2, 2, 1)

ROLES = (
    "You are a planner: plan the steps.",
    "You are a solver: carry out the plan.",
    "You are a judge: check the work and answer.",
)


@dataclass(kw_only=True)
class Trained:
    """A method that trains a network. `change` turns a cell's settings into those that this method trains with.

    The run is `folder`/run. Methods of one `trains_as` train alike: given the same folder, the second one finds a finished run.
    """

    name: str
    title: str
    source: str
    change: Callable[[TrainConfig], TrainConfig]
    votes: int = 1
    """Rollouts of a question; the majority of the answers that the task can parse is the answer, ties go to the first."""
    temperature: float = 0.0
    """Temperature of those rollouts; 0 is greedy, as the paper evaluates."""
    trains_as: str = ""
    """Name of the method whose run this one uses; empty: its own name."""
    tokens_of: str = ""
    """Name of a method: training ends at as many sampled tokens as that method has on the same task with the same seed."""
    trained: bool = True

    def __post_init__(self) -> None:
        self.trains_as = self.trains_as or self.name

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        """Train in `folder`, or resume the run there, and answer the evaluation sets."""
        from neuromas.compare.methods.train_cell import run_trained  # loads torch

        return run_trained(self.name, self.change(spec.config), spec, folder, votes=self.votes, temperature=self.temperature)


@dataclass(kw_only=True)
class UntrainedNetwork:
    """The network before training: all adapters at zero."""

    name: str
    title: str
    source: str
    change: Callable[[TrainConfig], TrainConfig]
    trained: bool = False

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        """Answer the evaluation sets; nothing is written to `folder`."""
        from neuromas.compare.methods.train_cell import run_untrained_network  # loads torch

        return run_untrained_network(self.name, self.change(spec.config))


def with_credit(method: Method, credit: str) -> Trained:
    """Return a trained network's method with another credit scheme; ValueError if there is none such or it does not fit."""
    if not isinstance(method, Trained):
        raise ValueError(
            f"method {method.name}:{credit}: {method.name} trains no network by the common loop; leave out :{credit}"
        )
    schemes = get_args(Credit)
    if credit not in schemes:
        raise ValueError(f"method {method.name}:{credit}: the part after the colon must be one of {', '.join(schemes)}")

    # `wraps`: the version of a cell's code is that of the method's own file too.
    @wraps(method.change)
    def change(config: TrainConfig) -> TrainConfig:
        return replace(method.change(config), credit=cast(Credit, credit))

    try:
        change(TrainConfig()).check()
    except ValueError as error:
        raise ValueError(f"method {method.name}:{credit}: {error}") from error
    own = method.change(TrainConfig()).credit
    instead = "" if own in ("shared", credit) else f" in place of {own}"
    return replace(
        method, name=f"{method.name}:{credit}", title=f"{method.title}, credit {credit}{instead}", change=change,
        trains_as=f"{method.trains_as}:{credit}",
    )  # fmt: skip


def enlarged(adapter: AdapterConfig) -> AdapterConfig:
    """Return the settings of one adapter with as many parameters as the three nodes' together.

    A given rank is multiplied, and alpha with it, so that alpha / rank stays. A budget, or the default, already means all
    adapters together.
    """
    if adapter.rank is None:
        return adapter
    return replace(adapter, rank=NODES * adapter.rank, alpha=None if adapter.alpha is None else NODES * adapter.alpha)


def neuromas(*widths: int) -> Callable[[TrainConfig], TrainConfig]:
    """Return a change of settings that sets the layers; rank, budget and skip edges stay."""
    return lambda config: replace(config, topology=TopologyConfig(widths=widths, skip=config.topology.skip))


def grown(*stages: tuple[int, ...], opening: Opening = "immediate") -> Callable[[TrainConfig], TrainConfig]:
    """Return a change of settings that grows a network in stages of equally many steps; new adapters start at zero.

    Each stage has the learning rate's full warm-up and cosine, as the network from scratch has it.

    The paper opens new nodes immediately (`immediate`). An annealed opening takes half of its stage.
    """

    def change(config: TrainConfig) -> TrainConfig:
        each = config.num_steps // len(stages)
        if each < 2:
            raise ValueError(f"a network that grows needs --num-steps of at least {2 * len(stages)}, got {config.num_steps}")
        entries = [
            GrowthConfig(at_step=each * stage, widths=widths, opening=opening, open_steps=each // 2, restart_lr=True)
            for stage, widths in enumerate(stages[1:], start=1)
        ]
        return replace(neuromas(*stages[0])(config), growth=tuple(entries))

    return change


def shaped(config: TrainConfig) -> TrainConfig:
    """Return the settings of NeuroMAS-3 with a bonus for well-formed text on top of the terminal reward."""
    return replace(neuromas(*THREE)(config), format_bonus=config.format_bonus or FORMAT_BONUS)


def suffix_only(config: TrainConfig) -> TrainConfig:
    """Return the settings of NeuroMAS-3 whose adapters act only after the question: all nodes share its cache."""
    config = neuromas(*THREE)(config)
    return replace(config, adapter=replace(config.adapter, scope="suffix"))


def single(config: TrainConfig) -> TrainConfig:
    """Return the settings of one node with one adapter of as many parameters as the team's."""
    return replace(config, topology=TopologyConfig(widths=(1,)), adapter=enlarged(config.adapter))


def long(config: TrainConfig) -> TrainConfig:
    """Return the settings of `single` with a call that may be as long as the three nodes' together."""
    return replace(single(config), max_new_tokens=NODES * config.max_new_tokens)


def shared(config: TrainConfig) -> TrainConfig:
    """Return the settings of the same graph with one adapter in all nodes, of as many parameters as the team's."""
    config = neuromas(*THREE)(config)
    return replace(config, adapter=replace(enlarged(config.adapter), shared=True))


def with_roles(config: TrainConfig) -> TrainConfig:
    """Return the settings of NeuroMAS-3 with a role sentence for each node."""
    config = neuromas(*THREE)(config)
    return replace(config, topology=replace(config.topology, roles=ROLES))


def magrpo(config: TrainConfig) -> TrainConfig:
    """Return settings of agents side by side with one joint reward, minus the group's mean (Liu et al. 2025, arXiv 2508.04652).

    The source's agents write parts of one text (a helper and a main function), and it does not say how to join their answers to
    a question, so ours is their majority answer, ties go to the first. The source has 2 agents, full models, groups of 4, one
    or more turns, samples at 0.6 with top-p and top-k; we have 3 agents, adapters, the cell's group and temperature, all tokens
    and one turn, as matched budgets require. Rollout g pairs the agents' g-th texts (the source's mode `aligned`, not `cross`).
    """
    return replace(config, topology=TopologyConfig(widths=(NODES,), vote=True), centring="group_mean")


MALT_ROLES = (
    "You are a generator: answer the question.",
    "You are a verifier: say what is right and wrong in the answer.",
    "You are a refiner: weigh answer and criticism and give the final answer.",
)


def malt(config: TrainConfig) -> TrainConfig:
    """Return settings of generator, verifier and refiner, with credit by a search tree (Motwani et al. 2025, arXiv 2412.01928).

    Rollouts of a question are the leaves of a tree. In the sum over rollouts a text that several of them share is weighted with
    the sum of their advantages: the mean reward of its leaves, which is MALT's value of it, against that of all other leaves.
    Differs: on-policy REINFORCE by that value, where MALT labels texts above one half and trains offline by SFT and DPO, which
    compares texts at one prompt alone; as many branches as the group allows (2 with 8 rollouts), not 3; the cell's temperature,
    not 0.3; one pass to answer, not the majority of 3. Shared texts are sampled, and counted, once for each rollout that holds
    them, so that rollouts and calls match the other methods'.
    """
    branches = round(config.group_size ** (1 / NODES))
    if branches < 2 or branches**NODES != config.group_size:
        raise ValueError(f"malt: --group-size must be a cube (8, 27, ...): a tree of {NODES} layers, got {config.group_size}")
    return replace(config, topology=TopologyConfig(widths=(1, 1, 1), skip=True, roles=MALT_ROLES), branches=branches)


def _votes(votes: int) -> Trained:
    return Trained(
        name=f"single_rl_vote_{votes}",
        title=f"Single-LLM RL + vote@{votes}",
        source="Single-LLM RL, answers by self-consistency (Wang et al. 2023, arXiv 2203.11171)",
        change=single,
        votes=votes,
        temperature=VOTE_TEMPERATURE,
        trains_as="single_rl",
    )


METHODS = (
    UntrainedNetwork(
        name="neuromas_untrained",
        title="NeuroMAS-3, untrained",
        source=f"the network of {PAPER} before training",
        change=neuromas(*THREE),
    ),
    Trained(name="single_rl", title="Single-LLM RL", source=f"{PAPER}, the network of one node", change=single),
    *map(_votes, (3, 5, 7)),
    Trained(
        name="single_rl_continued",
        title="Single-LLM RL, trained on",
        source="control: the team's sampled tokens in training, by calls as short as one of its nodes'",
        change=single,
        tokens_of="neuromas_3",
    ),
    Trained(
        name="single_rl_long",
        title="Single-LLM RL, one long call",
        source="control: the team's most tokens in one call",
        change=long,
    ),
    Trained(
        name="single_rl_long_continued",
        title="Single-LLM RL, one long call, trained on",
        source="control: the team's most tokens in one call, and its sampled tokens in training",
        change=long,
        tokens_of="neuromas_3",
    ),
    Trained(name="shared_adapter", title="NeuroMAS-3, one shared adapter", source="control: structure alone", change=shared),
    Trained(name="neuromas_roles", title="NeuroMAS-3 with roles", source="control: role prompts", change=with_roles),
    Trained(
        name="magrpo",
        title="MAGRPO-style parallel agents",
        source="Liu et al. 2025, arXiv 2508.04652; repository OpenMLRL/CoMLRL",
        change=magrpo,
    ),
    Trained(name="malt", title="MALT-style chain", source="Motwani et al. 2025, arXiv 2412.01928", change=malt),
    Trained(name="neuromas_3", title="NeuroMAS-3", source=PAPER, change=neuromas(*THREE)),
    Trained(
        name="neuromas_3_suffix",
        title="NeuroMAS-3, adapters after the question",
        source="control: scope of the adapters",
        change=suffix_only,
    ),
    Trained(name="neuromas_3_shaped", title="NeuroMAS-3, shaped reward", source="control: a bonus for form", change=shaped),
    Trained(name="neuromas_5", title="NeuroMAS-5", source=f"{PAPER}, from scratch", change=neuromas(*FIVE)),
    Trained(name="neuromas_7", title="NeuroMAS-7", source=f"{PAPER}, from scratch", change=neuromas(*SEVEN)),
    Trained(name="neuromas_5_grown", title="NeuroMAS-5, grown", source=f"{PAPER}, grown", change=grown(THREE, FIVE)),
    Trained(name="neuromas_7_grown", title="NeuroMAS-7, grown", source=f"{PAPER}, grown", change=grown(THREE, FIVE, SEVEN)),
    Trained(
        name="neuromas_7_annealed",
        title="NeuroMAS-7, grown, annealed",
        source=f"{PAPER}, grown; opened gradually",
        change=grown(THREE, FIVE, SEVEN, opening="annealed"),
    ),
)
