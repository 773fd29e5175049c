"""Reads a comparison file: methods x tasks x seeds, the settings of each cell, and the pairs to compare.

    methods = ["neuromas_3", "single_rl"]      tasks = ["navigate"]      seeds = [0, 1, 2]
    [train]  settings of all cells    [task.NAME]  of one task's    [method.NAME]  of one method's    [quick]  with --quick
    [tuning]  lr = [5e-4, 1.5e-3]  seeds = [11]  candidates of every trained method on every task, on seeds that are not scored
    [[pairs]]  compare = ["neuromas_3", "single_rl"]  matched = ["trainable_parameters"]  asks = "..."

What a table leaves out comes from the one before it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from neuromas.compare.budget_match import QUANTITIES
from neuromas.compare.methods import METHODS, CellSpec, Method
from neuromas.compare.methods.networks import Trained, with_credit
from neuromas.config import TopologyConfig, TrainConfig
from neuromas.system.files import read_toml
from neuromas.system.schema import from_dict
from neuromas.tasks import from_config
from neuromas.tasks.user_tasks import run_file
from neuromas.training.config_file import on_backbone

DEFAULT_TOLERANCE = 0.02
LISTS = ("methods", "tasks", "seeds", "backbones", "matched", "pairs")
TABLES = ("train", "task", "method", "tuning", "quick")
KEYS = (*LISTS, *TABLES, "reference", "tolerance")
FROM_THE_LISTS = ("seed", "backbone", "run_dir")
"""Settings that come from the lists of the file."""
SAME_FOR_ALL = (*FROM_THE_LISTS, "task", "eval_size", "validation_size", "eval_every")
"""Settings that no method may override: they decide the questions, and how often a run validates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two methods to compare, and the quantities that must match."""

    first: str
    second: str
    matched: tuple[str, ...]
    """Names of QUANTITIES."""
    tolerance: float
    """Share by which matched quantities may differ, in any run."""
    asks: str = ""
    """The question that their difference answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The candidates of every trained method: each rank with each learning rate, on each of the seeds."""

    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    ranks: tuple[int, ...]
    """Ranks of one node of the team, as `adapter.rank` of the file; empty: the file's own rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A comparison with all settings resolved."""

    name: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    backbones: tuple[str, ...]
    pairs: tuple[Pair, ...]
    cells: tuple[CellSpec, ...]
    """Cells, seed by seed, so that a grid that is stopped has complete comparisons. Tuned settings are not in them yet."""
    tuning: Space | None = None
    """None: every method trains with the file's settings."""


def problem_of(spec: CellSpec) -> tuple[str, str]:
    """Return a cell's backbone and task."""
    return spec.config.backbone, spec.config.task.name


def describe_cell(spec: CellSpec) -> str:
    """Return a cell's method, task, backbone, seed and trial as one line."""
    config = spec.config
    trial = f", trial of lr {config.lr:g}" + (f" and rank {config.adapter.rank}" if config.adapter.rank else "")
    return f"{spec.method}, {config.task.name}, {config.backbone}, seed {config.seed}{trial if spec.trial else ''}"


def find_method(name: str) -> Method:
    """Return the method of that name, or that of `class:FILE.py:NAME`, a class or an object; ValueError lists all names.

    `NAME:CREDIT` is a trained network with another credit scheme, e.g. `neuromas_3:replay`.
    """
    if name.startswith("class:"):
        return _load_class(name.removeprefix("class:"))
    name, colon, credit = name.partition(":")
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(sorted(METHODS))} or class:FILE.py:CLASS, got {name!r}")
    return with_credit(METHODS[name], credit) if colon else METHODS[name]


def settings_of(method: str, config: TrainConfig) -> TrainConfig:
    """Return the settings that a method runs with: those of a cell, as the method changes them if it does."""
    change: Callable[[TrainConfig], TrainConfig] = getattr(find_method(method), "change", lambda config: config)
    return change(config)


def _load_class(location: str) -> Method:
    """Return the method of `FILE.py:NAME`. The file is executed: it is the user's own."""
    file, _, name = location.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"method class: must be followed by FILE.py:CLASS of a Python file that is there, got {location!r}")
    kind = getattr(run_file(path, f"method_{path.stem}", f"method class:{location}"), name, None)
    try:
        method = kind() if isinstance(kind, type) else kind
    except Exception as error:  # any error of the user's own class
        raise ValueError(f"method class:{location}: it cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(method, Method):
        raise ValueError(f"method class: {file} must have a class or object {name!r} with name, title, source, trained and run")
    return method


def load_grid(
    path: Path,
    *,
    quick: bool = False,
    methods: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: Sequence[int] = (),
    backbones: Sequence[str] = (),
    data: Path | None = None,
    device: str | None = None,
) -> Grid:
    """Read a comparison file; ValueError names the file and what is wrong with it, before anything runs.

    `methods`, `tasks`, `seeds`, `backbones`, `data` and `device` override the file; pairs of methods that are left out go too.
    """
    where = f"config {path}"
    raw = read_toml(path)
    _check_keys(raw, KEYS, where)
    # All names in the file: its tables and pairs may name methods and tasks that --quick or a flag leaves out.
    named = {key: set(_distinct(raw, key, str, where)) for key in ("methods", "tasks")}
    short = _table(raw, "quick", where)
    _check_keys(short, (*LISTS, "train", "tuning", "reference", "tolerance"), where, "quick.")
    _table(short, "train", f"{where}: quick")
    if quick:
        raw |= {key: value for key, value in short.items() if key != "train"}
    given = {"methods": list(methods), "tasks": list(tasks), "seeds": list(seeds), "backbones": list(backbones)}
    raw |= {key: values for key, values in given.items() if values}
    flags = {"methods": "--methods", "tasks": "--tasks", "seeds": "--seeds", "backbones": "--backbone"}
    from_where = {key: flags[key] if values else where for key, values in given.items()}
    methods, tasks = _distinct(raw, "methods", str, from_where["methods"]), _distinct(raw, "tasks", str, from_where["tasks"])
    seeds = _distinct(raw, "seeds", int, from_where["seeds"])
    if min(seeds) < 0:
        raise ValueError(f"{from_where['seeds']}: seeds must be at least 0, got {list(seeds)}")
    chosen = _distinct(raw, "backbones", str, from_where["backbones"]) if "backbones" in raw else ("bundled",)
    for table, names in (("method", named["methods"] | set(methods)), ("task", named["tasks"] | set(tasks))):
        if unknown := [name for name in _table(raw, table, where) if name not in names]:
            raise ValueError(f"{where}: [{table}.{unknown[0]}] is about none of the {table}s {', '.join(sorted(names))}")
    _check_methods(methods, from_where["methods"])
    settings = ({"task": {"data": str(data)}} if data else {}) | ({"device": device} if device else {})
    layers = _Layers(where, from_where["tasks"], raw, quick, settings)
    resolved = {
        (backbone, task, method): layers.resolve(method, task, backbone)
        for backbone in chosen for task in tasks for method in methods
    }  # fmt: skip
    cells = tuple(
        CellSpec(method, dataclasses.replace(config, seed=seed))
        for seed in seeds
        for (_, _, method), config in resolved.items()
    )
    tuning = _tuning(raw, methods, seeds, where)
    pairs = _pairs(raw, methods, named["methods"] if quick or given["methods"] else set(), where)
    name = path.stem + ("-quick" if quick else "")
    return Grid(name=name, methods=methods, tasks=tasks, seeds=seeds, backbones=chosen, pairs=pairs, cells=cells,
                tuning=tuning)  # fmt: skip


def _tuning(raw: Mapping[str, Any], methods: Sequence[str], scored: Sequence[int], where: str) -> Space | None:
    if "tuning" not in raw:
        return None
    table = _table(raw, "tuning", where)
    _check_keys(table, ("lr", "rank", "seeds"), where, "tuning.")
    lrs = table.get("lr")
    if not isinstance(lrs, list) or not lrs or not all(isinstance(lr, float) and 0 < lr < math.inf for lr in lrs):
        raise ValueError(f"{where}: tuning.lr must be a list of one or more learning rates above 0, such as 1e-3, got {lrs!r}")
    ranks, seeds = (_distinct(table, key, int, f"{where}: tuning") if key in table else () for key in ("rank", "seeds"))
    if any(rank < 1 for rank in ranks):
        raise ValueError(f"{where}: tuning.rank must be at least 1, got {list(ranks)}")
    if len(lrs) * max(1, len(ranks)) > 1 and (not seeds or set(seeds) & set(scored) or min(seeds) < 0):
        raise ValueError(
            f"{where}: tuning.seeds must be one or more seeds of at least 0 that are not scored, got {list(seeds)} with "
            f"scored seeds {list(scored)}"
        )
    for method, table in _table(raw, "method", where).items():
        if method in methods and "lr" in table:
            raise ValueError(f"{where}: [method.{method}] may not set 'lr': [tuning] chooses it for all methods alike")
    return Space(lrs=tuple(lrs), seeds=seeds, ranks=ranks)


def _check_methods(methods: Sequence[str], where: str) -> None:
    by_name: dict[str, str] = {}
    for method in methods:
        try:
            found = find_method(method)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        name = found.name
        if isinstance(found, Trained) and found.tokens_of and found.tokens_of not in methods:
            raise ValueError(f"{where}: method {method} trains as long as {found.tokens_of}; add that to methods")
        # The names of cells' files begin with it.
        if (other := by_name.setdefault(name, method)) != method:
            raise ValueError(f"{where}: methods {other} and {method} have the same name {name!r}; give one another")


@dataclass(frozen=True, slots=True)
class _Layers:
    """Tables of settings, each overriding the last: the backbone's defaults, `[train]`, `[task.NAME]`, `[method.NAME]`,
    `[quick.train]`, the flags."""

    where: str
    tasks_from: str
    """The file, or the flag, that names the tasks."""
    raw: Mapping[str, Any]
    quick: bool
    command_line: Mapping[str, Any]

    def resolve(self, method: str, task: str, backbone: str) -> TrainConfig:
        """Return the settings of a method on a task and a backbone; ValueError names the table that is wrong."""
        quick = self.raw.get("quick", {}).get("train", {}) if self.quick else {}
        config = on_backbone(TrainConfig(), backbone)
        for table, values in (
            ("train", _table(self.raw, "train", self.where)),
            (f"task.{task}", _table(_table(self.raw, "task", self.where), task, self.where)),
            (f"method.{method}", _table(_table(self.raw, "method", self.where), method, self.where)),
            ("quick.train", quick),
            ("command line", self.command_line),
        ):
            refused = SAME_FOR_ALL if table.startswith("method.") else FROM_THE_LISTS
            if fixed := [key for key in values if key in refused]:
                raise ValueError(f"{self.where}: [{table}] may not set {fixed[0]!r}: it is the same for all methods")
            config = from_dict(TrainConfig, dict(values), where=self.where, prefix=f"{table}.", base=config)
        if config.engine.name == "tinker":
            # Its service would go on answering with the last adapters, where a comparison scores the best ones too.
            raise ValueError(f"{self.where}: --engine tinker is for `neuromas train`; a comparison runs on torch or vllm")
        if method.partition(":")[0] in METHODS and config.topology != TopologyConfig(skip=config.topology.skip):
            raise ValueError(
                f"{self.where}: topology is what {method} itself sets; leave it out, or make your team a method, "
                "class:FILE.py:NAME (docs/compare.md)"
            )
        named = dataclasses.replace(config.task, name=task)
        config = dataclasses.replace(config, task=named)
        try:
            from_config(named)
        except ValueError as error:
            raise ValueError(f"{self.tasks_from}: {method} on {task}: {error}") from error
        try:
            # What a method itself sets may be what makes the others fit: a critic needs no group.
            settings_of(method, config).check()
        except ValueError as error:
            raise ValueError(f"{self.where}: {method} on {task}: {error}") from error
        return config


def _pairs(raw: Mapping[str, Any], methods: Sequence[str], left_out: set[str], where: str) -> tuple[Pair, ...]:
    """Return the named pairs, then every other method with the reference, without methods that a flag leaves out."""
    matched, tolerance = raw.get("matched", []), raw.get("tolerance", DEFAULT_TOLERANCE)
    given = raw.get("pairs", [])
    if not isinstance(given, list):
        raise ValueError(f"{where}: pairs must be a list, got {given!r}")
    entries = [{"compare": entry} if isinstance(entry, list) else entry for entry in given]
    reference = raw.get("reference")
    if reference is not None:
        if reference not in (*methods, *left_out):
            raise ValueError(f"{where}: reference must be one of the methods {', '.join(methods)}, got {reference!r}")
        named = [set(c) for e in entries if isinstance(e, dict) and _are_texts(c := e.get("compare"))]
        entries += [{"compare": [m, reference]} for m in methods if m != reference and {m, reference} not in named]
    pairs = [_pair(entry, matched, tolerance, {*methods, *left_out}, where) for entry in entries]
    return tuple(pair for pair in pairs if pair.first in methods and pair.second in methods)


def _pair(entry: Any, matched: Any, tolerance: Any, methods: set[str], where: str) -> Pair:
    if not isinstance(entry, dict):
        raise ValueError(f'{where}: pairs must hold ["METHOD", "METHOD"] or tables, got {entry!r}')
    _check_keys(entry, ("compare", "matched", "tolerance", "asks"), where, "pairs.")
    compare, declared, allowed = entry.get("compare"), entry.get("matched", matched), entry.get("tolerance", tolerance)
    if not _are_texts(compare) or len(compare) != 2 or compare[0] == compare[1] or not methods.issuperset(compare):
        raise ValueError(f"{where}: pairs.compare must name two of the methods {', '.join(sorted(methods))}, got {compare!r}")
    if not _are_texts(declared) or not declared or not QUANTITIES.keys() >= set(declared):
        raise ValueError(f"{where}: {' and '.join(compare)}: matched must name one or more of {', '.join(QUANTITIES)}, "
                         f"got {declared!r}")  # fmt: skip
    if isinstance(allowed, bool) or not isinstance(allowed, int | float) or not 0 <= allowed < 1:
        raise ValueError(f"{where}: tolerance must be a share from 0 to below 1, got {allowed!r}")
    return Pair(
        first=compare[0], second=compare[1], matched=tuple(declared), tolerance=float(allowed), asks=str(entry.get("asks", ""))
    )  # fmt: skip


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str, prefix: str = "") -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {prefix + key!r}; known are {', '.join(prefix + k for k in sorted(known))}")


def _table(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    table = raw.get(key, {})
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {key} must be a table, got {table!r}")
    return table


def _distinct(raw: Mapping[str, Any], key: str, kind: type, where: str) -> tuple[Any, ...]:
    values = raw.get(key)
    is_list = isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
    if not is_list or not values or len(set(values)) < len(values):
        raise ValueError(f"{where}: {key} must be a list of one or more different {kind.__name__}s, got {values!r}")
    return tuple(values)
