"""Parsing favours no answer: wordings of both answers, exchanged labels, models' texts, and texts without answer."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from neuromas.tasks import get_family
from neuromas.tasks.answers import AnswerForm, bracket_form, number_form, option_form, words_form
from neuromas.tasks.verifiers import choice, make_verifier, words

READERS: dict[str, Callable[[str], str | None]] = {
    "words": words("Yes", "No").read,
    "choice": choice("ABCDE").read,
    "number": make_verifier("number").read,
    "exact": make_verifier("exact").read,
    "math": make_verifier("math").read,
    "boolean": get_family("boolean_expressions").parse_answer,
    "arithmetic": get_family("multistep_arithmetic_two").parse_answer,
    "tracking": get_family("tracking_shuffled_objects_three_objects").parse_answer,
    "dyck": get_family("dyck_languages").parse_answer,
    "lies": get_family("web_of_lies").parse_answer,
}

# --- Both answers of a binary task, in the same words ---------------------------------------------------------------------

BINARY = [("Yes", "No"), ("True", "False"), ("valid", "invalid"), ("plausible", "implausible"), ("even", "odd")]
# fmt: off
SENTENCES = [
    ("you return to the start", "you do not return to the start"), ("you end where you began", "you don't end where you began"),
    ("the moves cancel out", "the moves never cancel out"), ("there is no net displacement", "there is a net displacement"),
    ("it is true", "it is not true"), ("it is", "it isn't"), ("that is right", "that is wrong"),
    ("this is possible", "this is impossible"), ("they all tell the truth", "nobody tells the truth, neither Jim nor Sal"),
    ("the conclusion follows", "the conclusion cannot follow"), ("he has done so", "he hasn't done so"),
    ("the argument is {}", "the argument is not {}"), ("it can be said so", "it can't possibly be said so"),
]
SHAPES = [
    "Answer: {}, {}.", "Answer: {}. {}.", "Answer: {}\n{}", "Answer: {} - {}.", "Answer: {}: {}.", "Answer: {}; {}.",
    "Answer: {} because {}.", "Answer: {}, since {}", "The answer is {}, {}.", "The answer is {} as {}", "**Answer: {}** ({})",
    "Answer: **{}**, {}!", "Answer: {}\n\nExplanation: {}.", "{}, {}.", "{}. {}", r"\boxed{{{}}}. {}.",
    "I thought about it; it is not hard. So the answer is {}: {}.", "Answer: {}\u2014{}.",
]
# fmt: on
WRITTEN = st.sampled_from([str, str.lower, str.upper])


def test_both_wordings_of_a_binary_task_are_read_alike() -> None:
    read = {pair: words(*pair).read for pair in BINARY}

    @seed(0)
    @settings(max_examples=500, deadline=None, database=None)
    @given(st.sampled_from(BINARY), st.sampled_from(SENTENCES), st.lists(st.sampled_from(SENTENCES), max_size=2),
           st.sampled_from(SHAPES), WRITTEN)  # fmt: skip
    def check(
        pair: tuple[str, str], first: tuple[str, str], more: list[tuple[str, str]], shape: str, write: Callable[[str], str]
    ) -> None:
        texts = [
            " ".join([shape.format(write(answer), first[k].format(pair[0])), *(f"{m[k].format(pair[0])}." for m in more)])
            for k, answer in enumerate(pair)
        ]
        assert [read[pair](text) for text in texts] == list(pair), texts

    check()


def test_every_sentence_is_read_in_every_shape() -> None:
    for pair in BINARY:
        read = words(*pair).read
        for shape in SHAPES:
            for sentence in SENTENCES:
                for k, answer in enumerate(pair):
                    text = shape.format(answer, sentence[k].format(pair[0]))
                    assert read(text) == answer, text


# --- With the answers' names exchanged, a text gives the exchanged answer -------------------------------------------------

# fmt: off
PIECES = [
    "Answer: {0}", "Answer: {1}", "the answer is {0}", "#### {0}\n", "{0}", "{1}", "**{0}**", ". ", ", ", "\n", " or ", " and ",
    " not ", " is wrong", " is right", " because ", " since it is ", "it is ", "It is not ", " too", "?", "; ", " - ", ": ",
    " also ", "maybe ", "Wait, ", "Explanation: ", "the others, ", "cannot be ", "isn't it", "Option ", " describes a gas",
    " rather than ", " instead", " apples", "So ", "Actually, ", " = ", "!", "...", " \u2014 ",
]
BRACKETED = [r"\boxed{{{0}}}", "({2})", "{0}) ", " \\text{{ or }} "]
EXCHANGED: dict[str, tuple[AnswerForm, list[str]]] = {
    "options": (option_form("ABCDE"), ["A", "B", "D"]),
    "numbers": (number_form(decimals=True), ["5", "6", "7"]),
    "whole numbers": (number_form(), ["-5", "16", "1,200"]),
    "words": (words_form("True", "False"), ["True", "False", "True"]),
    "prefixed words": (words_form("valid", "invalid"), ["valid", "invalid", "valid"]),
    "yes and no": (words_form("Yes", "No"), ["Yes", "No", "Yes"]),
    "brackets": (bracket_form(), ["]", "}", ">"]),
}
# fmt: on


@pytest.mark.parametrize("kind", EXCHANGED)
def test_exchanged_names_give_the_exchanged_answer(kind: str) -> None:
    form, names = EXCHANGED[kind]
    given_once: set[str | None] = set()
    tried = PIECES if kind == "brackets" else PIECES + BRACKETED

    @seed(0)
    @settings(max_examples=400, deadline=None, database=None)
    @given(st.lists(st.sampled_from(tried), min_size=1, max_size=7), st.permutations(range(len(set(names)))))
    def check(pieces: list[str], order: list[int]) -> None:
        # No two answers touch: 5 and 6 would be 56, and "is no" before a word is none.
        text = "".join(piece if "{" not in piece or piece.endswith(("\n", " ")) else f"{piece} " for piece in pieces)
        chosen = [names[k] for k in order]
        exchanged = text.format(*(chosen * 2)[:3] if len(chosen) == 2 else chosen)
        answers = {form.read(name): form.read(other) for name, other in zip(names, [*chosen, chosen[0]], strict=False)}
        found = form.read(text.format(*names))
        given_once.add(found)
        assert form.read(exchanged) == answers.get(found), (text, exchanged)

    check()
    assert len(given_once) > 2, "the texts give no answers, so that nothing is tried"


# --- What models write ----------------------------------------------------------------------------------------------------

# fmt: off
READ = [
    ("words", "Answer: No, you do not return.", "No"),
    ("words", "Answer: No, not at the start.", "No"),
    ("words", "Answer: No. No, it is not.", "No"),
    ("words", "Answer: No, no one returns.", "No"),
    ("words", "Answer: Yes, no doubt.", "Yes"),
    ("words", "Answer: No, cannot return.", "No"),
    ("words", "Answer: Yes\nExplanation: no move is left over.", "Yes"),
    ("words", "**Answer: No**", "No"),
    ("words", r"The answer is \(\boxed{\text{No}}\).", "No"),
    ("words", "The answer to the question is no.", "No"),
    ("lies", "Answer: No, Fidel does not tell the truth, nor does Jim.", "No"),
    ("boolean", "Answer: False. It is not True that not False is False.", "False"),
    ("boolean", "Answer: True since not False is True", "True"),
    ("choice", r"\boxed{B}", "(B)"),
    ("choice", r"The correct answer is: \boxed{\text{(B)}}.", "(B)"),
    ("choice", "(B) photosynthesis", "(B)"),
    ("choice", "B) photosynthesis", "(B)"),
    ("choice", "B. photosynthesis", "(B)"),
    ("choice", "**B**", "(B)"),
    ("choice", "The correct option is B.", "(B)"),
    ("choice", "The best choice is: C", "(C)"),
    ("choice", "Answer: Option B", "(B)"),
    ("choice", "Answer: **B**", "(B)"),
    ("choice", "The answer is (B).", "(B)"),
    ("choice", "#### B", "(B)"),
    ("choice", "(B) is the correct answer.", "(B)"),
    ("choice", "Answer: (B) because (A) is no gas.", "(B)"),
    ("choice", "Answer: A since B is too small", "(A)"),
    ("choice", "Answer: B. Option (A) is wrong, it melts.", "(B)"),
    ("choice", "Answer: (B). (A) and (C) are incorrect.", "(B)"),
    ("choice", "Answer: B\n\nExplanation:\n(A) is a solid.\n(B) is a gas.\n(C) is neither.", "(B)"),
    ("choice", "Answer: (B) it does not change", "(B)"),
    ("choice", "Answer: B) hot or cold", "(B)"),
    ("choice", "Answer: (B). I think so.", "(B)"),
    ("choice", "The answer is not (A). The answer is (B).", "(B)"),
    ("tracking", "Answer: (C), as Alice swaps with Bob, who has (A).", "(C)"),
    ("number", "So 9 * 2 = 18.\n#### 18", "18"),
    ("number", r"\(\boxed{18}\)", "18"),
    ("number", r"\[ \boxed{18} \]", "18"),
    ("number", r"The final answer is $\boxed{18}$. I hope it is correct.", "18"),
    ("number", "Answer: 18\nThe final answer is $\\boxed{18}$.", "18"),
    ("number", "$18", "18"),
    ("number", r"\$18", "18"),
    ("number", "18 dollars a day.", "18"),
    ("number", "18.", "18"),
    ("number", "1,234", "1234"),
    ("number", "Answer: $1,234.50.", "1234.5"),
    ("number", "Answer: 18 because 9 * 2 = 18", "18"),
    ("number", "Answer: 18. She does not sell the other 4 eggs.", "18"),
    ("number", r"Answer: 18\text{ dollars}", "18"),
    ("arithmetic", "Answer: -12. Check: 4 - 16 = -12.", "-12"),
    ("dyck", "Answer: ] ]\n\nThe first two, [ and [, are open.", "] ]"),
    ("exact", "Answer: Paris.", "Paris"),
    ("exact", r"So it is \boxed{Paris}.", "Paris"),
    ("math", "18 dollars", "18"),
    ("math", r"**Answer:** $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
]
NONE = [
    ("words", "Answer: Yes and no"),
    ("words", "Answer: Yes, but no"),
    ("words", "Answer: Yes, it is No"),
    ("words", "Answer: Yes is wrong"),
    ("words", "Answer: Yes. Wait, no."),
    ("words", "Answer: Yes. No, you do not."),
    ("words", "Answer: Yes. The answer is not Yes."),
    ("words", "Answer: Yes? You do."),
    ("words", "Answer: Yes if you turn, no otherwise"),
    ("words", "Answer: No because they cancel; is that clear? Yes."),
    ("words", "Answer: No idea"),
    ("words", "Answer: No one knows"),
    ("words", "Answer: Yes. No way."),
    ("words", "Answer: Yes no really"),
    ("words", "Yes.\n\nNo."),
    ("words", "Answer: Yes. Not sure."),
    ("boolean", "Answer: True. No, it isn't"),
    ("boolean", "Answer: True, it is False"),
    ("choice", "Answer: A as well as B"),
    ("choice", "Answer: (A). (B) is also correct."),
    ("choice", "Answer: (A). It could be (B)."),
    ("choice", "Answer: (A). Or B."),
    ("choice", "Answer: (A). Hmm, (B) is better."),
    ("choice", "Answer: (A). On second thought, (B)."),
    ("choice", "Answer: (A). That is wrong."),
    ("choice", "Answer: (A). It's not (A)."),
    ("choice", "Answer: A because it is big.\nB"),
    ("choice", "Answer: (A), then B too"),
    ("choice", "Answer: (B), then A too"),
    ("choice", "Answer: (A) and B to be safe"),
    ("choice", "Answer: (B) and A to be safe"),
    ("choice", "Answer: B red ball"),
    ("choice", "Answer: A. So the answer is (B)."),
    ("choice", "(A) red ball\n(B) green ball"),
    ("choice", "(A) Let us see. (B) Let us see."),
    ("choice", "(A) is wrong"),
    ("choice", r"\boxed{A, B}"),
    ("choice", r"\boxed{A \text{ or } B}"),
    ("choice", "A. B. C."),
    ("tracking", "Answer: (A); (B)"),
    ("number", "Answer: 5. 6."),
    ("number", "Answer: 5\n6"),
    ("number", "Answer: 5. It is 6."),
    ("number", "Answer: 5 since it is odd. So 6."),
    ("number", "Answer: 5. That isn't right."),
    ("number", "Answer: 5. No."),
    ("number", "Answer: 5, not 5"),
    ("number", "5 apples and 6 pears"),
    ("number", "5 or more"),
    ("number", "5 is wrong"),
    ("number", "#### 5\n#### 6"),
    ("number", r"\boxed{5}\boxed{6}"),
    ("number", r"Answer: 5\text{ million}"),
    ("arithmetic", "Answer: 5 eggs, 6 eggs"),
    ("dyck", "Answer: ] .)"),
    ("exact", r"Answer: \boxed{Paris} or \boxed{Rome}"),
    ("number", r"5\text{ or }6"),
]
# fmt: on


@pytest.mark.parametrize(("name", "text", "answer"), READ)
def test_what_models_write_is_read(name: str, text: str, answer: str) -> None:
    assert READERS[name](text) == answer


@pytest.mark.parametrize(("name", "text"), NONE)
def test_a_text_that_joins_withdraws_or_doubts_gives_no_answer(name: str, text: str) -> None:
    assert READERS[name](text) is None


def test_an_expression_may_match_the_stop_after_an_answer() -> None:
    regex = make_verifier("regex")
    assert regex.check("colou?r", "Answer: color.")
    assert regex.check(r"U\.S\.", "Answer: U.S.")
    assert not regex.check(r"U\.S\.", "Answer: U.S")


@pytest.mark.parametrize("unit", ["\n", ", ", "A. ", "(B) ", "5. ", "because (B) ", r"\boxed{A}", "Answer: A ", "is it "])
@pytest.mark.parametrize("name", ["words", "choice", "number", "exact"])
def test_long_texts_are_read_in_linear_time(name: str, unit: str) -> None:
    start = {"words": "Answer: Yes", "choice": "Answer: (A)", "number": "Answer: 5", "exact": "Answer: x"}[name]
    started = time.process_time()
    for joint in ("", ". ", ", it is so, "):
        READERS[name](start + joint + unit * (20_000 // len(unit)))
    # A tenth of a second; where it grew with the square, minutes.
    assert time.process_time() - started < 5
