"""Records that flow through the program, the legend of shapes, and the glossary.

Shape letters, as suffixes of array names and as jaxtyping axes; a letter means the same in every module:

    P  examples in a step            T  tokens of a stream: rows one after the other
    G  rollouts per example          K  tokens of a stream that are kept, e.g. the sampled ones
    N  nodes                         V  vocabulary
    Q  distinct prefixes             C  hidden size (channels)
    B  rows (completions)            I  input features of a linear layer
    S  slots of the KV cache         O  output features of a linear layer
    L  columns of the KV cache       H  attention heads of queries
    R  rank of an adapter            J  attention heads of keys and values
                                     D  size of a head

`rewards_PG` is one reward per example and rollout, `logprobs_K` one log-probability per sampled token.

Glossary, in the order in which data flows:

    topology     a layered directed acyclic graph of nodes; its edges carry messages; its depth is the number of layers
    node         a place in the topology, with an id that never changes; the output node's text is the answer
    backbone     the frozen language model that all nodes share
    adapter      a node's LoRA update of the backbone; the bank of adapters holds those of all nodes
    policy       backbone and adapters: what is sampled and trained
    prompt       what a node reads: question, then the node's own part (id, layer, inbox, recipients)
    prefix       the part of a prompt that several rows share and that is computed once: the question, and for a node without an
                 inbox its own part too; rollouts of one node share it, all nodes do with one adapter or scope `suffix`
    suffix       the rest of the prompt
    completion   what a node writes, parsed into one message for each recipient
    inbox        the messages that a node has received
    rollout      one pass of the whole network over one example; a group is all rollouts of one example
    replay       a rollout continued from one of its texts: another text in its place, or none, and what follows from it
    reward       one terminal number of a rollout, for all its nodes: 1 if its answer is right, else 0 (or between)
    centring     what is subtracted from rewards to make advantages (*baseline* means a comparison method only)
    credit       how rewards become advantages, one for each text or one for each token; `shared` gives all nodes the same
    critic       value heads on states of the frozen backbone, which some credit schemes learn beside the adapters
    engine       what samples completions; torch samples in process, vLLM in one of its own; a learner updates the adapters
    growth       nodes, layers or edges that a trained network gets; closed, it computes what its parent computes; open, it
                 takes part; a cohort is the nodes that joined together
    ledger       what training has spent: calls, tokens, rollouts, steps
    floor        accuracy of the best constant answer on the same examples
    run          a folder with config, checkpoints, metrics and rollouts
    cell         one method on one task with one seed in a comparison; a trial is a cell that only chooses settings
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


class MessageStatus(Enum):
    """How a message was found in what its sender wrote. Compare with `is`."""

    OK = "ok"
    MISSING = "missing"
    """The text has segments, none for this recipient: the recipient reads the placeholder."""
    UNADDRESSED = "unaddressed"
    """The text has no `TO node k:` at all: the recipient reads the whole text."""
    EMPTY = "empty"
    """There is no text for this recipient, with a header or without: it reads the placeholder."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its gold answer, e.g. `Example("ab12", "Is 2 even?\\n...", "Yes", 'Write "Answer: Yes" ...')`."""

    id: str
    """Hash of the question: names the example in draws, splits and records."""
    question: str
    answer: str
    answer_format: str
    """The sentence that tells the output node how to write its answer."""
    repeat: int = field(default=0, compare=False)
    """How often its step has asked it before: each time has random numbers of its own."""

    @property
    def drawn_by(self) -> str:
        """Return what its random numbers depend on: its id, and how often the step has asked it before."""
        return f"{self.id}/{self.repeat}" if self.repeat else self.id


@dataclass(frozen=True, slots=True)
class Message:
    """Text on one edge, e.g. `Message(1, 3, "start (0,0);...", MessageStatus.OK)`."""

    sender: int
    recipient: int
    text: str
    status: MessageStatus

    def to_json(self) -> dict[str, int | str]:
        """Return the message as `ask` and the server word it."""
        return {"from": self.sender, "to": self.recipient, "text": self.text, "status": self.status.value}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a node's prompt: `prefix_ids` is the same for every rollout of an example, and may be for every node."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One row for an engine: which node speaks, what it reads, and the seed of its draws."""

    node: int
    prompt: Prompt
    seed: tuple[int | str, ...]
    headers: tuple[tuple[int, ...], ...] = ()
    """Token ids that begin each text after the first one: the row goes on with them where it has ended the text before."""

    @property
    def example(self) -> int | str:
        """Return what its question is drawn by: a seed ends in question, rollout and node."""
        return self.seed[-3]


@dataclass(frozen=True, slots=True)
class Sample:
    """What an engine wrote for a request."""

    token_ids: tuple[int, ...]
    """All tokens after the prompt, stop tokens included."""
    logprobs: tuple[float, ...]
    """Log-probability of each sampled token under the distribution it was drawn from."""
    texts: tuple[str, ...]
    """Decoded, without headers and stop tokens: one text, and another one for each header of the request."""
    stopped: bool
    """False if the length limit cut off a text."""
    adapter_version: int
    given: tuple[int, ...] = ()
    """Indices of the tokens that were not sampled: the headers of later texts."""

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def begun(self, begins: Sequence[str]) -> str:
        """Return all that was said, each text with what it was begun by; empty: nothing was given."""
        if not begins:
            return self.text
        return "\n".join(f"{begin}{text}" for begin, text in zip(begins, self.texts, strict=True))


@dataclass(frozen=True, slots=True)
class Completion:
    """What one node wrote in one rollout, with the messages found in it. The output node sends no messages."""

    node: int
    prompt: Prompt
    sample: Sample
    messages: tuple[Message, ...]
    begins: tuple[str, ...] = ()
    """How each of its texts was begun, if that was given and not left to the node."""

    @property
    def text(self) -> str:
        """All that the node said, with what it was begun by."""
        return self.sample.begun(self.begins)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One pass of the whole network over one example; `completions` in topological order, the output node last."""

    example: Example
    index: int
    """Which rollout of its group."""
    completions: tuple[Completion, ...]
    winner: int = -1
    """Index of the completion that is the answer: the output node's, or the majority vote's winner if several nodes answer."""

    @property
    def answer(self) -> str:
        """Text of the output node, or of the node whose answer won the vote."""
        return self.completions[self.winner].text


Group = tuple[Rollout, ...]
"""All rollouts of one example."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A rollout that was continued from one of its texts: what does not follow from that text is kept, the rest is anew."""

    rollout: Rollout
    written: tuple[Completion, ...]
    """Those of its completions that were sampled for it, the others are those of the rollout that it continues."""
