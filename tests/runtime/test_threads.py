import os
from pathlib import Path

import pytest
from medusa_runtime import threads


@pytest.fixture
def machine(monkeypatch):
    """Make a machine of processors, given as processor -> its siblings, or None where /sys does not say."""

    def make(siblings):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(siblings), raising=False)

        def read_text(path):
            text = siblings[int(path.parts[-3].removeprefix("cpu"))]
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(Path, "read_text", read_text)

    return make


@pytest.mark.parametrize(
    ("siblings", "cores"),
    [
        ({0: "0\n", 1: "1\n"}, 2),
        ({0: "0,2\n", 1: "1,3\n", 2: "0,2\n", 3: "1,3\n"}, 2),
        ({2: "0,2\n", 3: "1,3\n", 7: "7\n"}, 3),  # only some processors are ours
        ({0: "0-1\n"}, 1),
        ({0: None, 1: None, 5: None}, 3),
        ({}, 1),
    ],
)
def test_hyper_threads_of_one_core_count_once(machine, siblings, cores):
    machine(siblings)
    assert threads.physical_cores() == cores


@pytest.mark.parametrize(("count", "cores"), [(6, 6), (None, 1)])
def test_without_affinity_every_processor_counts(monkeypatch, count, cores):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert threads.physical_cores() == cores


def test_this_machine_has_cores():
    assert 1 <= threads.physical_cores() <= os.cpu_count()


def control_groups(root, own, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for path, text in files.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 2.0),
        ("0::/gone\n", {}, None),
        (
            "4:memory:/\n3:cpu,cpuacct:/box\n",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("1:cpuset:/\n", {"cpuset/cpu.max": "100000 100000\n"}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
    ],
)
def test_the_quota_of_a_container(tmp_path, own, files, quota):
    assert threads.cpu_quota(control_groups(tmp_path, own, files)) == quota


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert threads.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (8.0, 4), (2.9, 2), (0.5, 1)])
def test_threads_stay_within_the_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(threads, "physical_cores", lambda: 4)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert threads.default_threads() == expected


def test_the_processor_says_its_name(monkeypatch):
    monkeypatch.setattr(
        Path, "read_text", lambda _path, **_: "flags: a\nmodel name\t: Some CPU @ 2 GHz\nmodel name: x\n"
    )
    assert threads.processor_name() == "Some CPU @ 2 GHz"

    def nothing(_path, **_):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", nothing)
    assert threads.processor_name()
