"""Verifiers: right answers in common forms, tricky answers that none may reward, thousands of generated texts."""

import json
import re
import time
from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from paths import DOCS

from neuromas.config import VerifierName
from neuromas.tasks.answers import read_open
from neuromas.tasks.math_process import Judge
from neuromas.tasks.verifiers import JUDGE_SECONDS, Python, Verifier, choice, make_verifier, words

CHOICE, YES_NO, NUMBER, EXACT, REGEX, MATH = (
    choice("ABCDE"), words("Yes", "No"), make_verifier("number"), make_verifier("exact"), make_verifier("regex"),
    make_verifier("math"),
)  # fmt: skip
NAMES = {"choice": CHOICE, "words": YES_NO, "number": NUMBER, "exact": EXACT, "regex": REGEX, "math": MATH}
FRACTION = r"\frac{1}{2}"

RIGHT = [
    ("choice", "B", "(B)"),
    ("choice", "(B)", "I thought of (A) first. The answer is B."),
    ("words", "Yes", "Answer: **yes**."),
    ("number", "1,200.50", "Answer: 1200.5"),
    ("number", "-3", "Answer: \u22123 degrees."),
    ("number", "18", "3 * 6 = 18, so Answer: 18 eggs"),
    ("number", "5", "The answer is 5: **five** eggs, 5 \u20ac each."),
    ("number", "5", "Answer: **5** - five \U0001f95a"),
    ("number", "5", "Answer: 5\n#### 5"),
    ("choice", "B", "Answer: B) Paris"),
    ("choice", "B", "Answer: (B): Paris"),
    ("words", "Yes", "Answer: Yes\u2014they do!"),
    ("exact", "barn damp greene", "Sorted now.\nAnswer: barn  damp greene"),
    ("exact", "Paris", "Paris"),
    ("regex", "colou?r", "Answer: color"),
    ("math", "18", r"So he has \boxed{18}."),
    ("math", "18", "Answer: $18.00 a day"),
    ("math", "20", r"Answer: \boxed{20\%}"),
    ("math", "0.5", rf"Answer: {FRACTION}"),
    ("math", FRACTION, "Answer: 0.5"),
    ("math", "x^2+x", "Answer: x(x+1)"),
    ("math", r"\{1,2\}", r"\boxed{\{2,1\}}"),
]

# Kind, verifier, gold, text.
TRICKY = [
    ("two answers", "choice", "A", "Answer: (A) or (B)"),
    ("two answers", "choice", "A", "Answer: A, B"),
    ("two answers", "choice", "A", "Answer: (A)\nAnswer: (B)"),
    ("two answers", "words", "Yes", "Answer: Yes. No."),
    ("two answers", "number", "5", "Answer: 5 or 6"),
    ("two answers", "number", "5", "Answer: 5-6"),
    ("two answers", "number", "5", "Answer: 5 5"),
    ("two answers", "number", "5", "Answer: 5 to 5"),
    ("two answers", "choice", "A", "Answer: A/F"),
    ("two answers", "choice", "A", "Answer: A, F"),
    ("two answers", "choice", "A", "Answer: (A)~(F)"),
    ("two answers", "words", "Yes", "Answer: Yes/Maybe"),
    ("two answers", "exact", "Paris", "Answer: Paris or Rome"),
    ("two answers", "exact", "Paris", "Answer: Rome\nAnswer: Paris"),
    ("two answers", "regex", "5", "Answer: 5 or 6"),
    ("two answers", "math", "5", r"\boxed{5} and \boxed{6}"),
    ("two answers", "math", "5", r"\boxed{6}. Answer: 5"),
    ("two answers", "math", FRACTION, rf"Answer: {FRACTION}, 2"),
    ("two answers", "math", "5", r"Answer: \pm 5"),
    ("two answers", "words", "Yes", "Answer: Yes, but no"),
    ("two answers", "words", "Yes", "Yes.\n\nNo."),
    ("two answers", "choice", "A", "Answer: (A). (B) is also correct."),
    ("two answers", "choice", "A", "Answer: A as well as B"),
    ("two answers", "choice", "A", "(A) red ball\n(B) green ball"),
    ("two answers", "choice", "A", r"\boxed{A \text{ or } B}"),
    ("two answers", "number", "5", "Answer: 5. 6."),
    ("two answers", "number", "5", "#### 5\n#### 6"),
    ("two answers", "exact", "Paris", r"\boxed{Paris} or \boxed{Rome}"),
    ("changed mind", "words", "Yes", "Answer: Yes. No, you do not."),
    ("changed mind", "words", "Yes", "Answer: Yes. Wait, you turned."),
    ("changed mind", "choice", "A", "Answer: (A). On second thought, (B)."),
    ("changed mind", "number", "5", "Answer: 5 since it is odd. So 6."),
    ("every option", "choice", "A", "(A) (B) (C) (D) (E)"),
    ("denied", "choice", "A", "Answer: not A"),
    ("denied", "choice", "A", "Answer: (A) is wrong"),
    ("denied", "words", "Yes", "Answer: not Yes"),
    ("denied", "choice", "A", "Answer: (A). That is wrong."),
    ("denied", "number", "5", "Answer: 5, not 5"),
    ("denied", "exact", "Paris", "Answer: not Paris"),
    ("denied", "math", "5", "Answer: 5 is not it"),
    ("denied", "math", FRACTION, rf"Answer: \text{{not }} {FRACTION}"),
    ("doubt", "choice", "A", "Answer: (A)?"),
    ("doubt", "number", "5", "Answer: 5, maybe"),
    ("doubt", "words", "Yes", "Answer: Yes, perhaps"),
    ("doubt", "words", "No", "Answer: No idea"),
    ("doubt", "number", "5", "5 or more"),
    ("look-alike", "choice", "A", "Answer: (\u0410)"),
    ("look-alike", "words", "Yes", "Answer: Y\u0435s"),
    ("look-alike", "exact", "Paris", "Answer: \u0420aris"),
    ("look-alike", "number", "5", "Answer: \uff15"),
    ("look-alike", "number", "5", "Answer: 5\u0665"),
    ("look-alike", "math", "5", "Answer: \u0665"),
    ("another number", "number", "5", "Answer: 5 million"),
    ("another number", "number", "5", "Answer: 5 x"),
    ("another number", "number", "5", "Answer: 5 A5"),
    ("another number", "number", "5", r"Answer: 5\text{ million}"),
    ("another number", "math", "5", r"Answer: 5\pi"),
    ("another number", "math", "5", "Answer: 5.000001"),
    ("a calculation", "number", "18", "Answer: 9 * 2"),
    ("a calculation", "math", "18", r"\boxed{9 \cdot 2}"),
    ("a calculation", "math", "18", r"Answer: \frac{36}{2}"),
    ("a calculation", "math", "5", r"Answer: \sqrt{25}"),
    ("a calculation", "number", "5", "Answer: 5:+"),
    ("a calculation", "number", "5", "Answer: 5/"),
    ("a calculation", "number", "5", "Answer: 5 plus one"),
    ("a calculation", "number", "5", "Answer: 5!"),
    ("a calculation", "math", "x^2+x", "Answer: x^2++x"),
    ("a range", "number", "5", "Answer: 5~6"),
    ("a range", "number", "5", "Answer: 5..7"),
    ("a range", "number", "5", "Answer: 5\u2013"),
    ("a range", "choice", "A", "Answer: A-F"),
    ("cut off", "number", "0.3", "Answer: 0.3..."),
    ("cut off", "math", "0.3", "Answer: 0.3..."),
    ("10,000 digits", "number", "5", "Answer: " + "5" * 10_000),
    ("10,000 digits", "math", "5", "Answer: 5." + "0" * 10_000 + "1"),
    ("LaTeX bomb", "math", FRACTION, r"\boxed{9^{9^{9^{9^{9}}}}}"),
    ("LaTeX bomb", "math", FRACTION, "Answer: " + r"\frac{1}{" * 24 + "2" + "}" * 24),
    ("LaTeX bomb", "math", FRACTION, r"\boxed{" * 5_000),
    ("LaTeX bomb", "math", FRACTION, "Answer: " + "{" * 100_000),
    ("nothing", "exact", "Paris", "Answer:"),
    ("nothing", "math", "5", r"\boxed{}"),
    ("nothing", "choice", "A", "A red ball is round."),
]


@pytest.mark.parametrize(("name", "gold", "text"), RIGHT)
def test_right_answers_in_the_forms_that_people_write(name: str, gold: str, text: str) -> None:
    verifier = NAMES[name]
    normal = verifier.normal_gold(gold)
    assert verifier.check(normal, text)
    assert verifier.check(normal, gold) is (name != "regex")


@pytest.mark.parametrize(("kind", "name", "gold", "text"), TRICKY, ids=[f"{kind}-{k}" for k, (kind, *_) in enumerate(TRICKY)])
def test_tricky_answers_are_not_rewarded(kind: str, name: str, gold: str, text: str) -> None:
    verifier, started = NAMES[name], time.monotonic()
    assert not verifier.check(verifier.normal_gold(gold), text)
    # The judge's process may have to be started as well.
    assert time.monotonic() - started < 5 * JUDGE_SECONDS


def tricky_table() -> str:
    """Return the table of docs/tasks.md."""
    rows = [
        f"| {kind} | `{name}` | `{gold}` | `{json.dumps(text, ensure_ascii=True)[1:-1][:50]}` |".replace("\\\\", "\\")
        for kind, name, gold, text in TRICKY
    ]
    return "\n".join(["| kind | verifier | gold | text |", "| --- | --- | --- | --- |", *rows])


def test_the_page_of_tasks_holds_the_table_of_tricky_answers() -> None:
    assert tricky_table() in (DOCS / "tasks.md").read_text(encoding="utf-8")


def test_every_name_has_a_verifier() -> None:
    assert all(make_verifier(name).answer_format for name in get_args(VerifierName))
    # The options go up to the last letter that is an answer.
    assert make_verifier("choice", ["A", "(F)"]).read("(F)") == "(F)"
    assert make_verifier("choice", ["A", "(F)"]).read("(G)") is None


@pytest.mark.parametrize(
    ("verifier", "gold", "message"),
    [
        (CHOICE, "Paris", "'Paris' is no answer that the verifier can parse"),
        (REGEX, "(", r"'\(' is no regular expression: missing \)"),
        (MATH, " ", "expected an expression of 1 to 300 characters, got ' '"),
    ],
)
def test_a_gold_answer_that_cannot_be_one_is_refused(verifier: Verifier, gold: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        verifier.normal_gold(gold)


def test_a_program_is_one_block_or_the_whole_text() -> None:
    python = make_verifier("python")
    assert python.read("Here:\n```python\ndef f():\n    pass\n```\nDone.") == "def f():\n    pass\n"
    assert python.read("    return 1\n") == "    return 1"
    assert python.read("\ufeffa = 1\r\nb = 2") == "a = 1\nb = 2"
    assert python.read("~~~python\na\n```\n~~~") == "a\n```\n"
    assert python.read("1. So:\n   ```\n   if a:\n       b\n   ```\n") == "if a:\n    b\n"
    assert python.read("```python\na") == "a\n"
    # Of several blocks it is the one that defines the function, here any.
    for example in ("print(f(1))", ">>> f(1)\n2", "f = 1", "assert f(1) == 2"):
        for text in ("```python\ndef f():\n    pass\n```\nsay\n```\n{}", "~~~\n{}\n~~~\n```\ndef f():\n    pass\n```"):
            assert python.read(text.format(example)) == "def f():\n    pass\n"
    two = "```\ndef f(): pass\n```\n```\ndef {}(): pass\n```"
    for none in ("", "```python\na\n```\n```python\nb\n```", "a ``` b", "```\n", two.format("f"), two.format("g"), "\ud800"):
        assert python.read(none) is None
    assert Python().read(two.format("g"), "g") == "def g(): pass\n"
    assert Python().read(two.format("f"), "f") is None
    with pytest.raises(NotImplementedError, match="many at a time"):
        python.check("", "")


def test_a_judgement_that_takes_for_ever_is_cut_off_and_the_next_one_is_made() -> None:
    # What goes on for ever would take hours; what does not takes longer than a second where the machine is busy.
    judge = Judge(seconds=2.0)
    assert judge.ask("regex", "a+", "aaa")
    started = time.monotonic()
    assert not judge.ask("regex", "(a+)+$", "a" * 40 + "b")
    assert time.monotonic() - started < 20
    assert judge.ask("math", "1/2", "0.5")
    judge.close()


def test_a_judge_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuromas.tasks.math_process.sys.executable", "/bin/false")
    with pytest.raises(OSError, match=r"^verifier math cannot start: its process ended$"):
        Judge(1.0).ask("math", "1", "2")


# --- Fuzz ----------------------------------------------------------------------------------------------------------------

# fmt: off
PIECES = st.sampled_from([
    "Answer:", "answer is", "(A)", "(B)", "A", "B", "F", "Yes", "No", "5", "6", "5.0", "-5", "5,000", " or ", " not ", " and ",
    "?", ".", "..", "\n", " ", ",", "$", "**", r"\boxed{", "}", r"\frac{1}{2}", r"\frac", "{", "^", "x", "+", "=", "%", r"\pi",
    r"\pm", "```", "Paris", "Rome", "\u0410", "\uff15", "\u2212", "\u200b", "1/2", "0.5", "million", "\ud800", "\x00", "n't",
    ":", "/", "-", "~", "<", "|", "&", "!", "*", "(", ")", "\u2013", "\u2026", "\u00b2", " to ", " plus ", " eggs",
])
# fmt: on
TEXTS = st.one_of(st.lists(PIECES, max_size=8).map("".join), st.text(max_size=40))
STARTS = st.sampled_from(["", "Answer: ", "the answer is **", "hm. Answer:\n"])
GOLDS = {"choice": "(A)", "words": "Yes", "number": "5", "exact": "Paris", "math": "5"}
SPELLINGS = {
    "choice": {"a", "(a)"},
    "words": {"yes"},
    "number": {"5", "+5", "5.0", "+5.0"},
    "exact": {"paris"},
    "math": {"5", "+5", "5.0", "+5.0", "\\boxed{5}", "\\boxed{5.0}"},
}
OTHERS = {
    "choice": r"\([b-z]\)|(?<![^\W_])[b-e](?![\w'-])",
    "words": r"\bno\b",
    "number": r"[0-9]",
    "exact": r"[^\s*`\"'$.]",
    "math": r"[0-9]",
}
TAKEN_BACK = r"\W*(?:(?:or|nor)\b|(?:not|never)\W*$)"
STOP = r"[.!?;]+(?=[)\]}*_`\"'$\u201d]*(?:\s|$))|\n"
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))
WRAPPED = "*`\"'$ \t\r\n\u20ac\u00a3"


def refused_by_care(name: str, text: str) -> bool:
    """What nobody would reward, said in another way than the verifiers do, word by word: the answer that is claimed first has
    to be a spelling of the gold one, between spaces, stops and wrapping alone, its sentence may name no other answer, ask
    nothing and not go on in "or" or "not", and no later sentence may be another answer.
    """
    # A percent sign is free in mathematics, and a box says "answer:".
    text = text.lower()
    if name == "math":
        text = re.sub(r"(?<=[0-9])\s*(\\?%|percent\b)", "", text.replace("\\$", "$"))
    text = re.sub(r"\\boxed\{([^{}]*)\}", r" answer: \1 ", text)
    start, *claims = [part.strip(WRAPPED + ":=") for part in re.split(r"\banswer(?: is\b)?", text)]
    claims = [claim for claim in claims or [start] if claim.strip(WRAPPED + ":=.")] or [start][: bool(start)]
    given = [claim for claim in (*claims, start) if claim and _first_word(claim) in SPELLINGS[name]]
    claims = claims if given and given[0] in claims else [start]
    if not given:
        return True
    after = " answer ".join(claims[claims.index(given[0]) :])
    rest = after[after.index(_first_word(after)) + len(_first_word(after)) :]
    if name in ("number", "math"):
        rest = re.sub(r"(?<![\w.,\u2212-])\+?0*5(\.0+)?(?![\w])", " ", rest)  # the same number once more
    if name == "exact":
        return re.search(OTHERS[name], rest.replace(" answer ", " ")) is not None
    first, *more = re.split(STOP, rest)
    asked = re.search(STOP, rest)
    if re.search(OTHERS[name], first) or re.match(TAKEN_BACK, first) or (asked and "?" in asked.group()):
        return True
    joined = r"(?:\W|_|\b(?:and|or|to|plus|eggs|answer)\b)*"
    return any(re.fullmatch(f"{joined}(?:{OTHERS[name]}){joined}", sentence) for sentence in more)


def _first_word(claim: str) -> str:
    """Return the first word without its wrapping and stops: of "**5**, eggs" it is 5, of "5:+" all of it."""
    word = claim.split()[0].strip(WRAPPED + "_")
    while word and (
        word[-1] in ".,;:!_\u2014" + WRAPPED or any(word[-1] == b and word.count(a) < word.count(b) for a, b in PAIRS)
    ):
        word = word[:-1]
    return word


def fuzz(name: str, count: int) -> None:
    verifier, gold = NAMES[name], GOLDS[name]
    seen = [0, 0]

    @seed(0)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    # Half of them start well.
    @given(st.one_of(TEXTS, st.builds("{}{}{}".format, STARTS, st.just(gold), TEXTS)))
    def check(text: str) -> None:
        seen[0] += 1
        if verifier.check(gold, text):
            seen[1] += 1
            assert not refused_by_care(name, text), text
        assert verifier.read(text) is None or isinstance(verifier.read(text), str)

    check()
    assert seen[1] > 0, "the texts never hit the answer, so that nothing is tried"


@pytest.mark.parametrize("name", GOLDS)
def test_no_text_crashes_a_verifier_or_is_rewarded_wrongly(name: str) -> None:
    fuzz(name, 1_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDS)
def test_100_000_texts_in_total(name: str) -> None:
    fuzz(name, 20_000)


@pytest.mark.parametrize("reader", [make_verifier("python").read, read_open], ids=["python", "open"])
def test_readers_of_anything_read_anything(reader: Callable[[str], str | None]) -> None:
    @seed(0)
    @settings(max_examples=500, deadline=None, database=None)
    @given(TEXTS)
    def check(text: str) -> None:
        found = reader(text)
        assert found is None or found

    check()


def test_expressions_are_judged_without_a_crash() -> None:
    @seed(0)
    @settings(max_examples=100, deadline=None, database=None)
    @given(st.lists(st.sampled_from(["1", "2", "+", r"\frac{1}{2}", "^2", r"\sqrt{2}", "(", ")", "{", "}", "/"]), max_size=5))
    def check(parts: list[str]) -> None:
        assert MATH.check(r"\sqrt{3}", f"Answer: {''.join(parts)}") is False

    check()
