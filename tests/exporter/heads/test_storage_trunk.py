"""Heads with a trunk and tapped layers on disk."""

import json

import pytest
import torch
from medusa_exporter.heads import storage
from medusa_exporter.heads.architecture import expected_shapes, stored_architecture
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.files import WEIGHTS_NAME
from medusa_exporter.heads.headers import find_heads
from medusa_exporter.heads.modules import MedusaHeads
from safetensors.torch import load_file, save_file

H, V = 8, 11
EXTRAS = {"base_model_name_or_path": "tiny", "vocab_size": V}


@pytest.mark.parametrize("conditioning", ["none", "root"])
@pytest.mark.parametrize("taps", [(), (5, 2)])
@pytest.mark.parametrize("trunk", [0, 6])
def test_trunk_and_taps_come_back(tmp_path, conditioning, taps, trunk):
    torch.manual_seed(0)
    heads = MedusaHeads(H, 2, 2, conditioning, taps=taps, trunk=trunk)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn_like(parameter).half())
    storage.save_heads(heads, tmp_path, EXTRAS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config.get("medusa_taps", []), config.get("medusa_trunk", 0)) == ([*taps], trunk)
    back = storage.load_heads(tmp_path, H, V)
    assert (back.conditioning, back.taps, back.trunk) == (conditioning, taps, trunk)
    for name, value in heads.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=0, atol=0)
    found = stored_architecture(find_heads(tmp_path))
    assert (found.taps, found.trunk) == (len(taps), trunk)
    assert expected_shapes(found) == find_heads(tmp_path).shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("trunk.down.weight"), r"trunk.down.weight has shape missing, expected \(8, 6\)"),
        (lambda t: t.pop("trunk.gate.weight"), "trunk.gate.weight has shape missing, expected two sizes"),
        (lambda t: t.pop("taps"), r"trunk.gate.weight has shape \(6, 24\), expected \(6, 8\)"),
        (lambda t: t.update(taps=torch.tensor([3, 3])), r"taps holds \[3, 3\]; expected distinct layers"),
        (lambda t: t.update(taps=torch.tensor([-1, 3])), r"taps holds \[-1, 3\]"),
        (lambda t: t.update(taps=torch.tensor([1.0, 3.0])), "taps is stored as F32; expected I64"),
        (lambda t: t.update(taps=torch.tensor([[1, 3]])), r"taps has shape \(1, 2\)"),
        (lambda t: t.update({"trunk.up.weight": torch.full((6, 24), torch.inf)}), "trunk.up.weight holds NaN or inf"),
    ],
)
def test_a_trunk_or_taps_that_do_not_fit_are_refused(tmp_path, change, message):
    storage.save_heads(MedusaHeads(H, 2, 1, taps=(5, 2), trunk=6), tmp_path, EXTRAS)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(HeadsError, match=message):
        storage.load_heads(tmp_path, H, V)


def test_a_config_with_other_taps_is_warned_of(tmp_path):
    storage.save_heads(MedusaHeads(H, 2, 1, taps=(5, 2)), tmp_path, EXTRAS)
    (tmp_path / "config.json").write_text('{"medusa_taps": [2, 5]}')
    with pytest.warns(UserWarning, match=r"medusa_taps is \[2, 5\], but by weights and model it is \[5, 2\]"):
        assert storage.load_heads(tmp_path, H, V).taps == (5, 2)
