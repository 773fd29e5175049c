"""Rollouts that join while others run are those of `Network.rollout`, and leave nothing behind when they are dropped."""

import pytest
from models import randomise

from neuromas import Backbone, Network, Topology
from neuromas.rollout.live import LiveRollout, LiveRollouts, Terms, cut_at
from neuromas.types import Example, Rollout

EXAMPLES = [Example(str(number), f"What is {number} + {number}?" * (1 + number % 3), "", "Say it.") for number in range(3)]
SEED = ("evaluate", 1)


@pytest.fixture
def network(tiny_backbone: Backbone) -> Network:
    network = Network(Topology.layered([2, 1, 1]), tiny_backbone, max_new_tokens=6)
    randomise(network.adapters)
    return network


def texts(rollout: Rollout) -> list[str]:
    return [completion.text for completion in rollout.completions]


def test_rollouts_that_join_at_any_step_are_those_of_a_batch(network: Network) -> None:
    temperatures = [0.0, 0.7]
    expected = {
        (example.id, temperature): texts(network.rollout([example], 2, seed=SEED, temperature=temperature)[0][1])
        for example in EXAMPLES
        for temperature in temperatures
    }
    live, begun, heard = LiveRollouts(network), dict[tuple[str, float], LiveRollout](), dict[LiveRollout, list[str]]()
    waiting = [(example, temperature) for example in EXAMPLES for temperature in temperatures]
    with live.running():
        while waiting or live.busy:
            if waiting:
                example, temperature = waiting.pop()
                rollout = live.begin(example, 1, seed=SEED, terms=Terms(temperature, hears_answer=True))
                begun[example.id, temperature] = rollout
            for said in live.step():
                if said.rollout.answers(said.node):
                    heard.setdefault(said.rollout, []).append(said.text)
                else:
                    assert said.completion is not None
        live.step()
    assert live.rows == 0
    for key, rollout in begun.items():
        assert rollout.result is not None
        assert texts(rollout.result) == expected[key]
        assert len(heard[rollout]) > 1
        assert all(rollout.result.answer.startswith(text.removesuffix("\ufffd")) for text in heard[rollout])


def test_answers_are_cut_and_dropped_rollouts_end(network: Network) -> None:
    live = LiveRollouts(network)
    with live.running():
        short = live.begin(EXAMPLES[0], 0, seed=SEED, terms=Terms(max_tokens=2))
        gone = live.begin(EXAMPLES[1], 0, seed=SEED, terms=Terms())
        late = live.begin(EXAMPLES[2], 0, seed=SEED, terms=Terms())
        live.drop(late)
        live.step()
        live.drop(gone)
        while live.busy:
            assert all(said.rollout is short for said in live.step())
    assert short.result is not None
    assert [len(completion.sample.token_ids) for completion in short.result.completions][-1] == 2
    assert max(len(completion.sample.token_ids) for completion in short.result.completions[:-1]) > 2
    assert (gone.result, late.result) == (None, None)


def test_a_text_is_cut_at_the_first_stop() -> None:
    assert cut_at("abcabc", ["c", "b"]) == "a"
    assert cut_at("abc", ["x"]) is None
