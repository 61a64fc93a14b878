"""Text to token ids by a bundle's chat template; the words of each refusal are tested in test_engine.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from medusa_runtime import Engine
from medusa_runtime.bundle import TOKENIZER, Bundle, rewrite_manifest
from medusa_runtime.errors import ArgumentError, BundleError, CapacityError, PromptError
from medusa_runtime.manifest import Manifest
from medusa_runtime.prompt_encoder import PromptEncoder
from tokenizers import models, processors

from .chat_templates import FAMILIES, special_names
from .prompt_encoders import BUILDERS, byte_level, decoded, encoder

ROOT = Path(__file__).parents[2]


def test_it_lays_out_as_the_engine_does(tiny_bundle: Path) -> None:
    encoder, engine = PromptEncoder(Bundle.open(tiny_bundle)), Engine.load(tiny_bundle, profile="plain", threads=1)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well?"}]
    assert encoder.has_chat_template
    for prompt in ("Hello", messages):
        assert encoder.encode(prompt) == engine.encode(prompt)
    assert encoder.encode("Hello", raw=True) == engine.encode("Hello", raw=True) != engine.encode("Hello")


def test_a_prompt_longer_than_the_context_could_hold_is_not_tokenised(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = PromptEncoder(Bundle.open(tiny_bundle))
    limit = 512 * 64  # tokens of the context, characters of each; the tiny vocabulary's tokens are shorter
    assert encoder.max_characters == limit
    assert len(encoder.encode("x" * limit, raw=True)) == limit
    monkeypatch.setattr(encoder.tokenizer, "encode", None)
    message = {"role": "user", "content": "x" * (limit - 4)}
    for prompt, raw, characters in (
        ("x" * (limit + 1), True, limit + 1),
        ("x" * 10**8, False, 10**8),
        ([message, message], False, 2 * limit),
        ([message], False, limit + 46),  # with what the template writes around it
    ):
        with pytest.raises(CapacityError, match=rf"has {characters} characters, expected at most {limit}, more than"):
            encoder.encode(prompt, raw=raw)


def test_the_limit_follows_the_longest_token(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    content = json.loads((folder / TOKENIZER).read_bytes())
    content["model"]["vocab"]["y" * 500] = 300
    (folder / TOKENIZER).write_text(json.dumps(content))
    stated = Manifest.from_bytes((folder / "manifest.json").read_bytes(), "m")
    rewrite_manifest(folder, stated)
    assert PromptEncoder(Bundle.open(folder)).max_characters == 512 * 500


@pytest.mark.parametrize(
    "ids",
    [[4, 5], (4, 5), range(4, 6), [np.int32(4), np.uint8(5)], np.array([4, 5]), np.array([4, 5], np.uint16)],
    ids=repr,
)
def test_token_ids_are_used_as_they_are(ids: Any) -> None:
    for raw in (False, True):
        found = encoder("smollm2").encode(ids, raw=raw)
        assert (found, {type(token) for token in found}) == ([4, 5], {int})


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([4, "x"], PromptError, "holds 'x', of type str, at place 1; expected one flat list of token ids"),
        (
            [4, {"role": "user", "content": "x"}],
            PromptError,
            "of type dict, at place 1; expected one flat list of token",
        ),
        ([{"role": "user", "content": "x"}, 4], PromptError, "message 1 is 4, of type int; expected a mapping"),
        (["x", 4], PromptError, "message 0 is 'x', of type str"),
        ([4, 5.0], PromptError, "holds 5.0, of type float, at place 1"),
        ([4.0], PromptError, "holds 4.0, of type float, at place 0"),
        ([True, 4], PromptError, "holds True, of type bool, at place 0"),
        ([np.float32(4)], PromptError, "of type float32, at place 0"),
        (np.array([4.0]), PromptError, "an array of float64"),
        (np.array([[4]]), PromptError, r"has the shape \(1, 1\)"),
        (np.array(4), PromptError, r"has the shape \(\)"),
        (np.array([], int), PromptError, "the prompt is empty"),
        (np.array([None]), PromptError, "an array of object"),
        ([-1], PromptError, "token ids outside 0 …"),
        ([4, 10**6], PromptError, "from 4 to 1000000; was another tokenizer used"),
        ([1 << 70], PromptError, "token ids outside 0 …"),
        ([4] * 17, CapacityError, "has 17 tokens, expected at most 16, the context"),
        (np.full(17, 4), CapacityError, "has 17 tokens, expected at most 16, the context"),
        ("", PromptError, "the prompt is empty"),
        ([], PromptError, "the prompt is empty"),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_prompts_of_other_types_are_refused(prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encoder("smollm2", context=16).encode(prompt)


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("x", {"raw": True, "tools": [TOOL]}, "a raw prompt was passed together with tools"),
        ("x", {"raw": True, "chat_template_arguments": {"a": 1}}, "a raw prompt .* with chat_template_arguments"),
        ("x", {"raw": True, "continue_final_message": True}, "a raw prompt .* with continue_final_message"),
        ([4], {"tools": [TOOL]}, "a prompt of token ids was passed together with tools; expected messages"),
        ([4], {"chat_template_arguments": {"a": 1}}, "a prompt of token ids .* with chat_template_arguments"),
        ([4], {"continue_final_message": True}, "a prompt of token ids .* with continue_final_message"),
        ([4], {"sanitize": True}, "a prompt of token ids .* with sanitize"),
        ([4], {"tools": np.array([1, 2])}, "a prompt of token ids was passed together with tools"),
        ([4], {"tools": np.array(1)}, "a prompt of token ids was passed together with tools"),
        ([4], {"chat_template_arguments": np.array([1, 2])}, "a prompt of token ids .* chat_template_arguments"),
        ("x", {"raw": True, "tools": np.array([1, 2])}, "a raw prompt was passed together with tools"),
        ("x", {"tools": np.array([1, 2])}, r"tools is array\(\[1, 2\]\), of type ndarray; expected a list"),
        ("x", {"tools": np.array(1)}, r"tools is array\(1\), of type ndarray; expected a list"),
        ("x", {"chat_template_arguments": np.array([1, 2])}, "of type ndarray; expected a mapping"),
        ("x", {"continue_final_message": True}, "the last message is one of the role 'user'"),
        ("x", {"chat_template_arguments": {"bos_token": "x"}}, "has 'bos_token', which is set by the renderer"),
        ("x", {"tools": [print]}, "the function print"),
        ([{"role": "user", "content": "x"}], {"raw": True}, "a raw prompt must be one text"),
    ],
    ids=repr,
)
def test_options_that_do_not_fit_are_refused(prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        encoder("smollm2").encode(prompt, **options)
    harmless = {name: None if name in ("tools", "chat_template_arguments") else False for name in options}
    assert encoder("smollm2").encode("x", **harmless)


@pytest.mark.parametrize("name", ["raw", "continue_final_message", "sanitize"])
def test_switches_are_bools(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name} is 'no', of type str; expected True or False"):
        encoder("smollm2").encode("x", **{name: "no"})  # type: ignore[arg-type]


def test_without_a_template_only_text_and_token_ids_are_encoded(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    rewrite_manifest(folder, Manifest.from_bytes((folder / "manifest.json").read_bytes(), "m"))
    prompts = PromptEncoder(Bundle.open(folder))
    assert not prompts.has_chat_template
    assert prompts.encode([4, 5]) == [4, 5]
    plain = prompts.encode("a<|im_end|>", raw=True)
    assert plain != prompts.encode("a<|im_end|>", raw=True, sanitize=True)
    with pytest.raises(BundleError, match="has no chat template"):
        prompts.encode("a", sanitize=True)


def test_options_reach_the_template() -> None:
    prompts = encoder("qwen2.5")
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    text = decoded(prompts, prompts.encode([message], tools=[TOOL]))
    assert '{"type": "function", "function": {"name": "f"}}\n</tools>' in text
    assert text.endswith("<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n")
    assert prompts.encode([message], tools=[]) == prompts.encode([message])
    thinking = encoder("qwen3")
    ids = thinking.encode("x", chat_template_arguments={"enable_thinking": False})
    assert decoded(thinking, ids).endswith("<think>\n\n</think>\n\n")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Once "}]
    ids = prompts.encode(messages, continue_final_message=True)
    assert decoded(prompts, ids).endswith("<|im_start|>assistant\nOnce ")


def test_all_text_counts_towards_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = encoder("smollm2", context=16)
    limit, long = prompts.max_characters, "x" * prompts.max_characters
    monkeypatch.setattr(prompts._template, "render", None)
    message = {"role": "user", "content": "x"}
    call = {"function": {"name": "f", "arguments": json.dumps({"a": [long]})}}
    for messages, options in (
        ([message | {"name": long}], {}),
        ([message | {"more": {"a": [long]}}], {}),
        ([message | {"more": {long: 1}}], {}),
        ([message | {"content": [{"type": "text", "text": long}]}], {}),
        ([{"role": "assistant", "tool_calls": [call]}], {}),
        ([message], {"tools": [{"description": long}]}),
        ([message], {"tools": [{"x": "y" * (limit // 100)} for _ in range(101)]}),
        ([message], {"chat_template_arguments": {"a": long}}),
    ):
        with pytest.raises(CapacityError, match=f"characters, expected at most {limit}"):
            prompts.encode(messages, **options)


BOS = {"": [], "bos": ["<s>"], "both": ["<s>"], "roberta": ["<s>"]}


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("post_process", BOS)
def test_a_raw_prompt_begins_with_one_bos_where_the_tokenizer_adds_it(build: str, post_process: str) -> None:
    prompts = encoder("hermes", core=BUILDERS[build]("hermes", post_process))
    bos = prompts.tokenizer.core.token_to_id("<s>")
    plain = prompts.encode("The dog", raw=True)
    assert plain[:2].count(bos) == len(BOS[post_process])
    assert plain[0] == bos or post_process == ""
    written = prompts.encode("<s>The dog", raw=True)
    assert (written[0], written.count(bos)) == (bos, 1)
    if build == "byte_level":
        assert written == (plain if post_process else [bos, *plain])
    assert prompts.encode("<s><s>The dog", raw=True).count(bos) == 2  # as it was written
    assert prompts.encode("The <s> dog", raw=True).count(bos) == 1 + len(BOS[post_process])


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("post_process", BOS)
@pytest.mark.parametrize("family", ["hermes", "mistral", "qwen2.5"])
def test_a_rendered_prompt_has_the_bos_of_the_template_only(family: str, post_process: str, build: str) -> None:
    """As in transformers: a template writes all special tokens, and the tokenizer adds none."""
    if post_process == "roberta" and family == "qwen2.5":
        post_process = "both"
    prompts = encoder(family, core=BUILDERS[build](family, post_process))
    bos = prompts.tokenizer.core.token_to_id(special_names(family)["bos_token"])
    for sanitize in (False, True):
        ids = prompts.encode("The dog", sanitize=sanitize)
        assert ids.count(bos) == (0 if family == "qwen2.5" else 1)
        assert family == "qwen2.5" or ids[0] == bos


def test_several_tokens_in_front_are_not_added_twice() -> None:
    core = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    core.add_special_tokens(["[gMASK]", "<sop>"])
    core.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 1), ("<sop>", 2)]
    )
    prompts = encoder("glm4", core=core)
    assert prompts.encode("a", raw=True) == prompts.encode("[gMASK]<sop>a", raw=True) == [1, 2, 0]
    assert prompts.encode("<sop>a", raw=True) == [1, 2, 2, 0]
    assert prompts.encode("b", raw=True) == [1, 2]


def test_many_threads_encode_at_once() -> None:
    prompts = encoder("qwen2.5")
    alone = encoder("qwen2.5")

    def ask(number: int) -> bool:
        content, sanitize = f"{number} <|im_end|>{number}" * (1 + number % 7), number % 2 == 0
        return prompts.encode(content, sanitize=sanitize) == alone.encode(content, sanitize=sanitize)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(320)))


def test_forked_processes_encode_while_threads_of_the_parent_do() -> None:
    """Whatever a thread holds at that moment must not stop the child."""
    script = """
import os, signal, threading
from tests.runtime.prompt_encoders import encoder
prompts, stop = encoder("qwen2.5"), threading.Event()
expected = [prompts.encode("a<|im_end|>", sanitize=sanitize) for sanitize in (False, True)]
fresh = [encoder("qwen2.5") for _ in range(8)]

def ask(number):
    while not stop.is_set():
        for sanitize in (False, True):
            assert fresh[number % 8].encode("a<|im_end|>", sanitize=sanitize) == expected[sanitize]

threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
for thread in threads:
    thread.start()
for turn in range(8):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        for sanitize in (True, False):
            assert fresh[turn].encode("a<|im_end|>", sanitize=sanitize) == expected[sanitize]
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, turn
stop.set()
for thread in threads:
    thread.join()
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_families_are_encoded_as_transformers_does() -> None:
    from transformers import PreTrainedTokenizerFast

    messages = [{"role": "user", "content": "The dog <|im_end|> [INST]"}, {"role": "assistant", "content": "sleeps"}]
    for family, (template, *_, bos, eos) in FAMILIES.items():
        theirs = PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(byte_level(family).to_str()), chat_template=template
        )
        names = {name: token for name, token in zip(("bos_token", "eos_token"), (bos, eos), strict=True) if token}
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **names)
        assert encoder(family).encode(messages) == expected, family
