"""Every command that loads a bundle can be held to one."""

from __future__ import annotations

from pathlib import Path

import pytest
from medusa_exporter.cli import main
from medusa_runtime.bundle import Bundle
from medusa_runtime.engine import Engine
from medusa_runtime.errors import BundleError


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "BUNDLE", "Hi"),
        ("bench", "BUNDLE", "--prompts", "PROMPTS", "--json", "OUT"),
        ("verify", "BUNDLE"),
        ("calibrate", "BUNDLE", "--json", "OUT"),
        ("search-tree", "BUNDLE", "--json", "OUT"),
        ("compare", "BUNDLE", "--backends", "ort-cpu", "--save", "OUT"),
        ("inspect", "BUNDLE"),
    ],
)
def test_another_bundle_than_the_pinned_one_is_refused(
    tiny_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts").write_text('{"turns": ["Hi"]}\n')
    places = {"BUNDLE": tiny_bundle, "PROMPTS": tmp_path / "prompts", "OUT": tmp_path / "out"}
    words = [str(places.get(word, word)) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--expected-digest", "a" * 64])
    shown = capsys.readouterr().err
    assert ended.value.code == 1, shown
    assert "Traceback" not in shown
    digest = Bundle.open(tiny_bundle).manifest.digest
    assert f"has the digest {digest}, expected {'a' * 64}" in shown
    assert not (tmp_path / "out").exists()


def test_engines_of_another_bundle_are_not_built(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "medusa_exporter.engines.flavours.find_flavour", lambda _name: None
    )  # no TensorRT is needed for that
    with pytest.raises(SystemExit) as ended:
        main(["engines", str(tiny_bundle), "--backend", "tensorrt", "--expected-digest", "a" * 64])
    assert ended.value.code == 1


def test_the_pinned_bundle_is_taken(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(tiny_bundle)])
    shown = capsys.readouterr().out
    digest = next(line.split()[1] for line in shown.splitlines() if line.split()[:1] == ["digest"])
    engine = Engine.load(tiny_bundle, threads=1, expected_digest=digest)
    assert engine.bundle.manifest.digest == digest
    with pytest.raises(BundleError, match="it is not the bundle that was pinned"):
        Engine.load(tiny_bundle, expected_digest="0" * 64)
