"""Every published layout, each on a hand-made file, and what is refused by name."""

import json

import pytest
import safetensors
import torch
from medusa_exporter.heads.architecture import heads_files, read_architecture
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.layouts import LAYOUTS, canonical_names, detect_layout
from medusa_exporter.heads.storage import load_heads

from . import published
from .published import TOKENS, H, K, V, check, linears, lm_heads, write, write_shards

AUTHORS, V1, MODELOPT, TENSORRT_LLM, VLLM = LAYOUTS


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("lm", [True, False])
def test_version_2_and_tgi(tmp_path, layers, lm):
    """TGI's first loader reads each head's lm_head, its second stacks the linears over the decoder's lm_head."""
    write(tmp_path, published.authors(layers, lm=lm), "medusa_lm_head.safetensors", {"medusa_num_layers": layers})
    check(load_heads(tmp_path, H, V), linears(layers), lm_heads() if lm else None)


@pytest.mark.parametrize(("prefix", "layout"), [("medusa_head.", V1), ("medusa_heads.", MODELOPT)])
@pytest.mark.parametrize("layers", [1, 2])
def test_heads_merged_with_the_decoder(tmp_path, prefix, layout, layers):
    heads = published.authors(layers, prefix)
    assert detect_layout(heads, "here") is layout
    write(tmp_path, published.decoder() | heads, config={"hidden_size": H, "vocab_size": V, "num_hidden_layers": 32})
    check(load_heads(tmp_path, H, V), linears(layers), lm_heads())
    found = read_architecture(tmp_path)
    assert (found.heads, found.layers, found.conditioning) == (K, layers, "none")


def test_of_merged_shards_only_the_heads_are_read(tmp_path, monkeypatch):
    heads = published.authors(prefix="medusa_head.")
    names = sorted(heads)
    base = published.decoder()
    shards = {
        "model-00001-of-00003.safetensors": {name: base.pop(name) for name in sorted(base)[:2]},
        "model-00002-of-00003.safetensors": base | {name: heads[name] for name in names[:4]},
        "model-00003-of-00003.safetensors": {name: heads[name] for name in names[4:]},
    }
    write_shards(tmp_path, shards, {"medusa_num_heads": K})
    (tmp_path / "model-00001-of-00003.safetensors").unlink()  # holds nothing of the heads
    read = []
    opened = safetensors.safe_open

    class Spy:
        def __init__(self, *arguments, **options):
            self.file = opened(*arguments, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return self.file.get_slice(name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Spy)
    check(load_heads(tmp_path, H, V), linears(1), lm_heads())
    assert sorted(read) == names
    assert [file.name for file in heads_files(tmp_path)] == [
        "config.json",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]


@pytest.mark.parametrize("layers", [1, 2])
def test_tensorrt_llm(tmp_path, layers):
    config = {"num_medusa_heads": K, "num_medusa_layers": layers, "hidden_size": H, "vocab_size": V}
    write(tmp_path, published.decoder() | published.tensorrt_llm(layers), "rank0.safetensors", config)
    check(load_heads(tmp_path, H, V), linears(layers), lm_heads())


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize("bias", [True, False])
def test_vllm(tmp_path, bias, prefix):
    config = {"num_heads": K, "num_hidden_layers": 2, "hidden_size": H, "vocab_size": V, "truncated_vocab_size": V}
    write(tmp_path, published.vllm(2, bias, prefix=prefix), config=config | {"medusa_fc_bias": bias})
    check(load_heads(tmp_path, H, V), linears(2, bias), lm_heads())


@pytest.mark.parametrize("rows", [V, len(TOKENS)])
def test_vllm_with_a_token_map(tmp_path, rows):
    """Rows for all tokens are cut to the token_map's, as vLLM does when it loads them."""
    config = {"num_heads": K, "vocab_size": V, "truncated_vocab_size": len(TOKENS)}
    write(tmp_path, published.vllm(rows=rows) | {"token_map": TOKENS}, config=config)
    expected = [lm[TOKENS] if rows == V else lm for lm in lm_heads(rows)]
    check(load_heads(tmp_path, H, V), linears(1, bias=False), expected, TOKENS)


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_vllm_with_the_original_lm_head(tmp_path, name):
    tensors = {stored: tensor for stored, tensor in published.vllm().items() if not stored.startswith("lm_heads")}
    write(tmp_path / "one", tensors | {name: lm_heads()[0]}, config={"original_lm_head": True})
    check(load_heads(tmp_path / "one", H, V), linears(1, bias=False), [lm_heads()[0]] * K)
    write(tmp_path / "none", tensors | {"token_map": TOKENS}, config={"original_lm_head": True})
    check(load_heads(tmp_path / "none", H, V), linears(1, bias=False), None, TOKENS)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (published.authors(), {"medusa_num_heads": 2}, "medusa_num_heads is 2, but by weights and model it is 3"),
        (
            published.authors(prefix="medusa_heads."),
            {"medusa": {"num_medusa_heads": 5}},
            "medusa.num_medusa_heads is 5",
        ),
        (published.tensorrt_llm(), {"num_medusa_layers": 2}, "num_medusa_layers is 2"),
        (published.vllm(), {"num_hidden_layers": 4}, "num_hidden_layers is 4, but by weights and model it is 1"),
        (published.vllm(), {"truncated_vocab_size": 5}, "truncated_vocab_size is 5, but by weights and model it is 11"),
    ],
)
def test_the_weights_win_over_each_layouts_config(tmp_path, tensors, config, message):
    write(tmp_path, tensors, config=config)
    with pytest.warns(UserWarning, match=message):
        assert load_heads(tmp_path, H, V).heads == K


def test_keys_that_are_null_or_the_decoders_are_not_compared(tmp_path):
    config = {"num_hidden_layers": 32, "medusa": None, "vocab_size": None}
    write(tmp_path, published.authors(prefix="medusa_heads."), config=config)
    assert load_heads(tmp_path, H, V).layers == 1


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"speculator.emb.0.weight": torch.zeros(V, H)}, "MLP speculator.*cannot be expressed"),
        ({"midlayer.mlp.up_proj.weight": torch.zeros(H, H), "fc.weight": torch.zeros(H, 2 * H)}, "EAGLE"),
        (published.decoder(), "contains no heads: got 'lm_head.weight'.*'medusa_head.0.0.linear.weight'"),
        (published.authors() | published.vllm(), "Medusa authors' layout.* and vLLM's layout at once"),
        (published.vllm() | {"lm_head.weight": torch.zeros(V, H)}, "expected one of a kind"),
        (published.vllm() | {"token_map": TOKENS, "medusa_heads.token_map": TOKENS}, "expected one of a kind"),
        (published.vllm() | {"medusa_heads.blocks.0.layers.0.weight": torch.zeros(H, H)}, "name the same weight"),
        (published.vllm() | {"fc.weight": torch.zeros(H, 2 * H)}, "unknown weight 'fc.weight'.*vLLM's layout"),
        (
            published.authors(prefix="medusa_heads.") | {"medusa_heads.0.0.linear.weight_scale": torch.ones(1)},
            "unknown weight 'medusa_heads.0.0.linear.weight_scale'.*unquantised",
        ),
        (
            published.tensorrt_llm() | {"medusa_heads.1.lm_head.weight": torch.zeros(V, H, dtype=torch.int8)},
            "medusa_heads.1.lm_head.weight is stored as I8.*not quantised",
        ),
        (
            published.vllm(bias=True) | {"blocks.1.layers.0.bias": torch.zeros(H + 1)},
            r"blocks.1.layers.0.bias has shape \(9,\), expected \(8,\)",
        ),
        (
            {name: t for name, t in published.vllm(bias=True).items() if name != "blocks.1.layers.0.bias"},
            "1.0.linear.bias has shape missing",
        ),
        (
            {name: t for name, t in published.vllm().items() if name != "lm_heads.0.weight"},
            "0.1.weight has shape missing",
        ),
        (published.authors() | {"00.0.linear.weight": torch.zeros(H, H)}, "unknown weight '00.0.linear.weight'"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, tensors, message):
    write(tmp_path, tensors)
    with pytest.raises(HeadsError, match=message):
        load_heads(tmp_path, H, V)


def test_the_mapping_is_pure_and_total():
    """Every layout's names, mapped, are the authors' names, and each stored weight of the heads is used."""
    made = [
        (AUTHORS, published.authors(2)),
        (V1, published.authors(2, "medusa_head.")),
        (MODELOPT, published.authors(2, "medusa_heads.")),
        (TENSORRT_LLM, published.tensorrt_llm(2)),
        (VLLM, published.vllm(2, bias=True)),
    ]
    assert [layout for layout, _ in made] == list(LAYOUTS)
    for layout, tensors in made:
        names = [*tensors, *(published.decoder() if layout.prefix else ())]
        assert detect_layout(names, "here") is layout
        mapped = canonical_names(names, layout, "here")
        assert mapped.keys() == published.authors(2).keys()
        assert sorted(mapped.values()) == sorted(tensors)


def test_a_large_index_of_heads_is_counted_quickly(tmp_path):
    """A header may claim thousands of heads; they are counted, not believed."""
    names = [f"{head}.{layer}.linear.weight" for head in range(300) for layer in range(300)]
    entries = {
        name: {"dtype": "F16", "shape": [1, 1], "data_offsets": [2 * place, 2 * place + 2]}
        for place, name in enumerate(names)
    }
    raw = json.dumps(entries).encode()
    data = len(raw).to_bytes(8, "little") + raw + bytes(2 * len(names))
    (tmp_path / "medusa_lm_head.safetensors").write_bytes(data)
    with pytest.raises(HeadsError, match="bias has shape missing"):
        read_architecture(tmp_path)
