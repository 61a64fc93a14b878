"""The README is short, its links lead somewhere, and the code that it shows runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from medusa_exporter.cli import group

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The words of every `medusa-export` command in the README's bash blocks, comments dropped."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "medusa-export"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_heads: Path) -> Path:
    """A working folder in which the README's names exist: MODEL, HEADS and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "MODEL").symlink_to(tiny_model)
    (folder / "HEADS").symlink_to(tiny_heads)
    (folder / "prompts.jsonl").write_text(json.dumps({"turns": ["one two"]}) + "\n")
    return folder


def test_it_can_be_read_to_its_end() -> None:
    assert len(README.splitlines()) <= 150


def test_its_links_and_pictures_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("https://")]
    assert len(local) > 15
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_its_commands_and_its_python_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In the order of the README, on a tiny model; backends that need a GPU are replaced by the CPU's."""
    monkeypatch.chdir(folder)
    found = commands()
    assert [words[0] for words in found] == ["build", "verify", "bench", "calibrate", "bench", "report", "compare"]
    for words in found:
        line = shlex.join(words).replace("ort-cuda,tensorrt --precision fp16", "ort-cpu --precision fp32")
        line = line.replace("ort-cuda:fp16", "ort-cpu:fp32").replace("calibrate bundle", "calibrate bundle --seconds 0")
        result = CliRunner().invoke(group, shlex.split(line), catch_exceptions=False)
        assert result.exit_code == 0, (line, result.output)
    assert {path.name for path in folder.iterdir()} >= {"bundle", "bench.json", "both.json", "report.html"}
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out
