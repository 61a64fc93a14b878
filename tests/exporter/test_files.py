"""Files appear whole or not at all."""

import json
from pathlib import Path

import pytest
from medusa_exporter.files import check_output, write_json, written_whole
from medusa_runtime.errors import MedusaError


def test_a_file_appears_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "data"
    for content in (b"old", b"new"):
        before = path.read_bytes() if path.exists() else None
        with written_whole(path) as file:
            file.write(content)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_broken_off_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "data"
    path.write_bytes(b"old")
    with pytest.raises(error), written_whole(path) as file:
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


def test_the_folder_of_the_json_is_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "out.json"
    check_output(file, tmp_path / "bundle")
    assert file.parent.is_dir()
    assert not file.exists()


def test_places_that_cannot_hold_the_json_are_refused_early(tmp_path: Path) -> None:
    with pytest.raises(MedusaError, match="is a folder"):
        check_output(tmp_path, tmp_path / "bundle")
    with pytest.raises(MedusaError, match="lies in the bundle"):
        check_output(tmp_path / "bundle" / "out.json", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
