"""Files appear whole or not at all."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from medusa_exporter import files
from medusa_exporter.files import atomic_write, atomic_write_files, finish_interrupted_write, write_json
from medusa_runtime.errors import BusyError


def test_a_file_appears_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "data"
    for content in (b"old", b"new"):
        before = path.read_bytes() if path.exists() else None
        with atomic_write(path) as file:
            file.write(content)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_broken_off_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "data"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})
    for wrong in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, wrong)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_lists_of_whole_numbers_take_one_line(tmp_path: Path) -> None:
    content = {"kept": [[1, 2, -3], [], [4]], "text": "[\n1, 2\n]", "mixed": [1, "2"], "half": [0.5, 1]}
    write_json(tmp_path / "some.json", content)
    text = (tmp_path / "some.json").read_text()
    assert json.loads(text) == content
    assert "[1, 2, -3]" in text and "[4]" in text


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "out.json"
    link.symlink_to(tmp_path / "there" / "real.json")
    for number in range(2):
        write_json(link, {"number": number})
        assert link.is_symlink()
        assert json.loads((tmp_path / "there" / "real.json").read_text()) == {"number": number}
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["real.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="files are locked in another way there")
def test_scratch_files_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    if (child := os.fork()) == 0:
        with atomic_write(path) as file:
            file.write(b"half")
            os._exit(0)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    theirs = tmp_path / ".out.json.backup.tmp"
    theirs.write_text("years")
    with atomic_write(path) as slow:
        slow.write(b"slow")
        write_json(path, {})
        assert not left.exists()
        assert len(list(tmp_path.iterdir())) == 3
    assert path.read_bytes() == b"slow"
    assert sorted(tmp_path.iterdir()) == [theirs, path]


def test_files_come_together_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    for content in (b"old", b"new"):
        with atomic_write_files(folder) as new:
            for name in ("a", "b"):
                (new / name).write_bytes(content)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": content, "b": content}
    with pytest.raises(KeyboardInterrupt), atomic_write_files(folder) as new:
        (new / "a").write_bytes(b"half")
        raise KeyboardInterrupt
    finish_interrupted_write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"new", "b": b"new"}


@pytest.mark.skipif(sys.platform == "win32", reason="files are locked in another way there")
def test_a_scratch_file_swept_away_before_it_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = files._lock

    def late(file):
        monkeypatch.setattr(files, "_lock", lock)
        write_json(tmp_path / "out.json", {"other": 1})
        lock(file)

    monkeypatch.setattr(files, "_lock", late)
    write_json(tmp_path / "out.json", {"mine": 1})
    assert json.loads((tmp_path / "out.json").read_text()) == {"mine": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_second_writer_of_a_folder_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT", 0.1)
    with atomic_write_files(tmp_path) as first:
        (first / "a").write_text("1")
        with pytest.raises(BusyError, match="another command is writing to"), atomic_write_files(tmp_path):
            pytest.fail("two writers at once")
        (first / "b").write_text("1")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "1", "b": "1"}


def test_many_writers_of_a_folder_leave_what_one_of_them_wrote(tmp_path: Path) -> None:
    def write(number: int) -> None:
        with atomic_write_files(tmp_path / "out") as new:
            for name in "abc":
                (new / name).write_text(str(number))
        finish_interrupted_write(tmp_path / "out")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(60)))
    found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert sorted(found) == ["a", "b", "c"]
    assert len(set(found.values())) == 1
