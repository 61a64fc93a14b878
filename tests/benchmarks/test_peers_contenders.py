"""Contenders of peers.py: which systems there are, and which of them a run measures."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.toml import to_toml
from peers_contenders import CLASSES, EXTRA, PEERS, own_contenders, peer_contenders, select
from peers_model import OWN_FILE, RECIPES
from peers_runners import RUNNERS


def bundle(digest: str = "d") -> SimpleNamespace:
    return SimpleNamespace(
        root=Path("bundle"),
        manifest=SimpleNamespace(digest=digest),
        profile=lambda name: {"tree-2": 2, "tree-4": 4, "tree-8": 8}[name],
        graph=lambda backend, precision: (
            SimpleNamespace(profile={"int8": "tree-2", "int4": "plain"}[precision]),
            None,
        ),
    )


def test_every_peer_has_a_model_and_a_runner() -> None:
    assert {peer.system for peer in PEERS} == RUNNERS.keys() - {"medusa"}
    models = {peer.name for peer in PEERS} | {peer.speculation for peer in PEERS if peer.speculation}
    assert models == RECIPES.keys() | {OWN_FILE}
    for precision_class in CLASSES:
        assert {p.system for p in PEERS if p.precision_class == precision_class} == RUNNERS.keys() - {"medusa"}


def test_peers_speculate_with_each_number_of_drafts() -> None:
    found = {one.name: one for one in peer_contenders([1, 4])}
    assert (
        len(found)
        == len({one.identity for one in found.values()})
        == len(PEERS) + 2 * sum(peer.precision_class != EXTRA for peer in PEERS)
    )
    assert found["genai int4 b32 n-gram 4"].job["ngram"] == {"size": 4, "draft": 4}
    assert found["genai int4 b32 n-gram 4"].job["model"] == "genai int4 b32 all logits"
    assert not any(one.own for one in found.values())


def test_trees_are_of_the_bundle_its_default_or_files(tmp_path: Path) -> None:
    file = tmp_path / "searched.toml"
    file.write_text(to_toml(TreeProfile("one", ((0,),))))
    trees = ["tree-4", "int4:tree-8", "default", f"int8:{file}"]
    found = own_contenders(bundle(), "", ["int8", "int4"], trees)
    assert {one.name: one.plain for one in found} == {
        "medusa int8": None,
        "medusa int8 tree-4": "medusa int8",
        "medusa int8 tree-2": "medusa int8",
        "medusa int8 searched": "medusa int8",
        "medusa int4": None,
        "medusa int4 tree-4": "medusa int4",
        "medusa int4 tree-8": "medusa int4",
    }
    assert {one.precision_class for one in found} == {"8 bit", "4 bit"}
    assert [one.job["tree"] for one in found][3] == str(file)


def test_integers_are_measured_with_and_without_amx() -> None:
    found = own_contenders(bundle(), "", ["w8a8", "int4"], ["w8a8:tree-4"], amx=True)
    names = ["medusa w8a8", "medusa w8a8 without AMX", "medusa w8a8 tree-4", "medusa w8a8 tree-4 without AMX"]
    assert [one.name for one in found] == [*names, "medusa int4"]
    for with_it, without in (found[:2], found[2:4]):
        assert without.job == with_it.job | {"environment": {"MEDUSA_AMX": "0"}}
        assert without.plain == "medusa w8a8"
        assert without.speculates == with_it.speculates
    assert len({one.identity for one in found}) == 5


def test_another_bundle_or_tree_is_another_identity(tmp_path: Path) -> None:
    file = tmp_path / "searched.toml"
    file.write_text(to_toml(TreeProfile("one", ((0,),))))
    before = own_contenders(bundle(), "", ["int8"], [str(file)])
    file.write_text(to_toml(TreeProfile("two", ((0,), (1,)))))
    plain, tree = own_contenders(bundle(), "", ["int8"], [str(file)])
    assert plain.identity == before[0].identity
    assert tree.identity != before[1].identity
    assert own_contenders(bundle("e"), "", ["int8"], [])[0].identity != plain.identity


def test_trees_and_precisions_are_checked_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "no.toml").write_text("tree")
    with pytest.raises(ProfileError):
        own_contenders(bundle(), "", ["int8"], [str(tmp_path / "no.toml")])
    with pytest.raises(FileNotFoundError):
        own_contenders(bundle(), "", ["int8"], ["missing.toml"])
    with pytest.raises(KeyError):  # the bundle's own error
        own_contenders(bundle(), "", ["int8"], ["tree-9"])
    with pytest.raises(ValueError, match="bundle has int2; expected precisions"):
        own_contenders(bundle(), "", ["int2"], [])


def test_select_by_pattern() -> None:
    peers = peer_contenders([2])
    assert [one.name for one in select(peers, ["llama.cpp Q?_0", "*int4 b64"])] == [
        "genai int4 b64",
        "llama.cpp Q8_0",
        "llama.cpp Q4_0",
    ]
    assert select(peers, []) == peers
    with pytest.raises(ValueError, match="--only vllm matches none of: genai fp32"):
        select(peers, ["genai*", "vllm"])
