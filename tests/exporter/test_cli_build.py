"""`medusa-export build`: what heads cannot do is told before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from medusa_exporter.cli import main

TREE = 'name = "deep"\nsource = "a test"\npaths = [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]\n'


def three_heads(folder: Path) -> Path:
    from medusa_exporter.heads.modules import MedusaHeads
    from medusa_exporter.heads.storage import save_heads

    save_heads(MedusaHeads(64, 3, 1), folder, {"base_model_name_or_path": "tiny", "vocab_size": 300})
    return folder


@pytest.mark.parametrize("profile", ["chain-4", "deep.toml"])
def test_a_tree_deeper_than_the_heads_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, profile: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("deep.toml").write_text(TREE)
    heads = three_heads(tmp_path / "heads")
    with pytest.raises(SystemExit) as stop:
        main(["build", str(tiny_model), "--heads", str(heads), "-o", "out", "--profile", profile])
    assert stop.value.code == 1
    name = profile.removesuffix(".toml")
    assert capsys.readouterr().err == (
        f"error: tree '{name}' has a path of depth 4 ([0, 0, 0, 0]) but the bundle has 3 heads\n"
    )
    assert not Path("out").exists()


def test_pickled_heads_are_refused_with_the_command_that_reads_them(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "medusa_lm_head.pt").touch()
    with pytest.raises(SystemExit):
        main(["build", str(tiny_model), "--heads", str(tmp_path), "-o", str(tmp_path / "out")])
    shown = capsys.readouterr().err
    assert shown.endswith(f"medusa-export heads convert {tmp_path} -o HEADS\n")
    assert not (tmp_path / "out").exists()
