from medusa_profiles.catalogue import load_profile, profile_names
from medusa_profiles.drawing import draw_tree
from medusa_profiles.profile import TreeProfile


def test_a_small_tree():
    profile = TreeProfile("small", ((0,), (0, 0), (0, 0, 0), (0, 1), (0, 2), (0, 4), (1,), (2,), (2, 0), (3,)))
    assert draw_tree(profile).splitlines() == [
        "small: 11 nodes, depth 3, nodes per depth 1+4+5+1",
        "rank        node  head",
        "root           0     -",
        "├─ 0           1     0",
        "│  ├─ 0        2     1",
        "│  │  └─ 0     3     2",
        "│  ├─ 1–2    4–5     1",
        "│  └─ 4        6     1",
        "├─ 1           7     0",
        "├─ 2           8     0",
        "│  └─ 0        9     1",
        "└─ 3          10     0",
    ]


def test_the_root_alone():
    assert draw_tree(TreeProfile.plain()).splitlines() == [
        "plain: 1 node, depth 0, nodes per depth 1",
        "rank  node  head",
        "root     0     -",
    ]


def test_wide_and_deep_trees_stay_drawable():
    wide = draw_tree(TreeProfile("wide", tuple((rank,) for rank in range(1000))))
    assert wide.splitlines()[-1] == "└─ 0–999  1–1000     0"
    deep = draw_tree(TreeProfile("deep", tuple((0,) * depth for depth in range(1, 1024))))
    assert len(deep.splitlines()) == 3 + 1023


def test_every_shipped_tree_fits_a_terminal_and_shows_each_node_once():
    for name in profile_names():
        lines = draw_tree(load_profile(name)).splitlines()
        assert max(map(len, lines)) <= 80
        shown = []
        for line in lines[2:]:
            first, _, last = line.split()[-2].partition("–")
            shown += range(int(first), int(last or first) + 1)
        assert shown == list(range(load_profile(name).size))
