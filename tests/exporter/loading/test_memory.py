"""How much memory is left, by made-up files of proc and sys, and what is refused for want of it."""

import pytest
from medusa_exporter.loading.memory import available_memory, check_memory
from medusa_runtime.errors import CapacityError

MB = 10**6


@pytest.fixture
def host(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\nSwapFree:          0 kB\n")
    return tmp_path, write


def group(write, folder, version=2, **numbers):
    names = {
        "limit": "memory.max",
        "used": "memory.current",
        "swap": "memory.swap.max",
        "swapped": "memory.swap.current",
    }
    if version == 1:
        names = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes"}
    for name, file in names.items():
        if name in numbers:
            write(f"{folder}/{file}", f"{numbers[name]}\n")
    if "cached" in numbers:
        start = "" if version == 2 else "total_"
        write(f"{folder}/memory.stat", f"anon 5\n{start}inactive_file {numbers['cached']}\n{start}active_file 3\n")


def test_without_groups_free_memory_and_swap_count(host):
    root, write = host
    assert available_memory(root) == 4_000 * 1024
    write("proc/meminfo", "MemAvailable:    4000 kB\nSwapFree:        500 kB\n")
    assert available_memory(root) == 4_500 * 1024


def test_the_tightest_group_counts_the_cached_files_aside(host):
    root, write = host
    write("proc/self/cgroup", "0::/a/b\n")
    group(write, "sys/fs/cgroup/a/b", limit=3_000_000, used=2_000_000, cached=500_000)
    assert available_memory(root) == 1_500_003
    group(write, "sys/fs/cgroup/a", limit=1_000_000, used=900_000)
    assert available_memory(root) == 100_000
    group(write, "sys/fs/cgroup/a", limit="max", used=900_000)
    assert available_memory(root) == 1_500_003
    group(write, "sys/fs/cgroup/a/b", used=9_000_000)
    assert available_memory(root) == 0


@pytest.mark.parametrize(
    ("numbers", "swap"),
    [({}, 512_000), ({"swap": "max", "swapped": 5}, 512_000), ({"swap": 400_000, "swapped": 100_000}, 300_000)],
)
def test_swap_counts_as_far_as_a_group_may_take_it(host, numbers, swap):
    root, write = host
    write("proc/meminfo", "MemAvailable:    4000 kB\nSwapFree:        500 kB\n")
    write("proc/self/cgroup", "0::/a\n")
    group(write, "sys/fs/cgroup/a", limit=1_000_000, used=900_000, **numbers)
    assert available_memory(root) == 100_000 + swap


def test_within_a_container_the_group_is_at_the_top(host):
    root, write = host
    write("proc/self/cgroup", "0::/../../docker/0123\n")
    group(write, "sys/fs/cgroup", limit=2_000_000, used=500_000)
    assert available_memory(root) == 1_500_000


def test_groups_of_the_first_version(host):
    root, write = host
    write("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:hugetlb,memory:/docker/0123\n0::/\n")
    group(write, "sys/fs/cgroup/memory", version=1, limit=2_000_000, used=900_000, cached=97)
    assert available_memory(root) == 1_100_100
    group(write, "sys/fs/cgroup/memory/docker/0123", version=1, limit=1_000_000, used=900_000)
    assert available_memory(root) == 100_000
    group(write, "sys/fs/cgroup/memory/docker/0123", version=1, limit=9223372036854771712)
    assert available_memory(root) == 1_100_100


def test_memory_and_swap_together_may_be_limited(host):
    root, write = host
    write("proc/meminfo", "MemAvailable:    4000 kB\nSwapFree:        500 kB\n")
    write("proc/self/cgroup", "4:memory:/a\n")
    group(write, "sys/fs/cgroup/memory/a", version=1, limit=1_000_000, used=900_000)
    assert available_memory(root) == 100_000 + 512_000
    write("sys/fs/cgroup/memory/a/memory.memsw.limit_in_bytes", 1_200_000)
    write("sys/fs/cgroup/memory/a/memory.memsw.usage_in_bytes", 950_000)
    assert available_memory(root) == 250_000


def test_where_a_group_is_slowed_down_is_a_limit_too(host):
    root, write = host
    write("proc/self/cgroup", "0::/a\n")
    group(write, "sys/fs/cgroup/a", limit="max", used=900_000)
    write("sys/fs/cgroup/a/memory.high", 1_000_000)
    assert available_memory(root) == 100_000
    group(write, "sys/fs/cgroup/a", limit=950_000, used=900_000)
    assert available_memory(root) == 50_000


@pytest.mark.parametrize("text", [None, "", "MemTotal: 5 kB\n", "MemAvailable: many kB\n", "\xff\xfe"])
def test_where_nothing_can_be_found_out_nothing_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/meminfo").write_text(text, encoding="utf-8")
    assert available_memory(tmp_path) is None
    check_memory(10**18, "anything", tmp_path)


@pytest.mark.parametrize("lines", ["", "nonsense\n", "a:b\n", "::\n", "0::/a/b\n", "4:memory:/x\n"])
def test_unknown_groups_limit_nothing(host, lines):
    root, write = host
    write("proc/self/cgroup", lines)
    write("sys/fs/cgroup/a/b/memory.max", "a lot")
    assert available_memory(root) == 4_000 * 1024


def test_what_does_not_fit_is_refused_with_both_figures(host):
    root, write = host
    write("proc/meminfo", "MemAvailable: 7812500 kB\n")  # 8,000 MB
    check_memory(8_000 * MB, "this", root)
    with pytest.raises(CapacityError, match=r"this needs about 8,001 MB of memory, but 8,000 MB are left .*raise the"):
        check_memory(8_001 * MB, "this", root)
