"""A bundle whose folder cannot be renamed, as a volume's mount point, is worked on inside of its folder."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.publish import check_target, lock_bundle, replace_bundle
from medusa_exporter.staging import Staging, is_mount
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError

from .crash import cuts, hidden
from .test_publish import CONTENT, sealed, small  # noqa: F401

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNTED = """
import sys
from pathlib import Path
from medusa_exporter.publish import replace_bundle, lock_bundle
from medusa_exporter.staging import is_mount
from medusa_runtime.bundle import Bundle
from tests.exporter.test_publish import sealed

bundle = Path(sys.argv[1])
assert is_mount(bundle)
for number in range(2):
    with lock_bundle(bundle) as staging:
        assert staging.inside
        with replace_bundle(staging) as folder:
            sealed(folder, {"number": number})
        assert Bundle.open(bundle, weights=True).manifest.sources == {"number": number}
    assert [path.name for path in bundle.iterdir() if path.name.startswith(".")] == []
print("done")
"""


def put(bundle: Path, sources: dict[str, Any]) -> None:
    """What a command does, in a moment: it makes a small bundle in the place of the one there."""
    with lock_bundle(bundle) as staging, replace_bundle(staging) as folder:
        sealed(folder, sources)


@pytest.fixture
def fixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the system refuses to rename, as it does with mount points and lower layers of a container."""
    bundle, rename, number = tmp_path / "bundle", Path.rename, getattr(request, "param", errno.EBUSY)

    def refused(path: Path, target: Path) -> Path:
        if path == bundle and target != bundle / "medusa-export":
            raise OSError(number, os.strerror(number), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    bundle.mkdir()
    return bundle


@pytest.mark.parametrize("mount", [["-t", "tmpfs", "none"], ["--bind"]])
def test_a_bundle_on_a_real_mount_point_is_made_and_replaced(tmp_path: Path, mount: list[str]) -> None:
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], check=False).returncode:
        pytest.skip("this system lets no user mount anything")
    volume, root = tmp_path / "volume", Path(__file__).parents[2]
    volume.mkdir()
    source = [str(volume)] if mount == ["--bind"] else []
    script = 'mount "$@" && exec "$PYTHON" -c "$SCRIPT" "$PLACE"'
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "SCRIPT": MOUNTED,
        "PLACE": str(volume),
        "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
    }
    command = [*UNSHARE, "sh", "-c", script, "sh", *mount, *source, str(volume)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=root, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert hidden(tmp_path) == []


def test_a_plain_folder_is_no_mount_point(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    assert not is_mount(tmp_path / "bundle")
    assert not is_mount(tmp_path / "none")
    assert list(tmp_path.rglob("*")) == [tmp_path / "bundle"]


@pytest.mark.parametrize("fixed", [errno.EBUSY, errno.EXDEV], indirect=True)
def test_readers_find_the_old_bundle_until_the_new_one_is_finished(fixed: Path) -> None:
    put(fixed, {"made": "before"})
    with lock_bundle(fixed) as staging:
        assert staging.inside
        with replace_bundle(staging) as folder:
            sealed(folder, {"made": "after"})
            assert Bundle.open(fixed, weights=True).manifest.sources == {"made": "before"}
    assert Bundle.open(fixed, weights=True).manifest.sources == {"made": "after"}
    assert hidden(fixed) == hidden(fixed.parent) == []


def test_what_the_new_bundle_lacks_goes_and_what_is_not_of_a_bundle_stays(fixed: Path) -> None:
    with lock_bundle(fixed) as staging, replace_bundle(staging) as folder:
        (folder / "engines").mkdir()
        (folder / "engines" / "old.cache").write_bytes(b"old")
        sealed(folder, {})
    (fixed / "README.md").write_text("years")
    (fixed / ".cache" / "huggingface").mkdir(parents=True)
    put(fixed, {})
    assert set(Bundle.open(fixed).manifest.files) == set(CONTENT)
    assert not (fixed / "engines").exists()
    assert (fixed / "README.md").read_text() == "years"
    assert [path.name for path in (fixed / ".cache").iterdir()] == ["huggingface"]


@pytest.mark.parametrize("empty", [False, True])
def test_a_command_killed_at_any_access_leaves_a_bundle_or_the_next_one_makes_it_whole(
    fixed: Path,
    empty: bool,
    small: Path,  # noqa: F811
) -> None:
    def restore() -> None:
        shutil.rmtree(fixed)
        fixed.mkdir() if empty else shutil.copytree(small, fixed)

    seen = set()
    restore()
    for _number in cuts(lambda: put(fixed, {"made": "after"})):
        torn = Staging(fixed, inside=True).ready.exists()
        if not torn and (fixed / "manifest.json").exists():
            seen.add(Bundle.open(fixed, weights=True).manifest.sources["made"])
        with lock_bundle(fixed):  # what any command on this bundle does first
            if (fixed / "manifest.json").exists():
                made = Bundle.open(fixed, weights=True).manifest.sources["made"]
                assert made == "after" or not torn
                seen.add((torn, made))
        put(fixed, {"made": "after"})
        assert Bundle.open(fixed, weights=True).manifest.sources == {"made": "after"}
        assert hidden(fixed) == hidden(fixed.parent) == []
        restore()
    assert (True, "after") in seen
    assert empty or "before" in seen


def test_an_interruption_while_files_are_moved_leaves_the_new_bundle(
    fixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(fixed, {"made": "before"})
    replace, left = Path.replace, [2]

    def interrupted(path: Path, target: Path) -> Path:
        if "ready" in path.parts and (left.__setitem__(0, left[0] - 1) or left[0] == 0):
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(fixed, {"made": "after"})
    assert Bundle.open(fixed, weights=True).manifest.sources == {"made": "after"}
    assert hidden(fixed) == []


def test_files_of_the_user_in_a_folder_that_cannot_be_renamed_are_never_removed(fixed: Path) -> None:
    (fixed / "thesis.txt").write_text("years")
    with pytest.raises(BundleError, match="other things in it"):
        put(fixed, {})
    (fixed / "thesis.txt").unlink()
    put(fixed, {})
    (fixed / "thesis.txt").write_text("years")
    with pytest.raises(BundleError, match=r"holds 'thesis\.txt'"):
        put(fixed, {})
    assert (fixed / "thesis.txt").read_text() == "years"
    check_target(fixed.parent / "none")
