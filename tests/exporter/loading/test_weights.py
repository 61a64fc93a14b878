"""Every weight comes from the files, and every tensor of the files is used; anything else is refused by name."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from medusa_exporter.cli import main
from medusa_exporter.models import ModelSource, load_model
from medusa_runtime.errors import UnsupportedModelError
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from .conftest import Folder

MLP = "model.layers.1.mlp.down_proj.weight"
Tensors = dict[str, Any]


def load(folder: Folder) -> Any:
    return load_model(ModelSource.resolve(str(folder)), torch.float32)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def test_a_whole_folder_loads_as_it_is(untied: Folder) -> None:
    model = load(untied)
    expected = LlamaForCausalLM.from_pretrained(untied.path).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_tied_embeddings_need_no_lm_head_and_may_repeat_the_embedding(folder: Folder) -> None:
    assert "lm_head.weight" not in load_file(folder.path / "model.safetensors")
    model = load(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    folder.weights(lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    model = load(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_an_lm_head_that_the_config_ties_away_is_refused(untied: Folder) -> None:
    untied.config(tie_word_embeddings=True)
    with pytest.raises(UnsupportedModelError, match=r"lm_head that differs.*set tie_word_embeddings to false"):
        load(untied)


@pytest.mark.parametrize("name", ["lm_head.weight", MLP, "model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_a_missing_tensor_is_named(untied: Folder, name: str) -> None:
    untied.weights(without(name))
    with pytest.raises(UnsupportedModelError, match=rf"1 weights of the model are not in its files \({name}\)"):
        load(untied)


def test_prefixes_of_another_tool_are_named_on_both_sides(untied: Folder) -> None:
    untied.weights(renamed(lambda name: f"module.{name}"))
    with pytest.raises(UnsupportedModelError, match=r"not in its files \(lm_head.*none of the model's \(module\."):
        load(untied)


def test_more_layers_in_the_config_than_in_the_file(untied: Folder) -> None:
    untied.config(num_hidden_layers=3)
    with pytest.raises(UnsupportedModelError, match=r"9 weights .* not in its files \(model\.layers\.2\.input"):
        load(untied)


def test_fewer_layers_in_the_config_than_in_the_file(untied: Folder) -> None:
    untied.config(num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"9 tensors of its files .* \(model\.layers\.1\.input"):
        load(untied)


def test_a_vocabulary_of_another_size(untied: Folder) -> None:
    untied.config(vocab_size=310)
    with pytest.raises(UnsupportedModelError, match=r"2 have another shape .*\(300, 64\) in the file and \(310, 64\)"):
        load(untied)


def test_weights_of_another_architecture(untied: Folder) -> None:
    untied.config(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"not in its files \(model\.layers\.0\.self_attn\.k_proj\.bias"):
        load(untied)


def test_biases_that_the_config_does_not_speak_of(untied: Folder) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    untied.weights(lambda tensors: tensors | bias)
    with pytest.raises(UnsupportedModelError, match=r"1 tensors of its files .*q_proj\.bias"):
        load(untied)
    untied.weights(without("model.layers.0.self_attn.q_proj.bias"))
    untied.config(attention_bias=True)
    with pytest.raises(UnsupportedModelError, match="8 weights of the model"):
        load(untied)


def test_rotary_frequencies_and_merged_heads_are_no_weights_of_the_decoder(untied: Folder) -> None:
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "medusa_head.0.0.linear.weight": torch.ones(2),
    }
    untied.weights(lambda tensors: tensors | more)
    load(untied)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_in_eight_bits_are_refused_before_they_are_read(untied: Folder, kind: torch.dtype) -> None:
    untied.weights(lambda tensors: tensors | {MLP: tensors[MLP].to(kind)})
    with pytest.raises(UnsupportedModelError, match=rf"{MLP} is stored as [IUF]8.*, expected one of BF16"):
        load(untied)


def test_a_truncated_file_is_named(untied: Folder) -> None:
    path = untied.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors: truncated or damaged"):
        load(untied)
    path.write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors: truncated or damaged"):
        load(untied)


def test_shards_load_and_each_fault_of_theirs_is_named(folder: Folder) -> None:
    folder.shard()
    load(folder)
    first, second = (folder.path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    index = folder.path / "model.safetensors.index.json"
    whole, listed = first.read_bytes(), index.read_text()
    first.write_bytes(whole[:-8])
    with pytest.raises(UnsupportedModelError, match=r"00001.*truncated"):
        load(folder)
    first.unlink()
    with pytest.raises(UnsupportedModelError, match=r"names model-00001-of-00002\.safetensors, which is not there"):
        load(folder)
    save_file(load_file(second), first)
    with pytest.raises(UnsupportedModelError, match="both hold 'model"):
        load(folder)
    save_file({"other.weight": torch.ones(2)}, first)
    with pytest.raises(
        UnsupportedModelError, match=r"index names model\.embed_tokens\.weight, which is not in the shard"
    ):
        load(folder)
    first.write_bytes(whole)
    for content, words in [
        (listed.replace("model-00001", "../model-00001"), "next to config.json"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ]:
        index.write_text(content)
        with pytest.raises(UnsupportedModelError, match=words):
            load(folder)
    index.write_text(listed)
    load(folder)


def test_a_folder_without_weights_is_told(folder: Folder) -> None:
    (folder.path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="no weights in it"):
        load(folder)
    folder.config(transformers_weights="mine.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"no mine\.safetensors, which its config\.json names"):
        load(folder)


def pickled(folder: Folder) -> Path:
    tensors = load_file(folder.path / "model.safetensors")
    (folder.path / "model.safetensors").unlink()
    torch.save(tensors, folder.path / "pytorch_model.bin")
    return folder.path / "pytorch_model.bin"


def test_pickled_tensors_load(untied: Folder) -> None:
    expected = load(untied).state_dict()
    pickled(untied)
    found = load(untied).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.marker, "ran"))


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_code_in_a_pickle_is_refused_and_never_run(untied: Folder, tmp_path: Path, write: Any) -> None:
    path = pickled(untied)
    write({"lm_head.weight": Attack(tmp_path / "marker")}, path)
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin: .*not a pickle of tensors alone"):
        load(untied)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {}}, "holds other things than tensors"),
        ([torch.ones(1)], "holds other things than tensors"),
        ({"lm_head.weight": torch.ones(300, 64).to(torch.int8)}, r"lm_head\.weight is stored as torch\.int8"),
        ({"lm_head.weight": torch.ones(300, 64)}, "weights of the model are not in its files"),
    ],
)
def test_pickles_are_checked_as_safetensors_are(untied: Folder, content: Any, words: str) -> None:
    torch.save(content, pickled(untied))
    with pytest.raises(UnsupportedModelError, match=words):
        load(untied)


def test_a_truncated_pickle_is_named(untied: Folder) -> None:
    path = pickled(untied)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin: truncated"):
        load(untied)


COMMANDS = {
    "build": ["--heads", "{heads}", "-o", "{output}"],
    "distill": ["--synthesize", "1", "--context", "256", "--max-new-tokens", "64", "-o", "{output}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_end_with_the_name_and_leave_nothing(
    untied: Folder, tiny_heads: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    untied.weights(without(MLP))
    output = tmp_path / "output"
    words = [word.format(heads=tiny_heads, output=output) for word in COMMANDS[name]]
    with pytest.raises(SystemExit) as stop:
        main([name, str(untied), *words])
    shown = capsys.readouterr().err
    assert stop.value.code == 1
    assert MLP in shown and "LOAD REPORT" not in shown and "Traceback" not in shown
    assert not output.exists()


def test_verify_refuses_such_a_model_too(folder: Folder, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.weights(without(MLP))
    with pytest.raises(SystemExit):
        main(["verify", str(tiny_bundle), "--model", str(folder), "--limit", "1", "--profile", "chain-1"])
    assert MLP in capsys.readouterr().err


def test_a_piped_yes_runs_no_code_of_the_folder(folder: Folder, tiny_heads: Path, tmp_path: Path) -> None:
    """Model, config, tokenizer and generation alike; the heads' folder has the same files."""
    marker = tmp_path / "marker"
    code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\nclass Own: pass\n"
    heads = tmp_path / "heads"
    heads.mkdir()
    for file in tiny_heads.iterdir():
        (heads / file.name).write_bytes(file.read_bytes())
    for place in (folder.path, heads):
        (place / "own.py").write_text(code)
        (place / "custom_generate").mkdir()
        (place / "custom_generate" / "generate.py").write_text(code + "def generate(**_): pass\n")
        path = place / "config.json"
        names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": names}))
    folder.config("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    arguments = ["build", str(folder), "--heads", str(heads), "-o", str(tmp_path / "out"), "--profile", "chain-1"]
    command = [sys.executable, "-m", "medusa_exporter", *arguments]
    done = subprocess.run(command, input="y\ny\ny\ny\n", capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, marker.exists()) == (1, "", False)
    assert "without running their code" in done.stderr and "Traceback" not in done.stderr
    folder.config("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    done = subprocess.run(command, input="y\ny\ny\ny\n", capture_output=True, text=True, check=False, timeout=300)
    assert not marker.exists()
    assert done.returncode == 0, done.stderr  # transformers' own code computes the family
    model_type = folder.path / "config.json"
    model_type.write_text(model_type.read_text().replace('"llama"', '"own"'))
    done = subprocess.run(command, input="y\ny\n", capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, marker.exists()) == (1, False)
    assert "'own' is not supported" in done.stderr
