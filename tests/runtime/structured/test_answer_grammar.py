"""A matcher that goes back and forth allows and forces exactly what a new one does, behind every beginning."""

import numpy as np
import pytest
from medusa_runtime.errors import RequestError
from medusa_runtime.facts import ModelFacts
from medusa_runtime.structured.compiler import GrammarCompiler
from medusa_runtime.structured.outputs import StructuredOutputs

from .constrained import END, VOCAB, adapter, allowed_behind
from .schemas import json_tokenizer, random_schema
from .test_engine import KINDS

MODEL = ModelFacts("toy", "toy", 1, 8, 1, 1, 8, VOCAB, 4096, (END,))


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(json_tokenizer(), MODEL)


def outputs_of(rng):
    if rng.random() < 0.3:
        return StructuredOutputs(**KINDS[int(rng.integers(len(KINDS)))])
    return StructuredOutputs(json=random_schema(rng), disable_any_whitespace=bool(rng.random() < 0.7))


def random_answers(rng, outputs, tokenizer, count=3, length=25):
    """Tokens that are allowed one behind the other."""
    answers = []
    for _ in range(count):
        answer = list(answers[-1][: len(answers[-1]) // 2]) if answers else []
        while len(answer) < length and END not in answer:
            answer.append(int(rng.choice(allowed_behind(outputs, answer, tokenizer))))
        answers.append(answer)
    return answers


def test_questions_in_any_order_have_the_answers_of_a_new_matcher(compiler):
    tokenizer = adapter()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        outputs = outputs_of(rng)
        answers, grammar = random_answers(rng, outputs, tokenizer), compiler.compile(outputs).begin()
        for _ in range(60):
            answer = answers[int(rng.integers(len(answers)))]
            output = answer[: int(rng.integers(len(answer) + 1))]
            question = rng.integers(3)
            if END in output:
                assert grammar.mask(output) is None and not grammar.forced(output, 9).tokens
                assert grammar.allowed(output, [1]) == 0
            elif question == 0:
                assert np.flatnonzero(grammar.mask(output)).tolist() == allowed_behind(outputs, output, tokenizer)
            elif question == 1:
                grammar.forced(output, 9)
            else:
                following = [token for token in answer[len(output) :] if token != END]
                assert grammar.allowed(output, following) == len(following)
                assert grammar.allowed(output, [*following[:2], END, 1]) == len(following[:2])


def test_forced_tokens_are_the_only_ones_allowed_but_for_guesses(compiler):
    """What is certain is what plain constrained decoding chooses as well."""
    certain, forced, tokenizer = 0, 0, adapter()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        outputs = StructuredOutputs(json=random_schema(rng), disable_any_whitespace=True)
        grammar = compiler.compile(outputs).begin()
        answer = random_answers(rng, outputs, tokenizer, 1)[0]
        for count in range(len(answer)):
            (found, guesses), output = grammar.forced(answer[:count], 12), list(answer[:count])
            assert len(found) <= 12
            for at, token in enumerate(found):
                allowed = allowed_behind(outputs, output, tokenizer)
                assert allowed == [token] if at not in guesses else token in allowed
                output.append(token)
            forced, certain = forced + len(found), certain + len(found) - len(guesses)
    assert forced > 500 and certain > 0.6 * forced


def test_a_single_choice_is_forced_to_its_end(compiler):
    grammar = compiler.compile(StructuredOutputs(choice=["Rome, Rome"])).begin()
    forced = grammar.forced([], 99).tokens
    assert forced[-1] == END and json_tokenizer().decode(forced) == "Rome, Rome"
    assert grammar.forced(forced[:-1], 9) == ([END], [])
    assert not grammar.forced(forced, 9).tokens and grammar.mask(forced) is None
    assert grammar.mask([*forced, 5, 6]) is None  # of a tree that goes on behind the end
    assert grammar.allowed([], forced) == len(forced) - 1


def test_end_tokens_are_allowed_where_an_answer_may_end():
    model = ModelFacts("toy", "toy", 1, 8, 1, 1, 8, VOCAB, 4096, (END, 5))
    grammar = GrammarCompiler(json_tokenizer(), model).compile(StructuredOutputs(regex="7x{0,2}")).begin()
    one, two = (json_tokenizer().core.token_to_id(digit) for digit in "7x")
    assert np.flatnonzero(grammar.mask([])).tolist() == [one]
    assert set(np.flatnonzero(grammar.mask([one]))) == {two, END, 5}
    assert set(np.flatnonzero(grammar.mask([one, two, two]))) == {END, 5}


def test_tokens_that_are_not_allowed_are_an_error_which_ends_with_the_question(compiler):
    grammar = compiler.compile(StructuredOutputs(choice=["Rome"])).begin()
    expected = grammar.mask([]).tolist()
    with pytest.raises(RequestError, match="cannot be followed behind the first 1 tokens of the answer"):
        grammar.mask([json_tokenizer().core.token_to_id("x")])
    assert grammar.mask([]).tolist() == expected


class InterruptedMatcher:
    """Raises behind one call, as an interrupt does."""

    def __init__(self, matcher, at):
        self._matcher, self._left = matcher, at

    def __getattr__(self, name):
        method = getattr(self._matcher, name)

        def call(*arguments):
            found = method(*arguments)
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
            return found

        return call


def test_an_interrupt_leaves_nothing_behind(compiler):
    outputs, tokenizer = StructuredOutputs(**KINDS[0]), adapter()
    answer = random_answers(np.random.default_rng(3), outputs, tokenizer, 1)[0][:6]
    masks = [allowed_behind(outputs, answer[:count], tokenizer) for count in range(7)]
    for at in range(1, 30):
        grammar = compiler.compile(outputs).begin()
        grammar._matcher = InterruptedMatcher(grammar._matcher, at)
        for count in (4, 2, 6, 3):
            for ask in (grammar.forced, grammar.mask):
                try:
                    ask(answer[:count], *([5] if ask == grammar.forced else []))
                except KeyboardInterrupt:
                    assert np.flatnonzero(grammar.mask(answer[:count])).tolist() == masks[count]


def test_habits_are_guessed_and_certain_tokens_go_on_behind_them(compiler):
    """Line breaks and indentation, which the schema leaves open, are those of the members before."""
    names = ["one", "two", "three", "four"]
    schema = {"type": "object", "properties": {name: {"const": 1} for name in names}, "required": names}
    grammar = compiler.compile(StructuredOutputs(json=schema)).begin()
    encode = json_tokenizer().encode
    text = '{\n  "one": 1,\n  "two": 1,\n  "three": 1,\n  "four": 1'
    tokens = encode(text, add_special_tokens=False)
    first = encode('{\n  "one": 1,\n', add_special_tokens=False)
    assert tokens[: len(first)] == first
    at, reached = len(first), []
    while at < len(tokens):
        found = grammar.forced(tokens[:at], 20).tokens
        right = next(
            (n for n, pair in enumerate(zip(found, tokens[at:], strict=False)) if pair[0] != pair[1]), len(found)
        )
        right = min(right, len(tokens) - at)
        reached.append(right)
        at += right + 1
    assert sum(reached) > 4 * len(reached)
