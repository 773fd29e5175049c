"""Every setting of a run: frozen dataclasses, filled from defaults, then a TOML file, then the command line.

Imports no torch, so `--help` and a wrong flag answer at once. A string under a field is its help text.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import tyro

from neuromas.graph import growth as growing
from neuromas.graph.growth import Growth, Opening
from neuromas.graph.society import SocietyConfig
from neuromas.graph.topology import Topology
from neuromas.graph.wording import WORDINGS, Wording, check_template
from neuromas.system.engines import EngineConfig
from neuromas.system.schema import require, require_finite, require_text

Scope = Literal["all", "suffix"]
Centring = Literal["leave_one_out", "group_mean", "ema", "none"]
Credit = Literal[
    "shared", "per_node", "replay", "removal", "tree", "value", "token_value", "central_critic", "own_critics",
    "sequential_critic", "turn_groups",
]  # fmt: skip
Device = Literal["auto", "cpu", "cuda"]
Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
Split = Literal["test", "validation", "train", "dev", "first200"]
VerifierName = Literal["exact", "choice", "number", "regex", "math", "python"]

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PROMPT_DATE = "2024-07-26"
"""The date that chat templates of Llama 3.2 and 4 name themselves where they are told none."""
MOST_TIMES_FIRST = 4
"""With a budget of tokens: times the first step's questions that a step asks at most."""
COLDEST = 1e-3
"""Temperature from which on logits divided by it are finite."""
LARGEST_RATE = 1e30
"""Learning rate up to which an optimizer's step is a number in float32; a run then diverges, and says so."""
MOST_COUNTED = 999_999
"""Of steps, whose checkpoints are named by six digits; and of questions and tokens of a text."""
MOST_ROLLOUTS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologyConfig:
    """The network's shape."""

    widths: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--widths"])] = (1, 1, 1)
    """Nodes per layer, ending in 1 (the output node) without --topology.vote. `1`: single-model reinforcement learning."""
    skip: bool = False
    """Connect every node to all later layers, not only to the next."""
    edges: tuple[tuple[int, int], ...] = ()
    """Explicit edges, e.g. 1 2 1 3 2 3, in place of widths; layers follow from them."""
    vote: bool = False
    """Let the last layer be wide: each of its nodes answers, and the majority of what the task can read is the answer, ties
    to the first."""
    roles: tuple[str, ...] = ()
    """A sentence for each node, in the order of ids, that it reads after its id and layer. Empty: nodes have no roles."""

    def build(self) -> Topology:
        """Return the topology; ValueError says what makes it no network."""
        for role in self.roles:
            require_text("--topology.roles", role)
        if self.edges:
            if self.skip or self.widths != TopologyConfig().widths:
                given = "--topology.skip" if self.skip else f"--topology.widths {list(self.widths)}"
                raise ValueError(
                    f"--topology.edges takes the place of widths and skip, got it and {given}; leave one of them out"
                )
            require(not self.vote, "--topology.vote", "left out with --topology.edges", self.vote)
            return Topology.from_edges(self.edges).with_roles(self.roles)
        return Topology.layered(self.widths, skip=self.skip, vote=self.vote).with_roles(self.roles)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """What is asked and how answers are checked."""

    name: Annotated[str, tyro.conf.arg(aliases=["--task"])] = "navigate"
    """What is asked: a name that `neuromas tasks` lists, or your own questions, jsonl:FILE or class:FILE.py:CLASS."""
    difficulty: int | None = None
    """How hard generated problems are, in the task's own unit (Navigate: sentences). None: as the published items."""
    file: Path | None = None
    """Evaluate on this file's examples too: BIG-Bench-Hard JSON, or JSONL with `question` and `answer`.
    Training never draws an example that is in it."""
    data: Path | None = None
    """File or folder of a benchmark's items. None: from the Hugging Face hub."""
    split: Split = "test"
    """What is scored before and after training; `first200` are the first 200 items of test."""
    verifier: VerifierName = "exact"
    """How the answers of a task jsonl:PATH are checked."""
    train_on_evaluation: bool = False
    """Train a benchmark on the very items that it is scored on. The score then says nothing about new questions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """How a node's own part of its prompt is worded, after the question. `neuromas tasks show NAME` prints it."""

    wording: Annotated[Literal["auto", "terse", "chat", "plain"], tyro.conf.arg(aliases=["--wording"])] = "auto"
    """`terse` is what the bundled backbone learned; `chat` is for models with a chat template, `plain` for base models: both
    begin a node's message and the answer for it. `auto` takes the one that fits the backbone."""
    place: str = ""
    """In place of the wording's first line; may hold {node} and {layer}."""
    message: str = ""
    """In place of its line for a received message; holds {sender} and {text}."""
    write: str = ""
    """In place of what a node with recipients is told; may hold {node}, {headers} and {recipients}."""
    answer: str = ""
    """In place of the task's answer format, which an output node or a single call is told; may hold {format}."""
    begin_messages: bool | None = None
    """Begin each message by its `TO node k:`, which is then not sampled. None: as the wording has it."""
    begin_answer: str | None = None
    """Words of the task's answer format that begin the output node's turn, e.g. "Answer:". "": none, it may work first."""

    def build(self, *, bundled: bool = False, has_chat_template: bool = True) -> Wording:
        """Return the wording for a backbone; ValueError names the setting that is wrong."""
        fitting = "terse" if bundled else "chat" if has_chat_template else "plain"
        wording = WORDINGS[fitting if self.wording == "auto" else self.wording]
        for name in ("place", "message", "write", "answer", "begin_answer"):
            require_text(f"--prompt.{name}", getattr(self, name) or "")
        for name in ("place", "message", "write", "answer"):
            if given := getattr(self, name):
                check_template(name, given, ("sender", "text") if name == "message" else ())
                wording = dataclasses.replace(wording, **{name: given})
        begins = {name: getattr(self, name) for name in ("begin_messages", "begin_answer") if getattr(self, name) is not None}
        return dataclasses.replace(wording, **begins)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """The trainable part: one LoRA adapter per node."""

    rank: int | None = None
    """Rank of each node's adapter. None: from the budget; if that is None too, 24 shared by all nodes, so that networks of
    1, 2, 3, 4, 6, 8 nodes have equally many trainable parameters."""
    budget: int | None = None
    """Trainable parameters of all nodes together; gives the largest rank that fits."""
    alpha: float | None = None
    """Scale of the update is alpha / rank. None: twice the rank."""
    target_modules: tuple[str, ...] = LINEAR_LAYERS
    """Linear layers that get an adapter, by the last part of their names. The paper's parameter count fits q_proj v_proj."""
    shared: bool = False
    """One adapter serves all nodes: of the given rank, or of the whole budget's."""
    scope: Scope = "all"
    """`all`: the adapter acts on every token (plain LoRA, what PEFT and vLLM serve). `suffix`: only after the question, whose
    computation all nodes then share."""

    def check(self) -> None:
        require(self.rank is None or self.rank >= 1, "--adapter.rank", "at least 1", self.rank)
        require(self.budget is None or self.budget >= 1, "--adapter.budget", "at least 1", self.budget)
        require(self.alpha is None or self.alpha > 0, "--adapter.alpha", "above 0", self.alpha)
        require(len(self.target_modules) > 0, "--adapter.target_modules", "one or more module names", self.target_modules)
        if self.rank is not None and self.budget is not None:
            raise ValueError("--adapter.rank and --adapter.budget exclude each other; give one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthConfig:
    """One growth in the course of a run: an entry `[[growth]]` of a TOML file, or the flags of `neuromas grow`."""

    at_step: Annotated[int, tyro.conf.Suppress] = 0
    """Training steps done before it."""
    widths: Annotated[tuple[int, ...], tyro.conf.arg(name="to")] = ()
    """Nodes per layer afterwards, ending in 1, e.g. 2 2 1. Empty: as before."""
    new_layers: tuple[int, ...] = ()
    """Which layers of these widths are new. Empty: the last ones before the output layer that need be."""
    connect: tuple[tuple[int, int], ...] = ()
    """Edges to add between nodes, e.g. 1 3; they may name new nodes."""
    edges: tuple[tuple[int, int], ...] = ()
    """All edges afterwards, in place of widths and --connect; old nodes keep their ids."""
    start: tuple[str, ...] = ("zero",)
    """Adapters of new nodes: zero or copy:NODE for all, NEW:zero or NEW:copy:NODE for one."""
    noise: float = 0.0
    """Normal noise on copies, as a share of the copied tensor's root mean square."""
    opening: Opening = "immediate"
    """`immediate`: every question runs through the grown network at once (the paper's). `annealed`: with a probability that
    rises from 0, at which the network is still its parent, to 1."""
    open_steps: int = 10
    """Steps over which an annealed opening rises."""
    warmup_new: int = 0
    """Steps in which new nodes alone learn."""
    restart_lr: Annotated[bool, tyro.conf.Suppress] = False
    """Begin a new warm-up and cosine of the learning rate here, to the next such growth or the end."""

    def build(self, parent: Topology, *, skip: bool) -> Growth:
        """Return the growth of this parent; ValueError says what makes it none."""
        require(self.noise >= 0, "growth.noise", "at least 0", self.noise)
        require(self.warmup_new >= 0, "growth.warmup_new", "at least 0", self.warmup_new)
        require(self.opening != "annealed" or self.open_steps >= 1, "growth.open_steps", "at least 1", self.open_steps)
        if self.edges and (self.widths or self.connect or self.new_layers):
            raise ValueError("growth.edges and growth.widths, new_layers, connect exclude each other; give one or the other")
        if self.new_layers and not self.widths:
            raise ValueError("growth.new_layers names layers of growth.widths; give both")
        grown = Topology.from_edges(self.edges) if self.edges else parent
        if self.widths:
            grown = growing.grow_to(parent, self.widths, new_layers=self.new_layers, skip=skip)
        for sender, recipient in self.connect:
            grown = growing.connect(grown, sender, recipient)
        if self != GrowthConfig(at_step=self.at_step, restart_lr=True):  # by which a finished run trains on as it is
            growing.check(parent, grown)
        return Growth(
            parent, grown, growing.parse_copies(self.start, parent, grown), at_step=self.at_step, opening=self.opening,
            open_steps=self.open_steps, warmup_new=self.warmup_new, noise=self.noise,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a network of language-model nodes on one task by joint REINFORCE."""

    topology: TopologyConfig = field(default_factory=TopologyConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    society: SocietyConfig = field(default_factory=SocietyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    growth: Annotated[tuple[GrowthConfig, ...], tyro.conf.Suppress] = ()
    """Growths in the course of the run, in order; written in a TOML file, or by `neuromas grow`."""

    backbone: str = "bundled"
    """Frozen language model shared by all nodes: `bundled`, a folder, a GGUF file, `smollm2-135m` or `gemma3-270m` (installed
    packages), or a Hugging Face id such as Qwen/Qwen3-0.6B."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Number format of the frozen backbone; adapters are float32 always. `auto` takes bfloat16 on a GPU, and on a
    CPU with instructions for it (AMX, AVX512-BF16) unless the backbone is small; the run keeps what was chosen."""
    device: Device = "auto"
    """Where to run; auto takes a GPU if there is one."""
    prompt_date: str = PROMPT_DATE
    """Today's date for chat templates that write it into the prompt, as YYYY-MM-DD: fixed, so that a run reads the same prompts
    on any day."""

    num_steps: int = 40
    """Training steps: each draws questions, rolls them out and updates the adapters."""
    train_tokens: int = 0
    """Above 0, training ends with the first step after which the nodes have sampled this many tokens, whatever --num-steps
    says, and the learning rate falls along these tokens."""
    examples_per_step: int = 16
    """Questions in a step (P)."""
    step_tokens: int = 0
    """Sampled tokens of a step: the number of questions then follows from what the steps before have spent, so that networks
    of unlike size cost equally much in equally many steps; `examples_per_step` is that of the first step, and at most 4 times
    as many are asked. 0: always `examples_per_step`."""
    group_size: int = 8
    """Rollouts of each question (G); 4 where --backbone is not the bundled one."""
    branches: int = 1
    """Above 1, the rollouts of a question are the leaves of a tree: each text is answered by this many texts of the next layer,
    and --group-size is this number to the power of the layers. 1: rollouts share nothing."""
    max_new_tokens: int = 80
    """Longest text of a node, stop token included; 32 where --backbone is not the bundled one."""
    temperature: float = 1.0
    """Sampling temperature while training. A network is evaluated greedily, a society at this temperature too."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; 5e-4 where --backbone is not the bundled one."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises to its peak."""
    final_lr: float = 0.1
    """Share of the peak that the learning rate falls to, along a cosine."""
    max_grad_norm: float = 1.0
    """Clip each node's gradient to this norm; 0 does not clip."""
    centring: Centring = "leave_one_out"
    """What a reward loses: mean of the group's other rollouts (RLOO), of the whole group (GRPO), a running mean, nothing."""
    credit: Credit = "shared"
    """How the reward becomes advantages: `shared` gives all nodes the same one (the paper's); docs/credit.md has the others."""
    replays: int = 1
    """Other texts that a node draws in a rollout's place, with credit `replay` and `tree`."""
    critic_lr: float = 0.02
    """Learning rate of the value heads, with a credit scheme that has a critic."""
    format_bonus: float = 0.0
    """Added to a rollout's reward: this times the share of its messages, the answer among them, that are well-formed. 0: the
    terminal reward alone, the paper's."""
    kl_coef: float = 0.0
    """Above 0, takes this times the divergence from the bare backbone off a rollout's reward: log p - log p_bare in nats,
    summed over all tokens of all nodes. Costs one forward of the bare backbone a step."""
    entropy_coef: float = 0.0
    """Above 0, pays this times the entropy of a node's distribution, in nats, as the mean over the tokens of a text: nodes keep
    exploring."""
    normalize: bool = False
    """Divide a group's advantages by the standard deviation of its rewards."""
    tokens_per_micro_batch: int | None = None
    """Tokens in one forward and backward pass, prompts among them, but one completion at least: fewer take less memory and
    change nothing else. None: 10,000, and on a CPU as few as keep a pass at about 1.5 GiB."""
    grad_checkpoint: bool = False
    """Keep only each layer's input for the backward pass, which computes the rest again: less memory, the same gradients."""

    eval_size: int = 500
    """Held-out generated problems that the network answers before and after training."""
    eval_every: int = 20
    """Validate every so many steps; 0 never validates."""
    validation_size: int = 100
    """Problems of a validation."""
    save_every: int = 10
    """Steps between checkpoints; one more is saved after a step that ends two minutes after the last."""
    run_dir: Path | None = None
    """Folder of the run. None: runs/TASK-WIDTHS-seedSEED; another backbone than the bundled one is named before the seed."""
    track: Tracker = "none"
    """Mirror metrics.jsonl for this tracker, in the run's folder and offline; needs its package (extra `track`)."""
    seed: int = 0
    """Decides the adapters' start, the training problems and every sample."""

    def check(self) -> "TrainConfig":
        """Return the config if it makes sense; ValueError names the flag that does not."""
        require_finite(dataclasses.asdict(self), "--")
        depth = self.topology.build().depth
        settings = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        for fault in (*self.society.faults(settings), *self.engine.faults(settings)):
            raise ValueError(fault)
        self.adapter.check()
        self.prompt.build()
        counted = ("num_steps", "examples_per_step", "max_new_tokens", "eval_size", "validation_size")
        for name in (*counted, "save_every", "branches", "replays"):
            require(getattr(self, name) >= 1, _flag(name), "at least 1", getattr(self, name))
        tokens = self.tokens_per_micro_batch
        require(tokens is None or tokens >= 1, "--tokens-per-micro-batch", "at least 1", tokens)
        for name in counted:
            require(getattr(self, name) <= MOST_COUNTED, _flag(name), f"at most {MOST_COUNTED:,}", getattr(self, name))
        rollouts = self.examples_per_step * self.group_size * self.replays
        require(
            rollouts <= MOST_ROLLOUTS, "--examples-per-step x --group-size x --replays", f"at most {MOST_ROLLOUTS:,}", rollouts
        )
        coefficients = ("format_bonus", "kl_coef", "entropy_coef")
        for name in ("warmup_steps", "max_grad_norm", "eval_every", "seed", "step_tokens", "train_tokens", *coefficients):
            require(getattr(self, name) >= 0, _flag(name), "at least 0", getattr(self, name))
        require(self.temperature >= COLDEST, "--temperature", f"at least {COLDEST} (training samples)", self.temperature)
        for name in ("lr", "critic_lr"):
            rate = getattr(self, name)
            require(0 < rate <= LARGEST_RATE, _flag(name), f"above 0 and at most {LARGEST_RATE:g}", rate)
        for name in ("centring", "normalize", "branches"):
            fits = self.credit == "shared" or getattr(self, name) == getattr(TrainConfig(), name)
            require(fits, _flag(name), f"left out with --credit {self.credit}", getattr(self, name))
        require(0 <= self.final_lr <= 1, "--final-lr", "between 0 and 1", self.final_lr)
        require(_is_date(self.prompt_date), "--prompt-date", "a date YYYY-MM-DD", self.prompt_date)
        # A critic's value takes the place of the mean of a question's other rollouts.
        compared = "critic" not in self.credit and (self.centring in ("leave_one_out", "group_mean") or self.normalize)
        of_centring = "--normalize" if self.normalize and self.centring in ("ema", "none") else f"--centring {self.centring}"
        by = of_centring if self.credit == "shared" else f"--credit {self.credit}"
        require(self.group_size >= 1 + compared, "--group-size", f"at least {1 + compared} with {by}", self.group_size)
        unbiased = "leave_one_out, ema or none with --branches above 1 (the group's mean would scale each layer otherwise)"
        require(self.branches == 1 or self.centring != "group_mean", "--centring", unbiased, self.centring)
        leaves = self.branches**depth
        exactly = f"{leaves} with --branches {self.branches} and {depth} layers"
        require(self.branches == 1 or self.group_size == leaves, "--group-size", exactly, self.group_size)
        fixed = self.adapter.shared or self.topology.vote or self.topology.roles or self.branches > 1
        if fixed and not all(growth.adds_nothing for growth in self.growths()):
            raise ValueError("growth goes with none of --adapter.shared, --topology.vote, --topology.roles and --branches")
        if self.growth and self.train_tokens:
            raise ValueError("growth counts steps: it goes with --num-steps, not with --train-tokens")
        self.growths()
        return self

    @property
    def drawn_per_step(self) -> int:
        """Questions drawn for a step; with a budget of tokens, a step asks the first of them."""
        return self.examples_per_step * (MOST_TIMES_FIRST if self.step_tokens else 1)

    def growths(self) -> tuple[Growth, ...]:
        """Return the growths of the run; ValueError if one is impossible or begins before the one before it is open."""
        topology, free, built = self.topology.build(), 0, []
        for entry in self.growth:
            require(free <= entry.at_step < self.num_steps, "growth.at_step",
                     f"{free} (when the network before it is open) to {self.num_steps - 1}", entry.at_step)  # fmt: skip
            built.append(entry.build(topology, skip=self.topology.skip and not self.topology.edges))
            topology, free = built[-1].grown, max(built[-1].opened_by, entry.at_step + 1)
            require(
                free <= self.num_steps, "growth.open_steps", f"such that it is open by step {self.num_steps}", entry.open_steps
            )
        return tuple(built)

    @property
    def run_path(self) -> Path:
        if self.run_dir is not None:
            return Path(self.run_dir)  # programs may give a string
        shape = "edges" if self.topology.edges else "-".join(map(str, self.topology.widths))
        for growth in self.growths():
            shape += f"-to-{'-'.join(map(str, growing.widths_of(growth.grown)))}"
        # A name may hold colons and slashes: jsonl:data/mine.jsonl.
        name = re.sub(r"[^\w.-]+", "-", self.task.name)
        backbone = "" if self.backbone == "bundled" else f"-{re.sub(r'[^a-zA-Z0-9_.-]+', '-', Path(self.backbone).name)}"
        return Path("runs") / f"{name}-{shape}{backbone}-seed{self.seed}"


PRETRAINED = {"group_size": 4, "max_new_tokens": 32, "lr": 5e-4}
"""Defaults of a run on another backbone than the bundled one, of a million parameters: a step costs a hundred times as much."""


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
