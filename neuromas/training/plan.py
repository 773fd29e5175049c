"""A config, resolved once: everything that it describes but weights. Loads no torch, so that a mistake is told at once."""

from dataclasses import dataclass

from neuromas.config import TrainConfig
from neuromas.graph.growth import Growth
from neuromas.graph.topology import Topology
from neuromas.graph.wording import check_begin_answer
from neuromas.training.questions import Questions
from neuromas.training.tracking import require_tracker


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is to do."""

    config: TrainConfig
    topology: Topology
    """Of the network as it starts."""
    growths: tuple[Growth, ...]
    questions: Questions


def resolve(config: TrainConfig) -> Plan:
    """Check a config and return what it describes; ValueError names the flag that is wrong."""
    config.check()
    require_tracker(config.track)
    questions = Questions.of(config)
    check_begin_answer(config.prompt.begin_answer or "", questions.all)
    return Plan(config, config.topology.build(), config.growths(), questions)
