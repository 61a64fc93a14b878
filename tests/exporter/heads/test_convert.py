"""`heads convert`: any layout in, ours out, each weight as it was stored; pickles as tensors and nothing else."""

import json
import os
import pickle
from collections import OrderedDict

import pytest
import torch
from click.testing import CliRunner
from medusa_exporter.cli import main
from medusa_exporter.cli.heads import command
from medusa_exporter.heads.convert import convert
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.heads.pickles import read_pickle
from medusa_exporter.heads.storage import load_heads, save_heads
from safetensors.torch import load_file

from . import published
from .published import TOKENS, H, K, V, check, linears, lm_heads, write


def written(folder):
    return load_file(folder / "medusa_lm_head.safetensors"), json.loads((folder / "config.json").read_text())


@pytest.fixture
def v01(tmp_path):
    """The authors' first layout: a pickle, and a config.json that says 2 heads where there are 3."""
    folder = tmp_path / "v01"
    folder.mkdir()
    torch.save(OrderedDict(published.authors(2)), folder / "medusa_lm_head.pt")
    config = {"medusa_num_heads": 2, "medusa_num_layers": 2, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base-model", published.decoder(), config={"hidden_size": H, "vocab_size": V})


@pytest.mark.parametrize("part", ["", "medusa_lm_head.pt"])
def test_v01_pickles(v01, tmp_path, part):
    with pytest.warns(UserWarning, match=r"v01/config.json: medusa_num_heads is 2, but by weights and model it is 3"):
        convert(v01 / part, tmp_path / "out")
    check(load_heads(tmp_path / "out", H, V), linears(2), lm_heads())
    tensors, config = written(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert config == {
        "version": "2",
        "medusa_num_heads": K,
        "medusa_num_layers": 2,
        "medusa_conditioning": "none",
        "hidden_size": H,
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
        "vocab_size": V,
    }


def test_resblocks_that_share_one_weight(tmp_path):
    """The authors' code repeats one ResBlock, so that a pickle of several layers holds one tensor under many names."""
    state = published.authors(1)
    for head in range(K):
        state[f"{head}.2.weight"] = state.pop(f"{head}.1.weight")
        for kind in ("weight", "bias"):
            state[f"{head}.1.linear.{kind}"] = state[f"{head}.0.linear.{kind}"]
    torch.save(state, tmp_path / "heads.pt")
    convert(tmp_path / "heads.pt", tmp_path / "out")
    heads = load_heads(tmp_path / "out", H, V)
    assert heads.layers == 2
    torch.testing.assert_close(heads.weights[0], heads.weights[1])
    check(heads, {(head, layer): linears(1)[head, 0] for head in range(K) for layer in range(2)}, lm_heads())


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (published.authors(), (linears(1), lm_heads(), None)),
        (published.decoder() | published.authors(prefix="medusa_head."), (linears(1), lm_heads(), None)),
        (published.decoder() | published.authors(prefix="medusa_heads."), (linears(1), lm_heads(), None)),
        (published.decoder() | published.tensorrt_llm(), (linears(1), lm_heads(), None)),
        (published.vllm(), (linears(1, bias=False), lm_heads(), None)),
        (
            published.vllm() | {"token_map": TOKENS},
            (linears(1, bias=False), [lm[TOKENS] for lm in lm_heads()], TOKENS),
        ),
    ],
)
def test_every_layout_becomes_ours(tmp_path, tensors, expected):
    write(tmp_path / "in", tensors)
    found = convert(tmp_path / "in", tmp_path / "out")
    check(load_heads(tmp_path / "out", H, V), *expected)
    assert found.facts.own_lm_head_size == len(expected[1][0])
    assert convert(tmp_path / "out", tmp_path / "again").facts == found.facts
    assert written(tmp_path / "again")[1] == written(tmp_path / "out")[1]


def test_weights_stay_as_they_were_stored(tmp_path):
    tensors = {name: tensor.bfloat16() * 1e30 for name, tensor in published.vllm().items()}
    convert(write(tmp_path / "in", tensors), tmp_path / "out")
    ours, _ = written(tmp_path / "out")
    assert ours["0.0.linear.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(ours["2.1.weight"], tensors["lm_heads.2.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("token_map", [None, TOKENS])
def test_lm_heads_that_are_the_models_own_are_left_out(tmp_path, base, token_map):
    tensors = {name: tensor for name, tensor in published.vllm().items() if not name.startswith("lm_heads")}
    tensors |= {"lm_head.weight": published.decoder()["lm_head.weight"]}
    tensors |= {} if token_map is None else {"token_map": token_map}
    write(tmp_path / "in", tensors)
    assert not convert(tmp_path / "in", tmp_path / "kept").shared
    found = convert(tmp_path / "in", tmp_path / "out", base=base)
    assert (found.shared, found.facts.own_lm_head_size) == (True, None)
    check(load_heads(tmp_path / "out", H, V), linears(1, bias=False), None, token_map)
    assert written(tmp_path / "out")[1]["base_model_name_or_path"] == "base-model"


def test_lm_heads_of_their_own_are_kept_beside_a_base(tmp_path, base):
    assert not convert(write(tmp_path / "in", published.authors()), tmp_path / "out", base=base).shared
    check(load_heads(tmp_path / "out", H, V), linears(1), lm_heads())
    (base / "model.safetensors").unlink()
    assert not convert(tmp_path / "in", tmp_path / "other", base=base).shared


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 16, "vocab_size": V}, "hidden size 8, but the model's is 16"),
        ({"hidden_size": H, "vocab_size": 32000}, "lm_head of 11 tokens, but the model's vocabulary has 32000"),
        ({"hidden_size": H}, "no hidden_size and vocab_size in its config.json"),
        ({"hidden_size": "8", "vocab_size": V}, "no hidden_size and vocab_size"),
    ],
)
def test_heads_of_another_model_are_refused(v01, base, tmp_path, config, message):
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadsError, match=message):
        convert(v01, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(tmp_path):
    source, target = write(tmp_path / "in", published.authors()), tmp_path / "out"
    convert(source, target)
    with pytest.raises(HeadsError, match=r"medusa_lm_head\.safetensors and config.json already; .*--force"):
        convert(source, target)
    write(source, published.authors(2))
    convert(source, target, force=True)
    assert load_heads(target, H, V).layers == 2
    with pytest.raises(HeadsError, match="the heads to convert are in this folder"):
        convert(source, source, force=True)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-was-here",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Hostile(), "not a pickle of tensors alone"),
        ({"0.0.linear.weight": Hostile()}, "not a pickle of tensors alone"),
        ([torch.zeros(1)], "holds list, expected a state dict"),
        ({"state_dict": {"0.0.linear.weight": torch.zeros(H, H)}}, "holds dict under 'state_dict'"),
        ({3: torch.zeros(1)}, "holds Tensor under 3"),
        ({"0.0.linear.weight": torch.zeros(1).expand(2**20, 2**20)}, "not a plain tensor"),
        ({"0.0.linear.weight": torch.zeros(H, H).to_sparse()}, "not a plain tensor"),
        ({"0.0.linear.weight": torch.zeros(H, H, device="meta")}, "not a plain tensor"),
        ({"anything": torch.zeros(1)}, "contains no heads: got 'anything'"),
        (published.authors() | {"0.0.linear.bias": torch.zeros(H).double()}, "stored as torch.float64"),
        (published.authors() | {"token_map": torch.zeros(2)}, "token_map is stored as torch.float32"),
        (published.authors() | {"0.0.linear.bias": torch.full((H,), torch.nan)}, "NaN"),
        (published.authors() | {"token_map": torch.tensor([0, V])}, "ids from 0 to 11"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")  # torch announces checks of its own
def test_pickles_of_anything_else_are_refused_and_never_run(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "heads.pt")
    with pytest.raises(HeadsError, match=message):
        convert(tmp_path / "heads.pt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.pt"]


@pytest.mark.parametrize(
    "raw", [b"", b"\x80", b"PK\x03\x04", b"not a pickle", pickle.dumps(Hostile()), b"\x80\x02" * 50]
)
def test_damaged_pickles_are_refused(tmp_path, monkeypatch, raw):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads.pt").write_bytes(raw)
    with pytest.raises(HeadsError, match="or damaged"):
        read_pickle(tmp_path / "heads.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.pt"]


def test_the_command_says_what_it_found(tmp_path, base):
    write(tmp_path / "in", published.vllm(2) | {"token_map": TOKENS})
    arguments = [str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(command, ["convert", *arguments], catch_exceptions=False)
    assert result.output == (
        "found 3 heads of 2 layers, hidden size 8, conditioning none, draft vocabulary of 5 tokens, "
        f"own lm_heads of 5 tokens, in vLLM's layout\nwrote {tmp_path / 'out'}\n"
    )
    tensors = published.authors(lm=False) | {f"{k}.1.weight": published.decoder()["lm_head.weight"] for k in range(K)}
    write(tmp_path / "in", tensors)
    result = CliRunner().invoke(
        command, ["convert", *arguments, "--force", "--base", str(base)], catch_exceptions=False
    )
    assert "whole vocabulary, the model's lm_head (own ones equalled it and were left out)" in result.output


def test_a_config_that_disagrees_is_told_in_one_line(v01, tmp_path):
    result = CliRunner().invoke(command, ["convert", str(v01), "-o", str(tmp_path / "out")], catch_exceptions=False)
    said = "medusa_num_heads is 2, but by weights and model it is 3, which is used"
    assert result.stderr == f"warning: {v01 / 'config.json'}: {said}\n"


def test_a_trunk_and_taps_are_told_and_kept(tmp_path):
    heads = MedusaHeads(H, 1, 1, "root", taps=(5,), trunk=6)
    save_heads(heads, tmp_path / "in", {"vocab_size": V}, dtype=torch.float32)
    result = CliRunner().invoke(
        command, ["convert", str(tmp_path / "in"), "-o", str(tmp_path / "out")], catch_exceptions=False
    )
    assert (
        "conditioning root, 1 tapped layer, trunk of width 6, whole vocabulary, the model's lm_head, in"
        in result.output
    )
    back = load_heads(tmp_path / "out", H, V)
    assert back.taps == (5,)
    torch.testing.assert_close(back.gate, heads.gate, check_stride=False, rtol=0, atol=0)


def test_errors_are_told_in_one_line(tmp_path, capsys):
    for arguments in (["nowhere", "-o", "x"], [str(tmp_path), "-o", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as stop:
            main(["heads", "convert", *arguments])
        assert stop.value.code == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1


def test_a_base_that_the_heads_do_not_name_is_warned_of(v01, base, tmp_path):
    with pytest.warns(UserWarning) as caught:
        convert(v01, tmp_path / "out", base=base)
    said = [str(warning.message) for warning in caught]
    assert any("base_model_name_or_path is 'lmsys/vicuna-7b-v1.3', but the model is" in text for text in said)


def test_heads_that_tap_what_the_base_lacks_are_refused(tmp_path):
    save_heads(MedusaHeads(H, 2, 1, taps=(4,)), tmp_path / "in", {"vocab_size": V})
    config = {"hidden_size": H, "vocab_size": V, "num_hidden_layers": 4}
    folder = write(tmp_path / "base-model", published.decoder(), config=config)
    with pytest.raises(HeadsError, match="no decoder layer 4 to tap, the model's are 0 to 3"):
        convert(tmp_path / "in", tmp_path / "out", base=folder)


def test_lm_heads_that_equal_the_models_but_for_padding_are_left_out(tmp_path):
    rows = [torch.cat((published.decoder()["lm_head.weight"], torch.zeros(64 - V, H).half()))] * K
    weights = published.named("{head}.{layer}", linears(1)) | {f"{k}.1.weight": row for k, row in enumerate(rows)}
    base = write(tmp_path / "base-model", published.decoder(), config={"hidden_size": H, "vocab_size": V})
    assert convert(write(tmp_path / "in", weights), tmp_path / "out", base=base).shared
    assert load_heads(tmp_path / "out", H, V).own_lm_head is None
