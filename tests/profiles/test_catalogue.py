from importlib import resources

import pytest
from medusa_profiles.catalogue import load_profile, load_profile_file, profile_names
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.toml import to_toml

CHAINS = {f"chain-{n}": n + 1 for n in range(1, 6)}
TREES = {f"tree-{n}": n for n in (2, 4, 6, 8, 12, 16, 32, 64)}
REFERENCE = dict.fromkeys(
    [
        "mc_sim_7b_63",
        "vicuna_7b_stage1",
        "vicuna_7b_stage1_ablation",
        "vicuna_7b_stage2",
        "vicuna_13b_stage1",
        "vicuna_13b_stage2",
        "vicuna_33b_stage1",
        "vicuna_33b_stage2",
        "zephyr_stage2",
    ],
    64,
)
SIZES = CHAINS | TREES | REFERENCE


def test_names_are_complete_and_numbers_sort_by_value():
    assert set(profile_names()) == set(SIZES)
    assert len(profile_names()) == len(SIZES)
    assert [name for name in profile_names() if name.startswith("tree-")] == list(TREES)
    assert [name for name in profile_names() if name in REFERENCE] == list(REFERENCE)


@pytest.mark.parametrize("name", SIZES)
def test_every_shipped_tree_loads_and_is_as_written(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.size == SIZES[name]
    assert profile.source
    text = resources.files("medusa_profiles").joinpath("trees", f"{name}.toml").read_text(encoding="utf-8")
    assert to_toml(profile) == text


@pytest.mark.parametrize("name", CHAINS)
def test_chains_have_no_branches(name):
    profile = load_profile(name)
    assert profile.chain_length == profile.depth == profile.size - 1


@pytest.mark.parametrize("name", TREES)
def test_fitted_trees_need_four_heads_at_most(name):
    load_profile(name).check_fits(heads=4, top_k=14 if name == "tree-64" else 10)


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_trees_name_their_origin(name):
    profile = load_profile(name)
    profile.check_fits(heads=4, top_k=10)
    for word in ("FasterDecoding/Medusa", "medusa_choices.py", "Apache-2.0", "2401.10774"):
        assert word in profile.source


def test_the_papers_tree_of_63_candidates():
    profile = load_profile("mc_sim_7b_63")
    assert [int((profile.depths == depth).sum()) for depth in range(5)] == [1, 10, 28, 23, 2]
    assert {(0, 0, 0, 1), (9, 0), (0, 7, 0), (1, 6), (3, 1)} <= set(profile.paths)


def test_an_unknown_name_is_answered_with_a_suggestion_and_the_list():
    with pytest.raises(ProfileError) as caught:
        load_profile("tree_16")
    assert str(caught.value).startswith(
        "no tree is called 'tree_16' (did you mean 'tree-16'?); expected one of chain-1, "
    )
    assert all(name in str(caught.value) for name in profile_names())


@pytest.mark.parametrize("name", ["", "zzz", "../trees/chain-1", "chain-1.toml"])
def test_a_name_is_never_a_path(name):
    with pytest.raises(ProfileError, match=r"^no tree is called "):
        load_profile(name)


def test_load_file(tmp_path):
    profile = TreeProfile("mine", ((0,), (2,)), "made here, ä")
    path = tmp_path / "any.toml"
    path.write_text(to_toml(profile), encoding="utf-8")
    assert load_profile_file(path) == load_profile_file(str(path)) == profile


def test_load_file_says_which_file_is_wrong(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('name = "x"\npaths = [[1, 0]]', encoding="utf-8")
    with pytest.raises(ProfileError, match=r"bad\.toml: tree 'x': path \[1, 0\] has no parent"):
        load_profile_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match=r"bad\.toml: not UTF-8 text: "):
        load_profile_file(path)
    with pytest.raises(ProfileError, match=r"missing\.toml cannot be read .*medusa-export profiles lists"):
        load_profile_file(tmp_path / "missing.toml")
