"""Chat templates: one is chosen, the model's others are kept by name, and files of the user's take their place."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from medusa_exporter.build import build
from medusa_exporter.cli import main
from medusa_exporter.loading.templates import (
    MAX_TEMPLATE_BYTES,
    ChatTemplates,
    choose_template,
    describe_wanted,
    try_template,
)
from medusa_exporter.models import ModelSource, load_tokenizer
from medusa_runtime import Engine
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError, PromptError
from medusa_runtime.prompt_encoder import PromptEncoder

from .conftest import Folder
from .gguf_models import CASES, with_keys, write

ONE = "1{% for m in messages %}{{ m['content'] }}{% endfor %}"
TWO, THREE = ONE.replace("1", "2", 1), ONE.replace("1", "3", 1)
SAID = [{"role": "user", "content": "Hi"}]


def choose(own: Any, wanted: str | None = None) -> tuple[ChatTemplates, Any]:
    tokenizer = SimpleNamespace(chat_template=own)
    return choose_template(tokenizer, wanted), tokenizer.chat_template


@pytest.mark.parametrize(
    ("own", "wanted", "chosen", "named"),
    [
        (None, None, None, {}),
        ("", None, None, {}),
        (ONE, None, ONE, {}),
        (ONE, "default", ONE, {}),
        ({"default": ONE}, None, ONE, {}),
        ({"tools": TWO}, None, TWO, {}),
        ({"default": ONE, "tools": TWO}, None, ONE, {"default": ONE, "tools": TWO}),
        ({"default": ONE, "tools": TWO}, "tools", TWO, {"default": ONE, "tools": TWO}),
        ({"rag": ONE, "tools": TWO}, "tools", TWO, {"rag": ONE, "tools": TWO}),
    ],
)
def test_the_choice(own: Any, wanted: str | None, chosen: str | None, named: dict[str, str]) -> None:
    """Whatever lays text out with the tokenizer from then on takes the chosen one."""
    assert choose(own, wanted) == (ChatTemplates(chosen, named), chosen)


@pytest.mark.parametrize("own", [None, ONE, {"default": ONE, "tools": TWO}])
def test_a_file_takes_the_place_of_the_default(tmp_path: Path, own: Any) -> None:
    (tmp_path / "own.jinja").write_text(THREE)
    found, _ = choose(own, str(tmp_path / "own.jinja"))
    assert found.chosen == THREE
    assert found.named == ({} if own is None else {"default": ONE} if own == ONE else own)


@pytest.mark.parametrize(
    ("own", "wanted", "words"),
    [
        ({"rag": ONE, "tools": TWO}, None, "templates rag, tools and no default; .* --chat-template"),
        ({"default": ONE, "tools": TWO}, "tool", "'tool' is neither a file nor one .* the model has default, tools"),
        (None, "tools", "'tools' is neither .* the model has none"),
        ({"default": ONE, "../escape": TWO}, None, r"named '\.\./escape'"),
        ({"default": [ONE]}, None, "'default' that is a list"),
    ],
)
def test_what_cannot_be_chosen_is_told(own: Any, wanted: str | None, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        choose(own, wanted)


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xff", "not UTF-8"), (b" \n", "empty"), (b" " * (MAX_TEMPLATE_BYTES + 1), "more than")]
)
def test_a_file_that_is_no_template_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(PromptError, match=words):
        choose(None, str(tmp_path / "own.jinja"))


def test_a_build_is_another_one_with_another_template_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(ONE)
    before = describe_wanted(str(tmp_path / "own.jinja"))
    (tmp_path / "own.jinja").write_text(TWO)
    assert describe_wanted(str(tmp_path / "own.jinja")) != before
    assert (describe_wanted("tools"), describe_wanted(None)) == ("tools", None)


def with_list(folder: Folder) -> None:
    """As tokenizer_config.json holds several."""
    (folder.path / "chat_template.jinja").unlink(missing_ok=True)
    several = [{"name": "default", "template": ONE}, {"name": "tool_use", "template": TWO}]
    folder.config("tokenizer_config.json", chat_template=several)


def with_files(folder: Folder) -> None:
    """As newer folders hold several."""
    folder.config("tokenizer_config.json", chat_template=None)
    (folder.path / "chat_template.jinja").write_text(ONE)
    (folder.path / "additional_chat_templates").mkdir()
    (folder.path / "additional_chat_templates" / "tool_use.jinja").write_text(TWO)


@pytest.mark.parametrize("several", [with_list, with_files])
def test_named_templates_are_kept_and_chosen(
    folder: Folder, tiny_heads: Path, tmp_path: Path, several: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    several(folder)
    out = tmp_path / "out"
    assert build(str(folder), str(tiny_heads), out, profiles=("chain-1",)).built
    bundle = Bundle.open(out)
    assert (bundle.chat_template, bundle.chat_template_names) == (ONE, ["default", "tool_use"])
    assert bundle.named_chat_template("tool_use") == TWO
    text = {
        name: PromptEncoder(bundle, name).tokenizer.decode(PromptEncoder(bundle, name).encode(SAID))
        for name in (None, "tool_use")
    }
    assert text == {None: "1Hi", "tool_use": "2Hi"}
    engine = Engine.load(out, profile="plain", threads=1, chat_template="tool_use")
    assert engine.encode(SAID) == PromptEncoder(bundle, "tool_use").encode(SAID)
    with pytest.raises(BundleError, match=r"no chat template 'rag'; it has default, tool_use"):
        PromptEncoder(bundle, "rag")
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(out), "Hi", "--chat-template", "rag"])
    assert stop.value.code == 1
    assert "no chat template 'rag'" in capsys.readouterr().err


def test_a_gguf_file_has_named_ones_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = SimpleNamespace(is_fast=True, chat_template=ONE)  # as transformers reads it
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_a, **_k: read)
    keys = {"tokenizer__chat_template": ONE, "tokenizer__chat_template__tool_use": TWO}
    source = ModelSource.resolve(str(write(with_keys(CASES["llama"], **keys), tmp_path / "tiny.gguf")))
    assert choose_template(load_tokenizer(source), "tool_use") == ChatTemplates(TWO, {"default": ONE, "tool_use": TWO})
    source = ModelSource.resolve(str(write(CASES["llama"], tmp_path / "bare.gguf")))
    assert choose_template(load_tokenizer(source)) == ChatTemplates(None, {})


def test_the_command_takes_a_name_or_a_file(folder: Folder, tiny_heads: Path, tmp_path: Path) -> None:
    with_list(folder)
    (tmp_path / "own.jinja").write_text(THREE)
    arguments = ["build", str(folder), "--heads", str(tiny_heads), "-o", str(tmp_path / "out"), "--profile", "chain-1"]
    for wanted, text in (("tool_use", TWO), (str(tmp_path / "own.jinja"), THREE)):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--chat-template", wanted])
        assert not stop.value.code
        bundle = Bundle.open(tmp_path / "out")
        assert bundle.chat_template == text
        assert bundle.chat_template_names == ["default", "tool_use"]


def test_an_additional_template_is_a_source_of_the_build(folder: Folder) -> None:
    with_files(folder)
    assert "tool_use.jinja" in [file.name for file in ModelSource.resolve(str(folder)).files()]


def test_without_any_template_verify_and_bench_take_plain_text(
    folder: Folder, tiny_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.path / "chat_template.jinja").unlink(missing_ok=True)
    folder.config("tokenizer_config.json", chat_template=None)
    assert load_tokenizer(ModelSource.resolve(str(folder))).chat_template is None
    lines: list[str] = []
    build(str(folder), str(tiny_heads), tmp_path / "out", profiles=("chain-1",), report=lines.append)
    assert any("has no chat template: prompts are plain text" in line for line in lines)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"turns": ["What is a tree?", "And a bee?"]}) + "\n")
    common = ["--prompts", str(prompts), "--max-new-tokens", "4"]
    bench = ["bench", str(tmp_path / "out"), *common, "--threads", "1", "--json", str(tmp_path / "bench.json")]
    verify = ["verify", str(tmp_path / "out"), *common, "--json", str(tmp_path / "verify.json")]
    for arguments in (verify, bench):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        shown = capsys.readouterr()
        assert not stop.value.code, shown.err
        assert "no chat template: prompts are plain text" in shown.err
    assert json.loads((tmp_path / "verify.json").read_text())["answers"] == 2  # the second turn too
    assert json.loads((tmp_path / "bench.json").read_text())["prompts"]["turns"] == 2


def test_a_template_is_tried_before_the_model_is_loaded() -> None:
    with pytest.raises(PromptError, match="not valid"):
        try_template("{% for m in messages %}{{ m.content }", {})
    refusal = try_template("{{ raise_exception('a system message first') }}", {})
    assert refusal and "a system message first" in refusal
    assert try_template("{{ bos_token + messages[0].content }}", {"bos_token": "<s>"}) is None
