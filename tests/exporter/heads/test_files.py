"""Which files of a folder or hub name hold heads, and that an index is checked before it is believed."""

import json

import huggingface_hub
import pytest
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.files import INDEX_NAME, pickle_file, read_json, weights_files
from medusa_exporter.heads.headers import find_heads
from medusa_exporter.heads.storage import load_heads

from . import published
from .published import H, V, check, linears, lm_heads, write, write_shards


@pytest.fixture
def merged(tmp_path):
    heads = published.authors(prefix="medusa_head.")
    return write_shards(tmp_path / "merged", {"a.safetensors": published.decoder(), "b.safetensors": heads})


def names(files):
    return [file.name for file in files]


def test_heads_by_themselves_come_before_merged_ones(merged):
    assert names(weights_files(merged)) == ["b.safetensors"]
    write(merged, published.authors(), "medusa_lm_head.safetensors")
    assert names(weights_files(merged)) == ["medusa_lm_head.safetensors"]


def test_without_an_index_all_safetensors_are_looked_at(merged):
    (merged / INDEX_NAME).unlink()
    assert names(weights_files(merged)) == ["a.safetensors", "b.safetensors"]
    assert names(find_heads(merged).files) == ["b.safetensors"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "holds list, expected a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"medusa_head.0.0.linear.weight": 3}}', "no weight_map from weights to files"),
        ('{"weight_map": {"medusa_head.0.0.linear.weight": "../b.safetensors"}}', "'../b.safetensors' as a shard"),
        ('{"weight_map": {"medusa_head.0.0.linear.weight": "b.bin"}}', "'b.bin' as a shard"),
        ('{"weight_map": {"medusa_head.0.0.linear.weight": "c.safetensors"}}', "c.safetensors, which is missing"),
        ('{"weight_map": {"medusa_head.0.0.linear.weight": "a.safetensors"}}', "contains no heads"),
        ('{"weight_map": {"lm_head.weight": "a.safetensors"}}', "contains no heads: got 'lm_head.weight'"),
    ],
)
def test_an_index_that_is_wrong_is_refused(merged, index, message):
    (merged / INDEX_NAME).write_text(index)
    with pytest.raises(HeadsError, match=message):
        find_heads(merged)


def test_a_huge_config_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**25)
    with pytest.raises(HeadsError, match="33554432 bytes, expected at most"):
        read_json(path)


def test_heads_split_over_ranks_are_refused(tmp_path):
    for rank in (0, 1):
        write(tmp_path, published.tensorrt_llm(), f"rank{rank}.safetensors")
    with pytest.raises(HeadsError, match=r"both rank0.safetensors and rank1.safetensors hold .*joined first"):
        find_heads(tmp_path)


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "pytorch_model.bin"])
def test_pickles_are_refused_with_the_command_that_reads_them(tmp_path, name):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / name).touch()
    source = tmp_path / "a b" if name == "medusa_lm_head.pt" else tmp_path / "a b" / name
    for asked in (tmp_path / "a b", tmp_path / "a b" / name):
        with pytest.raises(HeadsError, match="pickles can run code") as caught:
            weights_files(asked)
        shown = source if asked.is_dir() else asked
        assert f"medusa-export heads convert '{shown}' -o HEADS" in str(caught.value)
        assert pickle_file(shown) == tmp_path / "a b" / name


def test_safetensors_are_preferred_to_a_pickle(tmp_path):
    (tmp_path / "medusa_lm_head.pt").touch()
    write(tmp_path, published.authors(), "medusa_lm_head.safetensors")
    assert pickle_file(tmp_path) is None
    assert pickle_file(tmp_path / "medusa_lm_head.safetensors") is None
    check(load_heads(tmp_path, H, V), linears(1), lm_heads())


def serve(monkeypatch, folder):
    """Let the hub's only repository, owner/name, be `folder`; return the files that are asked for."""
    asked = []

    def fetch(name, file, revision=None):
        asked.append(file)
        if name != "owner/name" or not (folder / file).is_file():
            raise OSError(f"404: no {file}")
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return asked


def test_merged_heads_are_fetched_shard_by_shard(merged, monkeypatch):
    asked = serve(monkeypatch, merged)
    check(load_heads("owner/name", H, V), linears(1), lm_heads())
    assert asked == ["medusa_lm_head.safetensors", INDEX_NAME, "b.safetensors", "config.json"]


def test_a_single_merged_file_is_fetched(tmp_path, monkeypatch):
    serve(monkeypatch, write(tmp_path, published.decoder() | published.authors(prefix="medusa_heads.")))
    check(load_heads("owner/name", H, V), linears(1), lm_heads())


def test_a_pickle_on_the_hub_is_named(tmp_path, monkeypatch):
    (tmp_path / "medusa_lm_head.pt").touch()
    serve(monkeypatch, tmp_path)
    assert pickle_file("owner/name") == tmp_path / "medusa_lm_head.pt"
    assert pickle_file("owner/other") is None
    with pytest.raises(HeadsError, match="medusa-export heads convert owner/name -o HEADS"):
        load_heads("owner/name", H, V)
    write(tmp_path, published.authors(), "medusa_lm_head.safetensors")
    assert pickle_file("owner/name") is None


def test_an_index_on_the_hub_that_is_wrong_is_told(merged, monkeypatch):
    (merged / INDEX_NAME).write_text(json.dumps({"weight_map": {"medusa_head.0.0.linear.weight": "x/b.safetensors"}}))
    serve(monkeypatch, merged)
    with pytest.raises(HeadsError, match="as a shard"):
        load_heads("owner/name", H, V)
