"""A bundle: opened whole or not at all."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
from medusa_runtime import manifest_writer
from medusa_runtime.bundle import Bundle, is_unchanged, rewrite_manifest, write_manifest
from medusa_runtime.errors import BundleError
from medusa_runtime.facts import GraphFacts, HeadFacts, ModelFacts
from medusa_runtime.manifest import Manifest

MODEL = ModelFacts("tiny", "llama", 2, 64, 4, 2, 16, 100, 128, (2,))
HEADS = HeadFacts(3, 1, "none", 10)
CONTENT = {
    "graphs/ort-cpu-fp32.onnx": bytes(range(256)) * 8,
    "graphs/ort-cpu-int8.onnx": b"int8",
    "graphs/weights.data": os.urandom(5 << 20),
    "profiles/chain.toml": b'name = "chain"\npaths = [[0], [0, 0], [0, 0, 0]]\n',
    "profiles/wide.toml": b'name = "wide"\npaths = [[0], [1], [9]]\n',
    "tokenizer/tokenizer.json": b"{}",
    "tokenizer/chat_template.jinja": "{{ messages }} é".encode(),
    "tokenizer/special_tokens.json": b'{"eos_token": "</s>"}',
    "LICENSE": b"",
}


def build(folder, content=CONTENT, **changes):
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    parts = {"producer": {"medusa-export": "0"}, "model": MODEL, "heads": HEADS, "sources": {"a": 1}}
    parts["graphs"] = {
        f"ort-cpu-{precision}": GraphFacts("ort-cpu", precision, f"graphs/ort-cpu-{precision}.onnx")
        for precision in ("fp32", "int8")
    }
    parts["profiles"] = [name[9:-5] for name in content if name.startswith("profiles/")]
    return write_manifest(folder, **parts | changes)


@pytest.fixture
def folder(tmp_path):
    build(tmp_path / "b")
    return tmp_path / "b"


def refused(folder, match):
    with pytest.raises(BundleError, match=match):
        Bundle.open(folder, weights=True)


def test_open(folder):
    bundle = Bundle.open(str(folder))
    assert bundle.root == folder.resolve()
    assert (bundle.model, bundle.heads) == (MODEL, HEADS)
    assert set(bundle.manifest.files) == set(CONTENT)
    facts = bundle.manifest.files["graphs/weights.data"]
    data = CONTENT["graphs/weights.data"]
    assert (facts.size, facts.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert bundle.tokenizer == b"{}"
    assert bundle.chat_template == "{{ messages }} é"
    assert bundle.special_tokens == {"eos_token": "</s>"}
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "graphs",
        "manifest.json",
        "profiles",
        "tokenizer",
    ]


def test_graph(folder):
    bundle = Bundle.open(folder)
    assert bundle.graph("ort-cpu") == bundle.graph("ort-cpu", "fp32")
    facts, path = bundle.graph("ort-cpu", "int8")
    assert (facts.precision, path.read_bytes()) == ("int8", b"int8")
    for wanted, asked in {
        ("ort-cuda",): "backend ort-cuda",
        ("ort-cpu", "int4"): "backend ort-cpu, precision int4",
    }.items():
        with pytest.raises(BundleError, match=f"no graph for {asked}; it has ort-cpu-fp32, ort-cpu-int8; .*--backend"):
            bundle.graph(*wanted)


def test_the_only_graph_is_taken_and_several_without_fp32_are_not_guessed(tmp_path):
    build(tmp_path / "b", graphs={"ort-cpu-int8": GraphFacts("ort-cpu", "int8", "graphs/ort-cpu-int8.onnx")})
    assert Bundle.open(tmp_path / "b").graph("ort-cpu")[0].precision == "int8"
    pair = {f"ort-cpu-{p}": GraphFacts("ort-cpu", p, "graphs/ort-cpu-int8.onnx") for p in ("int8", "int4")}
    build(tmp_path / "b", graphs=pair)
    with pytest.raises(BundleError, match="ort-cpu-int4, ort-cpu-int8"):
        Bundle.open(tmp_path / "b").graph("ort-cpu")


def test_profiles(folder):
    bundle = Bundle.open(folder)
    assert {name: (tree.size, tree.depth) for name, tree in bundle.profiles().items()} == {
        "chain": (4, 3),
        "wide": (4, 1),
    }
    with pytest.raises(BundleError, match=r"no profile 'x'; it has chain, wide: .*--profile NAME"):
        bundle.profile("x")
    with pytest.raises(BundleError, match="has no profile 'plain'; plain decoding has no tree: leave the name out"):
        bundle.profile("plain")


def test_what_is_missing_is_named_and_nothing_else_is_offered_where_there_is_nothing(tmp_path):
    content = {name: data for name, data in CONTENT.items() if not name.startswith("profiles/")}
    build(tmp_path / "none", content)
    none = Bundle.open(tmp_path / "none")
    with pytest.raises(BundleError, match=r"no chat template 'x'; it has none with a name; leave it out, or build"):
        none.named_chat_template("x")
    with pytest.raises(BundleError, match=r"no profile 'x'; it has none: use plain decoding, or build"):
        none.profile("x")
    build(tmp_path / "one", {**CONTENT, "tokenizer/chat_templates/rag.jinja": b"a"})
    one = Bundle.open(tmp_path / "one")
    assert one.named_chat_template("rag") == "a"
    with pytest.raises(BundleError, match=r"no chat template 'x'; it has rag; name one of these, or build"):
        one.named_chat_template("x")


@pytest.mark.parametrize(
    "text", ["paths = [[0, 0, 0, 0]]", "paths = [[10]]", "paths = 3", "name =", "\xff", "name = 'b'"]
)
def test_a_profile_that_does_not_serve(tmp_path, text):
    chain = 'name = "a"\n' + text.replace("[[0, 0, 0, 0]]", "[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]")
    text = "name = 'b'\npaths = [[0]]" if text == "name = 'b'" else chain
    build(tmp_path / "b", CONTENT | {"profiles/a.toml": text.encode("latin-1")})
    bundle = Bundle.open(tmp_path / "b")
    with pytest.raises(BundleError, match=r"'a'|a\.toml"):
        bundle.profiles()


def test_a_bundle_without_tokenizer(tmp_path):
    build(tmp_path / "b", {name: data for name, data in CONTENT.items() if not name.startswith("tokenizer")})
    bundle = Bundle.open(tmp_path / "b")
    assert (bundle.chat_template, bundle.special_tokens) == (None, {})
    with pytest.raises(BundleError, match="no tokenizer"):
        _ = bundle.tokenizer


@pytest.mark.parametrize("data", [b"[]", b'{"a": 1}', b"{", b"\xff", b"[" * 10**6])
def test_special_tokens_must_be_texts(tmp_path, data):
    build(tmp_path / "b", CONTENT | {"tokenizer/special_tokens.json": data})
    with pytest.raises(BundleError, match="special_tokens"):
        _ = Bundle.open(tmp_path / "b").special_tokens


def test_any_flipped_byte_in_any_file_is_refused(folder):
    for name in [*CONTENT, "manifest.json"]:
        data = (folder / name).read_bytes()
        for at in sorted({len(data) * part // 12 for part in range(12)} | {len(data) - 1}) if data else ():
            damaged = bytearray(data)
            damaged[at] ^= 1
            (folder / name).write_bytes(damaged)
            refused(folder, "SHA-256|manifest")
        (folder / name).write_bytes(data)
    Bundle.open(folder)


def test_cut_grown_and_missing_files(folder):
    for name in [*CONTENT, "manifest.json"]:
        data = (folder / name).read_bytes()
        for damaged in (data[:-1], data[: len(data) // 2], data + b"\0") if data else (b"\0",):
            (folder / name).write_bytes(damaged)
            refused(folder, "bytes, expected .*copy it again|manifest")
        (folder / name).unlink()
        refused(folder, name)
        (folder / name).write_bytes(data)
    Bundle.open(folder)


def test_no_bundle(tmp_path):
    refused(tmp_path / "absent", "no such bundle: .*medusa-export build")
    refused(tmp_path, "has no manifest.json")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "no such bundle")


@pytest.mark.parametrize(
    "name", ["x", ".x", "graphs/x.onnx", "profiles/x.toml", "tokenizer/a/b/x", "other/x", "manifest.json~"]
)
def test_a_file_that_the_manifest_does_not_list(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    refused(folder, f"'{name}', which its manifest does not list")


@pytest.mark.parametrize("name", ["graphs/ort-cpu-int8.onnx", "LICENSE", "manifest.json"])
def test_links(folder, tmp_path, name):
    outside = tmp_path / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    refused(folder, "link that leaves the bundle")
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    refused(folder, name)
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, name)
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    refused(folder, "not a regular file")


def in_a_hubs_cache(folder, cache, shared=()):
    """Put a bundle where a hub's tool does: a snapshot of links to blobs, `shared` ones being links once more."""
    repository = cache / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        if name.as_posix() in shared:
            store = cache / "blobs" / blob.name[:2] / blob.name
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, store)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            shutil.copy(file, blob)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_snapshot_in_a_hubs_cache_opens(folder, tmp_path):
    snapshot = in_a_hubs_cache(folder, tmp_path / "hub", shared=["graphs/weights.data"])
    bundle = Bundle.open(snapshot)
    assert bundle.manifest == Bundle.open(folder).manifest
    assert bundle.chat_template == "{{ messages }} é"
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").touch()  # a file itself, where links cannot be made
    Bundle.open(snapshot)


@pytest.mark.parametrize("place", ["elsewhere", "hub/models--someone--tiny/other", "hub/models--another--one/blobs"])
def test_a_snapshots_link_out_of_its_cache_is_refused(folder, tmp_path, place):
    snapshot = in_a_hubs_cache(folder, tmp_path / "hub")
    outside = tmp_path / place / "license"
    outside.parent.mkdir(parents=True)
    outside.touch()  # with the content that the manifest lists
    for through in (snapshot / "LICENSE", (snapshot / "LICENSE").resolve()):
        through.unlink()
        through.symlink_to(outside)
        refused(snapshot, "link that leaves the bundle")
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to("/etc/passwd")
    refused(snapshot, "link that leaves the bundle")


def test_a_folder_that_only_looks_like_a_snapshot_gains_nothing(folder, tmp_path):
    snapshot = tmp_path / "mine" / "snapshots" / "one"
    shutil.copytree(folder, snapshot)
    (tmp_path / "mine" / "blobs").mkdir()
    (snapshot / "LICENSE").rename(tmp_path / "mine" / "blobs" / "license")
    (snapshot / "LICENSE").symlink_to("../../blobs/license")
    refused(snapshot, "link that leaves the bundle")


def test_what_a_hubs_tool_puts_next_to_the_files_is_tolerated(folder):
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "download" / "x.metadata").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "config").touch()
    (folder / "README.md").touch()
    (folder / ".gitattributes").symlink_to("/etc/passwd")  # never read
    assert is_unchanged(folder, Bundle.open(folder).manifest)
    assert set(build(folder).files) == set(CONTENT)
    for name in ("graphs/README.md", ".gitignore", "graphs/.cache"):
        (folder / name).touch()
        refused(folder, f"holds '{name}', which its manifest does not list")
        (folder / name).unlink()


def test_a_folder_behind_a_link(folder, tmp_path):
    shutil.move(folder / "graphs", tmp_path / "graphs")
    (folder / "graphs").symlink_to(tmp_path / "graphs")
    refused(folder, "'graphs'")


def test_a_link_inside_and_a_bundle_behind_a_link(folder, tmp_path):
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("graphs/ort-cpu-int8.onnx")
    refused(folder, "bytes, expected 0")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").touch()
    (tmp_path / "link").symlink_to(folder)
    assert Bundle.open(tmp_path / "link").root == folder.resolve()


def test_a_manifest_that_points_outside(folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    content = json.loads((folder / "manifest.json").read_bytes())
    content["files"]["../secret"] = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    body = (json.dumps({**content, "digest": "0" * 64}, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    (folder / "manifest.json").write_bytes(body.replace(b"0" * 64, digest, 1))
    refused(folder, r"'\.\./secret', expected a relative path")


def test_a_file_changed_after_opening_is_not_used(folder):
    bundle = Bundle.open(folder)
    (folder / "tokenizer/chat_template.jinja").write_bytes(b"{{ messages }} e")
    (folder / "profiles/wide.toml").unlink()
    with pytest.raises(BundleError, match="was changed after the bundle was opened"):
        _ = bundle.chat_template
    with pytest.raises(BundleError, match=r"wide\.toml"):
        bundle.profile("wide")


def test_seal_writes_last_and_leaves_nothing(folder):
    (folder / ".manifest.json.tmp").write_bytes(b"left by a run that was cut off")
    manifest = build(folder)
    assert Bundle.open(folder).manifest == manifest
    assert Manifest.from_bytes((folder / "manifest.json").read_bytes(), "m") == manifest
    sealed_at = (folder / "manifest.json").stat().st_mtime_ns
    assert all((folder / name).stat().st_mtime_ns <= sealed_at for name in CONTENT)


def test_seal_refuses_what_a_bundle_cannot_hold(folder, tmp_path):
    before = (folder / "manifest.json").read_bytes()
    (folder / "graphs/away").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="leaves the bundle"):
        build(folder)
    (folder / "graphs/away").unlink()
    (folder / "a\nb").touch()
    with pytest.raises(BundleError, match="path"):
        build(folder)
    (folder / "a\nb").unlink()
    with pytest.raises(BundleError, match="absent"):
        build(folder, profiles=["absent"])
    assert (folder / "manifest.json").read_bytes() == before
    Bundle.open(folder)


def test_write_manifest_does_not_hash_known_files_again(folder, monkeypatch):
    manifest = Bundle.open(folder).manifest
    hashed = []
    hash_files = manifest_writer.hash_files
    monkeypatch.setattr(manifest_writer, "hash_files", lambda paths: (hashed.extend(paths), hash_files(paths))[1])
    (folder / "graphs/late").write_bytes(b"new")
    known = {name: one for name, one in manifest.files.items() if not name.startswith("profiles/")}
    sealed = build(folder, known=known)
    assert {path.relative_to(folder.resolve()).as_posix() for path in hashed} == sealed.files.keys() - known.keys()
    assert sealed.files["graphs/late"].size == 3
    assert Bundle.open(folder).manifest == sealed


def test_rewrite_manifest_keeps_all_facts_but_the_files(folder):
    before = Bundle.open(folder).manifest
    (folder / "LICENSE").write_bytes(b"MIT")
    sealed = rewrite_manifest(folder, before, {name: one for name, one in before.files.items() if name != "LICENSE"})
    assert sealed.files["LICENSE"].size == 3 and sealed.digest != before.digest
    assert replace(sealed, files=before.files, digest="") == before
    assert Bundle.open(folder).manifest == sealed


def test_is_unchanged(folder):
    manifest = Bundle.open(folder).manifest
    assert is_unchanged(folder, manifest)
    (folder / "extra").touch()
    assert not is_unchanged(folder, manifest)
    (folder / "extra").unlink()
    later = (folder / "manifest.json").stat().st_mtime_ns + 10**9
    os.utime(folder / "LICENSE", ns=(later, later))
    assert not is_unchanged(folder, manifest)
    os.utime(folder / "LICENSE", ns=(0, 0))
    assert is_unchanged(folder, manifest)
    whole = (folder / "LICENSE").read_bytes()
    (folder / "LICENSE").write_bytes(whole[::-1][:-1] + b"~")  # of the same size
    os.utime(folder / "LICENSE", ns=(0, 0))
    assert not is_unchanged(folder, manifest)
    (folder / "LICENSE").write_bytes(whole)
    os.utime(folder / "LICENSE", ns=(0, 0))
    assert is_unchanged(folder, manifest)
    (folder / "LICENSE").write_bytes(b"x")
    os.utime(folder / "LICENSE", ns=(0, 0))
    assert not is_unchanged(folder, manifest)
    (folder / "LICENSE").unlink()
    assert not is_unchanged(folder, manifest)
    assert not is_unchanged(folder / "absent", manifest)


def test_an_unreadable_file(folder, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("medusa_runtime.bundle_files.hash_file", denied)  # permissions do not bind the superuser
    refused(folder, "cannot be read")


def test_a_pinned_bundle(folder):
    digest = Bundle.open(folder).manifest.digest
    assert Bundle.open(folder, expected_digest=digest).manifest.digest == digest
    with pytest.raises(BundleError, match=rf"has the digest {digest}, expected {'0' * 64}: it is not the bundle"):
        Bundle.open(folder, expected_digest="0" * 64)
    for wrong in ("", digest[:12], digest.upper(), digest + "\n"):
        with pytest.raises(BundleError, match="expected 64 hexadecimal digits"):
            Bundle.open(folder, expected_digest=wrong)
    build(folder, CONTENT | {"LICENSE": b"other"})
    with pytest.raises(BundleError, match=f"expected {digest}"):
        Bundle.open(folder, expected_digest=digest)


def test_what_is_too_large_is_not_read(folder, monkeypatch):
    bundle = Bundle.open(folder)
    for name, limit in (("tokenizer", 1), ("chat_template", 3), ("special_tokens", 3)):
        monkeypatch.setattr(f"medusa_runtime.bundle.MAX_{name.replace('chat_', '').upper()}", limit)
        with pytest.raises(BundleError, match=f"bytes, expected at most {limit}"):
            getattr(bundle, name)
    monkeypatch.setattr("medusa_runtime.bundle.MAX_PROFILE", 5)
    with pytest.raises(BundleError, match="bytes, expected at most 5"):
        bundle.profile("wide")


def test_a_tokenizer_changed_after_opening_is_not_used(folder):
    bundle = Bundle.open(folder)
    (folder / "tokenizer/tokenizer.json").write_bytes(b"[]")
    with pytest.raises(BundleError, match="was changed after the bundle was opened"):
        _ = bundle.tokenizer
    (folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        _ = bundle.tokenizer
