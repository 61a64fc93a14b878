"""Answers match what was asked for, and their tokens are those of plain constrained decoding, with every draft."""

import json
import re
import threading

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime.errors import ArgumentError, BackendError, RequestError
from medusa_runtime.sampling_params import DRAFTS, SamplingParams
from medusa_runtime.structured.answer_grammar import AnswerGrammar
from medusa_runtime.structured.outputs import StructuredOutputs

from ..decoding import CHAIN
from ..fake_backend import FakeBackend, random_tree
from ..toy_engine import toy_engine
from .constrained import END, VOCAB, adapter, constrained_tokens, grammar_of
from .schemas import is_valid, json_tokenizer, random_schema

PROMPT = [6, 9]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON = {"json": SCHEMA, "disable_any_whitespace": True}
KINDS = [
    JSON,
    {"json": SCHEMA},
    {"regex": "(ab|ba){2,4}[0-9]{3}"},
    {"choice": ["name", "names", 'n "1"\n', "größe", "\t"]},
    {"grammar": 'start: "(" item ")"\nitem: /[a-c]{1,3}/ | "(" item "," item ")"'},
    {"json_object": True},
]


def structured_engine(**arguments):
    backend = arguments.pop("backend", None) or FakeBackend(hit_rate=0.7, spread=2, vocab=VOCAB)
    return toy_engine(backend, tokenizer=json_tokenizer(), is_tree_fixed=False, **arguments)


@pytest.fixture(scope="module")
def engine():
    with structured_engine() as engine:
        yield engine


def test_answers_are_valid_for_random_schemas_and_equal_to_those_of_plain_decoding(engine):
    """A toy model writes JSON as badly as a model can: every token is a hash."""
    rng, tokens, steps = np.random.default_rng(1), 0, 0
    for number in range(200):
        schema = random_schema(rng)
        params = {
            "structured_outputs": {"json": schema, "disable_any_whitespace": True},
            "max_tokens": 900,
            "temperature": float(rng.choice([0, 1.0])),
            "seed": number,
        }
        prompt = rng.integers(END, size=5).tolist()
        result = engine.generate(prompt, SamplingParams(**params))
        assert result.choices[0].finish_reason == "stop", (number, schema, result.text)
        assert is_valid(schema, json.loads(result.text)), (number, schema, result.text)
        plain = engine.generate(prompt, SamplingParams(**params, profile="plain"))
        assert plain.token_ids == result.token_ids, (number, schema)
        tokens, steps = tokens + len(result.token_ids), steps + result.steps
    assert tokens > 1.5 * steps


@pytest.mark.parametrize("outputs", KINDS, ids=lambda one: next(iter(one)))
@pytest.mark.parametrize("draft", DRAFTS)
def test_tokens_are_those_of_plain_constrained_decoding(engine, outputs, draft):
    rng = np.random.default_rng(len(draft))
    for seed in range(4):
        params = SamplingParams(
            structured_outputs=outputs,
            draft=draft,
            profile=random_tree(rng, 7) if draft == "heads" else None,
            max_tokens=int(rng.integers(1, 60)),
            temperature=float(rng.choice([0, 0.8])),
            top_k=int(rng.choice([0, 4])),
            seed=seed,
            repetition_penalty=float(rng.choice([1, 1.4])),
            frequency_penalty=float(rng.choice([0, 0.5])),
            logit_bias={3: 4.0} if rng.random() < 0.3 else None,
        )
        prompt = rng.integers(END, size=4).tolist()
        result = engine.generate(prompt, params)
        tokens, reason = constrained_tokens(prompt, params)
        assert (list(result.token_ids), result.choices[0].finish_reason) == (tokens, reason)


@pytest.mark.parametrize("summaries", [False, True])
def test_answers_match_and_end_by_themselves(summaries):
    backend = FakeBackend(hit_rate=0.7, spread=2, vocab=VOCAB, summaries=summaries)
    with structured_engine(backend=backend) as engine:

        def answer(outputs, **more):
            result = engine.generate(PROMPT, SamplingParams(structured_outputs=outputs, max_tokens=200, **more))
            assert result.choices[0].finish_reason == "stop" and result.token_ids[-1] == END
            assert result.choices[0].stop_reason is None
            return result.text

        assert re.fullmatch("(ab|ba){2,4}[0-9]{3}", answer(KINDS[2]))
        for seed in range(10):
            assert answer(KINDS[3], temperature=2.0, seed=seed) in KINDS[3]["choice"]
            assert answer(KINDS[4], temperature=1.0, seed=seed).startswith("(")
        assert set(json.loads(answer(JSON))) == {"name", "age"}


def test_forced_tokens_come_many_a_step():
    """The only text that matches takes fewer steps than plain decoding by as much as the backend's literals allow."""
    backend = FakeBackend(vocab=VOCAB)
    backend.literal_counts = (7,)
    text = '{"item_count":[1,2,3],"city":"Rome","is_new":true}'
    with structured_engine(backend=backend, profile=TreeProfile.plain()) as engine:
        results = [
            engine.generate(PROMPT, SamplingParams(structured_outputs={"choice": [text]}, draft=draft))
            for draft in ("auto", "ngram", "heads")
        ]
    assert {one.text for one in results} == {text} and len({one.token_ids for one in results}) == 1
    count = len(results[0].token_ids)
    assert [one.steps for one in results] == [-(-(count - 1) // 8), -(-(count - 1) // 8), count - 1]
    assert not any(step.draft for step in backend.steps)


def test_several_answers_of_a_request(engine):
    params = SamplingParams(structured_outputs=JSON, n=3, temperature=1.0, seed=5, max_tokens=100)
    result = engine.generate(PROMPT, params)
    for choice in result.choices:
        assert is_valid(SCHEMA, json.loads(choice.text))
        assert list(choice.token_ids) == constrained_tokens(PROMPT, params, choice.index)[0]
    assert len({choice.text for choice in result.choices}) == 3


def test_a_limit_cuts_an_answer_that_could_be_continued(engine):
    import llguidance

    whole = engine.generate(PROMPT, SamplingParams(structured_outputs=JSON, max_tokens=200))
    for limit in range(1, len(whole.token_ids)):
        params = SamplingParams(structured_outputs=JSON, max_tokens=limit)
        result = engine.generate(PROMPT, params)
        assert result.choices[0].finish_reason == "length"
        assert result.token_ids == whole.token_ids[:limit]
        matcher = llguidance.LLMatcher(adapter(), grammar_of(params.structured_outputs))
        assert matcher.consume_tokens(list(result.token_ids))


def test_stop_strings_and_stop_tokens_end_an_answer_early(engine):
    params = {"structured_outputs": JSON, "max_tokens": 200}
    whole = engine.generate(PROMPT, SamplingParams(**params))
    stopped = engine.generate(PROMPT, SamplingParams(**params, stop=["age"]))
    assert stopped.text == whole.text.partition("age")[0] and stopped.choices[0].stop_reason == "age"
    token = whole.token_ids[4]
    cut = engine.generate(PROMPT, SamplingParams(**params, stop_token_ids=[token]))
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    assert cut.choices[0].finish_reason == "stop" and cut.choices[0].stop_reason == token


def test_other_parameters_forbid_tokens_too(engine):
    digits = [json_tokenizer().core.token_to_id(digit) for digit in "0123456789"]
    regex = {"regex": "[a-z]{2}[0-9]{4}"}
    biased = SamplingParams(structured_outputs=regex, logit_bias={digits[3]: 50}, bad_words=["33"], max_tokens=20)
    assert engine.generate(PROMPT, biased).text[2:] != "3333"
    limited = SamplingParams(structured_outputs={"regex": "[0-9]{4}"}, allowed_token_ids=[*digits[7:], END])
    assert re.fullmatch("[7-9]{4}", engine.generate(PROMPT, limited).text)
    assert list(engine.generate(PROMPT, limited).token_ids) == constrained_tokens(PROMPT, limited)[0]
    longer = SamplingParams(structured_outputs={"regex": "[0-9]{1,9}"}, min_tokens=6, max_tokens=20)
    assert len(engine.generate(PROMPT, longer).text) >= 6
    scored = SamplingParams(structured_outputs=JSON, logprobs=3, max_tokens=50)
    result = engine.generate(PROMPT, scored)
    assert [one.token_id for one in result.choices[0].logprobs] == list(result.token_ids)


def test_contradictions_end_the_request_and_the_next_one_is_exact(engine):
    good = SamplingParams(structured_outputs=JSON, max_tokens=60)
    expected = constrained_tokens(PROMPT, good)[0]
    for name, bad in {
        "allowed_token_ids": {"structured_outputs": {"regex": "[0-9]{4}"}, "allowed_token_ids": [END]},
        "min_tokens": {"structured_outputs": {"regex": "[0-9]{4}"}, "min_tokens": 20},
        "bad_words": {"structured_outputs": {"choice": ["x"]}, "bad_words": ["x"]},
    }.items():
        with pytest.raises(RequestError, match=f"because of structured_outputs and {name}; expected at least one"):
            engine.generate(PROMPT, SamplingParams(**bad))
        assert list(engine.generate(PROMPT, good).token_ids) == expected
    for endless in ({"grammar": "start: start"}, {"json": {"$ref": "#"}}):
        with pytest.raises(RequestError, match="structured_outputs cannot be followed behind the first 0 tokens"):
            engine.generate(PROMPT, SamplingParams(structured_outputs=endless))
        assert list(engine.generate(PROMPT, good).token_ids) == expected


@pytest.mark.parametrize(
    "more",
    [
        {"stop": ["34"]},
        {"stop_token_ids": json_tokenizer().encode("4", add_special_tokens=False)},
        {"stop": ["34"], "max_tokens": 3},
    ],
    ids=str,
)
def test_what_is_forbidden_behind_the_end_of_an_answer_does_not_matter(engine, more):
    """A draft looks ahead of the stop string, to where nothing is allowed."""
    outputs = {"choice": ["1234"]}
    results = [
        engine.generate(PROMPT, SamplingParams(structured_outputs=outputs, bad_words=["4x"], **way, **more))
        for way in (
            {"profile": "plain", "allowed_token_ids": range(END)},
            *({"draft": draft, "allowed_token_ids": range(END)} for draft in DRAFTS),
        )
    ]
    assert len({(result.token_ids, result.finish_reason, result.text) for result in results}) == 1
    assert results[0].finish_reason == "stop"


def test_a_long_certain_text_is_followed_piece_by_piece(engine):
    text = "abcde " * 3000
    grammar = engine._grammars.compile(StructuredOutputs.of_optional({"json": {"const": text}})).begin()
    found = grammar.forced([], 15)
    assert len(found.tokens) == 15 and len(grammar._consumed) <= 16


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"json": {"type": "foo"}}, "json of structured_outputs cannot be compiled: Invalid type: foo"),
        ({"json": {"uniqueItems": True}}, "Unimplemented keys.*leave out what is named"),
        ({"json": {"x-guidance": {"lenient": True}}}, "has the keyword x-guidance, which changes what documents match"),
        ({"json": {"type": "integer", "multipleOf": 999983}}, "multipleOf 999983, .*; expected at most 20000"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "minimum .* is greater than maximum"),
        ({"json": {"$ref": "http://localhost/schema"}}, "cannot be compiled: Resource"),
        ({"regex": "a(?=b)"}, "regex of structured_outputs cannot be compiled.*look-around"),
        ({"regex": "(" * 5000}, "regex of structured_outputs cannot be compiled"),
        ({"grammar": "begin: 'a'"}, "grammar of structured_outputs cannot be compiled"),
        ({"grammar": "start: " + "(" * 9000}, "too deeply nested"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_it_is_queued(engine, outputs, message):
    finished = engine.stats().finished
    with pytest.raises(ArgumentError, match=message) as caught:
        engine.submit(PROMPT, SamplingParams(structured_outputs=outputs))
    assert len(str(caught.value)) < 600
    assert engine.stats().finished == finished


class FailingBackend(FakeBackend):
    """Fails in one step."""

    fail_at = None

    def run(self, step):
        super().run(step)
        if self.fail_at is not None and len(self.steps) >= self.fail_at:
            self.fail_at = None
            raise BackendError("out of order")


def test_a_request_after_one_that_failed_is_exact():
    backend = FailingBackend(hit_rate=0.7, spread=2, vocab=VOCAB)
    params = SamplingParams(structured_outputs=JSON, max_tokens=60)
    with structured_engine(backend=backend) as engine:
        expected = engine.generate(PROMPT, params).token_ids
        for later in range(1, 8):
            backend.fail_at = len(backend.steps) + later
            with pytest.raises(BackendError):
                engine.generate(PROMPT, params)
            assert engine.generate(PROMPT, params).token_ids == expected


def test_masks_are_computed_in_the_schedulers_thread_and_only_where_the_walk_arrives(monkeypatch):
    threads, asked, compute = set(), [], AnswerGrammar.mask

    def spied(grammar, output):
        threads.add(threading.current_thread())
        asked.append(tuple(output))
        return compute(grammar, output)

    monkeypatch.setattr(AnswerGrammar, "mask", spied)
    found = {}
    with structured_engine() as engine:

        def ask(number):
            outputs = KINDS[number % len(KINDS)]
            params = SamplingParams(structured_outputs=outputs, max_tokens=30, temperature=1.0, seed=number)
            found[number] = params, engine.generate(PROMPT, params)

        callers = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(threads) == 1 and threads.isdisjoint(callers) and threading.current_thread() not in threads
        for params, result in found.values():
            assert list(result.token_ids) == constrained_tokens(PROMPT, params)[0]
        asked.clear()
        result = engine.generate(PROMPT, SamplingParams(structured_outputs=JSON, max_tokens=60, profile=CHAIN))
    assert len(asked) <= len(result.token_ids) + 3  # of the last step, also those behind the answer's end
    assert {one for one in asked if len(one) < len(result.token_ids)} == {
        result.token_ids[:count] for count in range(len(result.token_ids))
    }
