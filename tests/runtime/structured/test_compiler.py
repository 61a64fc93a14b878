"""Compilation: what is kept, which tokenizers work, what is missing, and input that is meant to do harm."""

import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from medusa_runtime.errors import ArgumentError, CapacityError, MissingExtraError
from medusa_runtime.facts import ModelFacts
from medusa_runtime.structured import compiler as compiling
from medusa_runtime.structured import library
from medusa_runtime.structured.compiler import MAX_COMPILED, GrammarCompiler
from medusa_runtime.structured.outputs import StructuredOutputs

from ..small_tokenizers import KINDS, WITH_BYTES, byte_level, one_of_kind
from .constrained import END, VOCAB
from .schemas import json_tokenizer

ROOT = Path(__file__).parents[3]


def model_of(vocab=VOCAB, ends=(END,)):
    return ModelFacts("toy", "toy", 1, 8, 1, 1, 8, vocab, 4096, ends)


def test_what_was_used_last_is_kept():
    compiler = GrammarCompiler(json_tokenizer(), model_of())
    first = compiler.compile(StructuredOutputs(choice=["0"]))
    second = compiler.compile(StructuredOutputs(choice=["1"]))
    for number in range(2, MAX_COMPILED + 1):
        compiler.compile(StructuredOutputs(choice=[str(number)]))
        assert compiler.compile(StructuredOutputs(choice=["0"])) is first
    assert compiler.compile(StructuredOutputs(choice=["1"])) is not second
    assert len(compiler._compiled) == MAX_COMPILED


def test_several_threads_compile_at_once():
    compiler, found = GrammarCompiler(json_tokenizer(), model_of()), []

    def compile_all():
        for number in range(40):
            outputs = StructuredOutputs(regex=f"x{{{number % 7 + 1}}}")
            found.append(len(compiler.compile(outputs).begin().forced([], 5).tokens) > 0)

    threads = [threading.Thread(target=compile_all) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 240


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_of_bytes_work_and_others_are_refused(kind):
    tokenizer = one_of_kind(kind)
    compiler = GrammarCompiler(tokenizer, model_of(400, (1,)))
    outputs = StructuredOutputs(choice=["The dog"])
    if kind in (byte_level, *WITH_BYTES):
        grammar, text = compiler.compile(outputs).begin(), []
        while not text or text[-1] != 1:
            text.append(int(grammar.mask(text).argmax()))
        assert len(grammar.mask([])) == 400 and tokenizer.decode(text).strip() == "The dog"
        return
    with pytest.raises(ArgumentError, match=r"structured_outputs does not work with the tokenizer of .*json: "):
        compiler.compile(outputs)


def written(grammar, choose=np.argmax):
    """The first tokens that are allowed, one behind the other, up to the end."""
    text = []
    while not text or text[-1] not in grammar._end_ids:
        text.append(int(choose(grammar.mask(text))))
    return text


@pytest.mark.parametrize("kind", (byte_level, *WITH_BYTES))
def test_the_name_of_a_control_token_is_written_as_text(kind):
    """With the control token itself the answer would end, or lack the text."""
    tokenizer = one_of_kind(kind)
    compiler, added = GrammarCompiler(tokenizer, model_of(400, (1,))), tokenizer.added_tokens
    assert added
    for name in {facts.content for facts in added.values()}:
        for outputs in (
            StructuredOutputs(choice=[f"a{name}b"]),
            StructuredOutputs(json={"const": name}, disable_any_whitespace=True),
            StructuredOutputs(regex=f"x{re.escape(name)}"),
        ):
            last = lambda mask: mask.nonzero()[0][-1]  # noqa: E731
            for choose in (np.argmax, last):
                text = written(compiler.compile(outputs).begin(), choose)
                assert added.keys().isdisjoint(text[:-1])
                assert name in tokenizer.decode(text[:-1], skip_special_tokens=True)


@pytest.mark.parametrize("rule", ['a[stop="q"]', "a[max_tokens=3]"])
def test_rules_that_tokens_cannot_be_taken_back_from_are_refused(rule):
    grammar = f'start: "<" a ">"\n{rule}: /[a-z]*/'
    with pytest.raises(ArgumentError, match=r"it has a rule with stop= or max_tokens=.*; expected none: end the rule"):
        GrammarCompiler(json_tokenizer(), model_of()).compile(StructuredOutputs(grammar=grammar))


def test_a_model_may_have_fewer_logits_than_its_tokenizer_has_tokens():
    grammar = GrammarCompiler(json_tokenizer(), model_of(VOCAB - 20, (5,))).compile(StructuredOutputs(json={})).begin()
    assert len(grammar.mask([])) == VOCAB - 20


def test_a_model_without_an_end_is_refused():
    with pytest.raises(ArgumentError, match="needs a model with an end token"):
        GrammarCompiler(json_tokenizer(), model_of(ends=())).compile(StructuredOutputs(json={}))


def test_a_missing_or_old_library_is_named(monkeypatch):
    compiler = GrammarCompiler(json_tokenizer(), model_of())
    monkeypatch.setitem(sys.modules, "llguidance", SimpleNamespace(__version__="1.8.2"))
    with pytest.raises(MissingExtraError, match=r"llguidance 1.8.2 is too old, expected 1.9 or newer: pip install"):
        compiler.compile(StructuredOutputs(json={}))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"not installed .*pip install --upgrade 'medusa-export\[structured\]'"):
        compiler.compile(StructuredOutputs(json={}))


def test_the_library_is_loaded_where_it_is_needed_only():
    code = "import sys, medusa_runtime, medusa_runtime.openai_format; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


class PanicException(BaseException):
    """What a panic in Rust code becomes."""


PanicException.__module__ = "pyo3_runtime"


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), ValueError("no")])
def test_failures_of_the_library_are_refusals(monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(compiling, "_grammar", fail)
    with pytest.raises(ArgumentError, match=r"regex of structured_outputs cannot be compiled: (index|no)"):
        GrammarCompiler(json_tokenizer(), model_of()).compile(StructuredOutputs(regex="a"))


def test_a_stack_that_cannot_be_had_is_a_lack_of_memory(monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    before = threading.stack_size()
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(CapacityError, match="a thread with a stack of 256 MiB"):
        library.call_with_large_stack(lambda: 1)
    assert threading.stack_size() == before


HOSTILE = r"""
import json, sys
from medusa_runtime.errors import MedusaError
from medusa_runtime.structured.compiler import GrammarCompiler
from medusa_runtime.structured.outputs import StructuredOutputs
from tests.runtime.structured.test_compiler import model_of
from tests.runtime.structured.schemas import json_tokenizer

def chain(count, entry, last):
    return {f"a{at}": entry(f"#/$defs/a{at + 1}") for at in range(count)} | {f"a{count}": last}

def of_chain(count, entry):
    return {"json": {"$defs": chain(count, entry, {"type": "string"}), "$ref": "#/$defs/a0"}}

def rules(count, name, body):
    text = "".join(f"{name}{at}: {body.format(f'{name}{at + 1}')}\n" for at in range(count))
    return {"grammar": f"start: {name}0\n{text}{name}{count}: \"x\""}

cases = [
    rules(4900, "a", "{}"),
    rules(2600, "A", '("y" {})?'),
    rules(700, "a", '("y" ' * 10 + "{}" + ")?" * 10),
    of_chain(1500, lambda ref: {"$ref": ref}),
    of_chain(700, lambda ref: {"type": "object", "properties": {"x": {"$ref": ref}}, "required": ["x"]}),
    of_chain(900, lambda ref: {"allOf": [{"$ref": ref}, {"type": "string"}]}),
    of_chain(250, lambda ref: json.loads('{"items":' * 12 + json.dumps({"$ref": ref}) + "}" * 12)),
    {"json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    {"json": {"type": "array", "minItems": 10**9, "items": {}}},
    {"json": '{"type":"object","properties":{"a":' * 60 + '{"type":"null"}' + "}}" * 60},
    {"json": {"type": "string", "pattern": "(a{1,1000}){1,1000}"}},
    {"regex": "(a|b)*a(a|b){200}"},
    {"regex": "a?" * 4000},
    {"choice": ["x" * 1000] * 256},
    {"grammar": "start: " + " | ".join(f'"{at}"' for at in range(7000))},
    {"grammar": "start: a{1,100000}\na: b{1,100000}\nb: \"x\""},
]
compiler = GrammarCompiler(json_tokenizer(), model_of())
for case in cases:
    try:
        grammar = compiler.compile(StructuredOutputs(**case)).begin()
        output = []
        for _ in range(20):
            if (mask := grammar.mask(output)) is None:
                break
            output.append(int(mask.argmax()))
        print("ok", flush=True)
    except MedusaError as error:
        print(type(error).__name__, str(error)[:150], flush=True)
print(len(cases))
"""


def test_input_that_is_meant_to_do_harm_does_none():
    """In a process of its own, which a stack that overflows would end."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE], check=False, timeout=120, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *cases, count = done.stdout.splitlines()
    assert len(cases) == int(count), done.stdout
