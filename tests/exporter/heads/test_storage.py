import json
import struct
import subprocess
import sys

import pytest
import torch
from medusa_exporter.heads import storage
from medusa_exporter.heads.architecture import heads_files, read_architecture, stored_architecture
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.files import WEIGHTS_NAME
from medusa_exporter.heads.headers import find_heads
from medusa_exporter.heads.modules import MedusaHeads
from medusa_runtime.errors import MedusaError
from safetensors.torch import load_file, save_file

H, V = 8, 11
EXTRAS = {"base_model_name_or_path": "tiny", "vocab_size": V}


def make_heads(layers=2, conditioning="root", own=None, count=3, token_map=None):
    torch.manual_seed(0)
    heads = MedusaHeads(H, count, layers, conditioning, own, token_map)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn_like(parameter).half())
    return heads


@pytest.fixture
def folder(tmp_path):
    storage.save_heads(make_heads(), tmp_path / "heads", EXTRAS)
    return tmp_path / "heads"


def change_weights(folder, change):
    path = folder / WEIGHTS_NAME
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("conditioning", ["none", "root"])
@pytest.mark.parametrize("own", [None, V])
@pytest.mark.parametrize("layers", [1, 3])
def test_round_trip(tmp_path, layers, own, conditioning):
    heads = make_heads(layers, conditioning, own)
    storage.save_heads(heads, tmp_path, EXTRAS)
    back = storage.load_heads(tmp_path, H, V)
    assert (back.heads, back.layers, back.conditioning, back.own_lm_head_size) == (3, layers, conditioning, own)
    for name, value in heads.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value)
    found = read_architecture(str(tmp_path))
    assert (found.heads, found.layers, found.conditioning) == (3, layers, conditioning)
    assert [file.name for file in heads_files(tmp_path)] == ["config.json", "medusa_lm_head.safetensors"]


TOKENS = torch.tensor([3, 10, 0, 7])


@pytest.mark.parametrize("own", [None, len(TOKENS)])
def test_a_draft_vocabulary_comes_back(tmp_path, own):
    heads = make_heads(own=own, token_map=TOKENS)
    storage.save_heads(heads, tmp_path, EXTRAS)
    assert json.loads((tmp_path / "config.json").read_text())["draft_vocabulary"] == len(TOKENS)
    assert load_file(tmp_path / WEIGHTS_NAME)["token_map"].dtype == torch.int64
    back = storage.load_heads(tmp_path, H, V)
    assert back.own_lm_head_size == own
    assert back.state_dict().keys() == heads.state_dict().keys()
    for name, value in heads.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value)
    found = stored_architecture(find_heads(tmp_path))
    assert (found.draft_vocabulary, found.own_lm_head_size) == (len(TOKENS), own)


def test_of_full_lm_heads_a_draft_vocabulary_takes_its_rows(tmp_path):
    heads = make_heads(own=V)
    storage.save_heads(heads, tmp_path, EXTRAS)
    change_weights(tmp_path, lambda t: t.update({"token_map": TOKENS}))
    back = storage.load_heads(tmp_path, H, V)
    assert back.own_lm_head_size == len(TOKENS)
    torch.testing.assert_close(back.own_lm_head, heads.own_lm_head[:, :, TOKENS], check_stride=False)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([0, 3, 0]), "repeats 1 of its ids"),
        (torch.tensor([1, V]), f"ids from 1 to {V}, but the model's tokens are numbered from 0 to {V - 1}"),
        (torch.tensor([-1, 2]), "ids from -1 to 2"),
        (torch.tensor([1, 2], dtype=torch.int32), "token_map is stored as I32; expected I64"),
        (torch.tensor([[1, 2]]), r"token_map has shape \(1, 2\), expected one size"),
        (torch.zeros(0, dtype=torch.int64), r"token_map has shape \(0,\)"),
    ],
)
def test_a_token_map_that_is_none_is_refused(folder, tokens, message):
    change_weights(folder, lambda t: t.update({"token_map": tokens}))
    with pytest.raises(HeadsError, match=message):
        storage.load_heads(folder, H, V)


def test_own_lm_heads_must_cover_the_draft_vocabulary(tmp_path):
    storage.save_heads(make_heads(own=3), tmp_path, EXTRAS)
    change_weights(tmp_path, lambda t: t.update({"token_map": TOKENS}))
    with pytest.raises(HeadsError, match="lm_heads of 3 rows under a token_map of 4"):
        storage.load_heads(tmp_path, H, V)


def test_a_config_with_another_draft_vocabulary_is_warned_of(folder):
    (folder / "config.json").write_text('{"draft_vocabulary": 5}')
    with pytest.warns(UserWarning, match="draft_vocabulary is 5, but by weights and model it is 11"):
        storage.load_heads(folder, H, V)


def test_the_names_and_the_config_are_the_published_ones(folder):
    tensors = load_file(folder / WEIGHTS_NAME)
    assert tensors["0.0.linear.weight"].shape == (H, 2 * H)
    assert tensors["2.1.linear.bias"].dtype == torch.float16
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "version": "2",
        "medusa_num_heads": 3,
        "medusa_num_layers": 2,
        "medusa_conditioning": "root",
        "hidden_size": H,
        **EXTRAS,
    }


def test_weights_win_over_a_config_that_disagrees(folder):
    (folder / "config.json").write_text('{"medusa_num_heads": 5}')
    with pytest.warns(UserWarning, match="medusa_num_heads is 5, but by weights and model it is 3"):
        assert storage.load_heads(folder, H, V).heads == 3
    (folder / "config.json").unlink()
    assert storage.load_heads(folder, H, V).heads == 3


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(HeadsError, match=r"config\.json"):
        storage.load_heads(folder, H, V)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"0.weird": torch.zeros(2)}), "unknown weight '0.weird'"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("1.")], "without a gap"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("1.1.")], "one depth"),
        (lambda t: t.pop("1.0.linear.weight"), "missing"),
        (lambda t: t.pop("1.0.linear.bias"), "missing"),
        (lambda t: t.update({"0.0.linear.weight": torch.zeros(H)}), "two sizes"),
        (lambda t: t.update({"1.0.linear.weight": torch.zeros(H, H)}), "1.0.linear.weight"),
        (lambda t: t.update({"0.2.weight": torch.zeros(V, H)}), "1.2.weight"),
        (lambda t: t.update({f"{k}.2.weight": torch.zeros(V + 1, H) for k in range(3)}), f"vocabulary has\\s+{V}"),
        (lambda t: t.clear(), "no head"),
        (lambda t: t.update({"0.0.linear.bias": torch.full((H,), torch.nan)}), "NaN"),
        (lambda t: t.update({"0.0.linear.bias": torch.full((H,), -torch.inf)}), "NaN or infinite"),
        (lambda t: t.update({"0.0.linear.bias": torch.zeros(H, dtype=torch.int8)}), "stored as I8"),
    ],
)
def test_weights_of_another_layout_are_refused(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(HeadsError, match=message):
        storage.load_heads(folder, H, V)


def test_heads_of_another_size_are_refused_by_both_numbers(folder):
    with pytest.raises(HeadsError, match=r"hidden size 8, but the model's is 16"):
        storage.load_heads(folder, 16, V)


def test_a_pickle_alone_is_not_loaded(folder):
    (folder / WEIGHTS_NAME).rename(folder / "medusa_lm_head.pt")
    for source in (folder, folder / "medusa_lm_head.pt"):
        with pytest.raises(MedusaError, match="pickles can run code and are not loaded"):
            storage.load_heads(source, H, V)


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "a/b/c"])
def test_a_source_that_is_nothing_is_refused(source):
    with pytest.raises(HeadsError, match="no such folder"):
        storage.load_heads(source, H, V)
    assert heads_files(source) == []


def test_an_empty_folder_and_a_lone_file_are_refused(tmp_path):
    with pytest.raises(HeadsError, match="without"):
        read_architecture(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(HeadsError, match="expected the folder"):
        read_architecture(tmp_path / "a.txt")


def test_a_hub_name_is_fetched(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, file, revision=None):
        asked.append((name, file))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert storage.load_heads("owner/name", H, V).heads == 3
    assert asked == [("owner/name", "medusa_lm_head.safetensors"), ("owner/name", "config.json")]
    assert heads_files("owner/name") == []

    def fail(name, file, revision=None):
        raise OSError("404 Not Found")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(HeadsError, match=r"404.*pickles are not loaded"):
        storage.load_heads("owner/name", H, V)


def header(entries, length=None):
    raw = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(raw) if length is None else length) + raw


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x01\x02",
        header({}, length=2**63),
        header({}, length=100),
        header(b"{not json"),
        header(b"[1]"),
        header(b"\xff\xff"),
        header(b"[" * 100_000),
        header({"0.0.linear.weight": 3}),
        header({"0.0.linear.weight": {"dtype": "F16"}}),
        header({"0.0.linear.weight": {"dtype": "F16", "shape": ["x"]}}),
        header({"0.0.linear.weight": {"dtype": [], "shape": [1, 1]}}),
        header({f"0.0.linear.{n}": {"dtype": "F16", "shape": s} for n, s in (("weight", [2, 2]), ("bias", [2]))}),
    ],
)
def test_damaged_files_are_refused(tmp_path, raw):
    (tmp_path / WEIGHTS_NAME).write_bytes(raw)
    with pytest.raises(HeadsError):
        storage.load_heads(tmp_path, 2, V)


def test_weights_that_half_precision_cannot_hold_are_not_saved(tmp_path):
    heads = MedusaHeads(H, 1, 1)
    with torch.no_grad():
        heads.biases[0].fill_(1e6)
    with pytest.raises(HeadsError, match="infinite"):
        storage.save_heads(heads, tmp_path, EXTRAS)
    storage.save_heads(heads, tmp_path, EXTRAS, dtype=torch.float32)
    assert storage.load_heads(tmp_path, H, V).biases[0][0, 0, 0] == 1e6


def test_facts_need_no_torch(folder):
    code = (
        "import sys; from medusa_exporter.heads.architecture import read_architecture, heads_files; "
        f"folder = {str(folder)!r}; print(read_architecture(folder).heads, len(heads_files(folder))); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "3 2"


def test_others_may_read_what_is_written(tmp_path):
    storage.save_heads(MedusaHeads(8, 1, 1), tmp_path, {})
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["medusa_lm_head.safetensors"] == modes["config.json"]
