"""The manifest: what it writes it reads back, and nothing else is believed."""

import copy
import dataclasses
import hashlib
import json

import pytest
from medusa_runtime import manifest as module
from medusa_runtime.errors import BundleError
from medusa_runtime.facts import FileFacts, GraphFacts, HeadFacts, ModelFacts, state_size
from medusa_runtime.graph_check import GraphCheck
from medusa_runtime.manifest import Manifest

MODEL = ModelFacts("tiny", "llama", 30, 576, 9, 3, 64, 49152, 8192, (2, 0))
HEADS = HeadFacts(4, 1, "root", 10, (2, 1), 64, 20)
FILES = {
    "graphs/ort-cpu-fp32.onnx": FileFacts(7, "0a" * 32),
    "graphs/ort-cpu-fp32.data": FileFacts(2**40, "0b" * 32),
    "profiles/cpu-8.toml": FileFacts(0, "0c" * 32),
}
CHECK = GraphCheck(("prefill", "tree"), 1e-6, 2e-6, 0.0, 5e-5)
GRAPHS = {"ort-cpu-fp32": GraphFacts("ort-cpu", "fp32", "graphs/ort-cpu-fp32.onnx", "cpu-8")}


def make(**changes):
    parts = {"schema": 6, "producer": {"medusa-export": "0.1.0"}, "model": MODEL, "heads": HEADS, "graphs": GRAPHS}
    parts |= {"profiles": ("cpu-8",), "files": FILES, "sources": {"heads": "0d" * 32, "options": [1, None, {"é": 0.5}]}}
    parts |= {"graph_checks": {"graphs/ort-cpu-fp32.onnx": CHECK}}
    return Manifest(**parts | changes)


def forge(content):
    """Write any content canonically with a digest that is right for it: only the content itself can give it away."""
    body = (json.dumps({**content, "digest": "0" * 64}, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()
    return body.replace(b"0" * 64, hashlib.sha256(body).hexdigest().encode(), 1)


def content_with(path, value):
    content = copy.deepcopy(json.loads(make().to_bytes()))
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is DROP:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


DROP = object()
CHECKED = ("graph_checks", "graphs/ort-cpu-fp32.onnx")
CHECK_CONTENT = {"steps": ["tree"], "logits": 0.0, "keys": 0.0, "values": 0.0, "limit": 5e-5, "not_run": ""}


def test_round_trip():
    manifest = make()
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data, "m") == manifest
    assert Manifest.from_bytes(data, "m").to_bytes() == data
    assert data.endswith(b"}\n") and "é".encode() in data
    assert forge(json.loads(data)) == data, "the digest is over the bytes with 64 zeros in its place"
    assert data.startswith(b'{\n  "digest": "' + manifest.digest.encode() + b'"')


def test_a_graph_that_was_not_run_has_no_differences():
    assert GraphCheck(not_run="no kernel for bfloat16").differs_by == 0.0
    assert CHECK.differs_by == 2e-6
    manifest = make(graph_checks={"graphs/ort-cpu-fp32.onnx": GraphCheck(not_run="no kernel")})
    assert Manifest.from_bytes(manifest.to_bytes(), "m").graph_checks == manifest.graph_checks


def test_what_heads_see_of_a_token():
    assert state_size(MODEL, HEADS) == 3 * 576
    assert state_size(MODEL, HeadFacts(4, 1, "none", 10)) == 576


def test_a_bundle_without_heads():
    graphs = {"ort-cpu-fp32": dataclasses.replace(GRAPHS["ort-cpu-fp32"], profile="plain")}
    manifest = make(heads=HeadFacts.none(), profiles=(), graphs=graphs)
    assert Manifest.from_bytes(manifest.to_bytes(), "m") == manifest
    assert state_size(MODEL, manifest.heads) == 576
    with pytest.raises(
        BundleError, match=r"profiles is \('cpu-8',\), expected no trees, since the bundle has no heads"
    ):
        make(heads=HeadFacts.none(), graphs=graphs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", 1),
        ("layers", False),
        ("top_k", 10),
        ("trunk", 64),
        ("conditioning", "root"),
        ("taps", (0,)),
        ("taps", None),
        ("draft_vocabulary", 0),
    ],
)
def test_without_heads_nothing_is_known_of_them(name, value):
    with pytest.raises(BundleError, match=rf"heads\.{name}"):
        dataclasses.replace(HeadFacts.none(), **{name: value})


def test_sizes():
    assert MODEL.kv_row == 192
    assert MODEL.kv_bytes_per_token(4) == 2 * 30 * 192 * 4


def test_sources_compare_equal_after_reading():
    manifest = make(sources={"shape": (1, 2)})
    assert manifest.sources == {"shape": [1, 2]}
    assert Manifest.from_bytes(manifest.to_bytes(), "m") == manifest


def test_every_flipped_bit_and_every_cut_is_refused():
    data = make().to_bytes()
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(BundleError, match=r"m: .*rebuild it with medusa-export build"):
                Manifest.from_bytes(bytes(damaged), "m")
        with pytest.raises(BundleError):
            Manifest.from_bytes(data[:at], "m")
    for damaged in (data + b"\n", b"\n" + data, b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data[:-1]):
        with pytest.raises(BundleError):
            Manifest.from_bytes(damaged, "m")


def test_another_layout_with_a_right_digest_is_refused():
    body = json.dumps(json.loads(make().to_bytes()) | {"digest": "0" * 64}).encode()
    forged = body.replace(b"0" * 64, hashlib.sha256(body).hexdigest().encode())
    with pytest.raises(BundleError):
        Manifest.from_bytes(forged, "m")
    data = make().to_bytes().replace(b'"schema": 6,', b'"schema":  6,')
    body = data[:15] + b"0" * 64 + data[79:]
    forged = data[:15] + hashlib.sha256(body).hexdigest().encode() + data[79:]
    with pytest.raises(BundleError, match="form"):
        Manifest.from_bytes(forged, "m")


@pytest.mark.parametrize("schema", [0, 5, 7, "6", True, 6.0, None, [1]])
def test_wrong_schema_is_told_before_anything_else(schema):
    with pytest.raises(BundleError, match=r"schema .*reads 6; .*rebuild"):
        Manifest.from_bytes(json.dumps({"schema": schema, "digest": "?"}).encode(), "m")


BAD_PATHS = [
    "../x",
    "a/../b",
    "/etc/passwd",
    "a\\b",
    "C:/x",
    "a//b",
    "a/",
    "./a",
    "a/.",
    "",
    ".",
    "..",
    "a\nb",
    "a\x00b",
]
BAD_PATHS += ["\u202ea", "a" * 1001, "manifest.json"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_that_leave_the_bundle(path):
    facts = {"size": 1, "sha256": "00" * 32}
    with pytest.raises(BundleError, match="path"):
        Manifest.from_bytes(forge(content_with(["files"], {**content_with(["schema"], 6)["files"], path: facts})), "m")
    with pytest.raises(BundleError):
        Manifest.from_bytes(forge(content_with(["graphs", "ort-cpu-fp32", "file"], path)), "m")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["extra"], 1, "'extra'"),
        (["model"], DROP, "'model'"),
        (["model"], [], "model is"),
        (["model", "layers"], DROP, "'layers'"),
        (["model", "rope"], 1, "'rope'"),
        (["model", "layers"], 0, "model.layers is 0, expected"),
        (["model", "layers"], 30.0, "model.layers"),
        (["model", "layers"], True, "model.layers"),
        (["model", "layers"], "30", "model.layers"),
        (["model", "layers"], 10**400, "model.layers"),
        (["model", "hidden_size"], -1, "model.hidden_size"),
        (["model", "kv_heads"], 10, "kv_heads"),
        (["model", "kv_heads"], 4, "divisor"),
        (["model", "vocab_size"], 2**31, "model.vocab_size"),
        (["model", "context"], None, "model.context"),
        (["model", "name"], "", "model.name"),
        (["model", "name"], "\x1b[31mred", "model.name"),
        (["model", "family"], 3, "model.family"),
        (["model", "eos_token_ids"], [49152], "eos_token_ids"),
        (["model", "eos_token_ids"], [2, 2], "eos_token_ids"),
        (["model", "eos_token_ids"], [[2]], "eos_token_ids"),
        (["model", "eos_token_ids"], 2, "eos_token_ids"),
        (["heads", "count"], -1, "heads.count"),
        (["heads", "count"], 0, "heads.layers, without heads, is 1, expected a whole number from 0 to 0"),
        (["heads", "conditioning"], "both", "heads.conditioning"),
        (["heads", "conditioning"], [], "heads.conditioning"),
        (["heads", "top_k"], 21, "heads.top_k"),
        (["heads", "taps"], [30], "heads.taps"),
        (["heads", "taps"], [2, 2], "heads.taps"),
        (["heads", "taps"], 2, "heads.taps"),
        (["heads", "trunk"], -1, "heads.trunk"),
        (["heads", "draft_vocabulary"], 49153, "heads.draft_vocabulary"),
        (["heads", "draft_vocabulary"], 0, "heads.draft_vocabulary"),
        (["graphs"], {}, "graphs"),
        (["graphs"], None, "graphs"),
        (["graphs", "ort-cpu-fp32", "precision"], "fp16", "key of graphs"),
        (["graphs", "ort-cpu-fp32", "backend"], "ORT", "backend"),
        (["graphs", "ort-cpu-fp32", "file"], "graphs/other.onnx", "ort-cpu-fp32"),
        (["graphs", "ort-cpu-fp32", "file"], 1, "file"),
        (["graphs", "ort-cpu-fp32", "profile"], "cpu-9", "profile of graph ort-cpu-fp32"),
        (["graphs", "ort-cpu-fp32", "profile"], "../x", "profile"),
        (["profiles"], ["absent"], "absent"),
        (["profiles"], ["../cpu-8"], "profiles"),
        (["profiles"], ["cpu-8", "cpu-8"], "profiles"),
        (["profiles"], "cpu-8", "profiles"),
        (["profiles"], [{}], "profiles"),
        (["files"], [], "files"),
        (["files", "profiles/cpu-8.toml", "size"], -1, "size"),
        (["files", "profiles/cpu-8.toml", "size"], 2**63, "size"),
        (["files", "profiles/cpu-8.toml", "sha256"], "0A" * 32, "sha256"),
        (["files", "profiles/cpu-8.toml", "sha256"], "0a" * 32 + "\n", "sha256"),
        (["files", "profiles/cpu-8.toml"], "x", "cpu-8"),
        (["producer"], [], "producer"),
        (["producer", "torch"], 2, "producer.torch"),
        (["producer", "a\nb"], "2", "producer"),
        (["sources"], [], "sources"),
        (["graph_checks"], DROP, "'graph_checks'"),
        (["graph_checks"], [], "graph_checks"),
        (["graph_checks", "graphs/ort-cpu-int8.onnx"], CHECK_CONTENT, "one of the graphs in files"),
        (["graph_checks", "graphs/ort-cpu-fp32.data"], CHECK_CONTENT, "one of the graphs in files"),
        ([*CHECKED, "other"], 1, "'other'"),
        ([*CHECKED, "steps"], [], "steps is (), expected at least one"),
        ([*CHECKED, "steps"], "tree", "steps"),
        ([*CHECKED, "steps"], ["tree", "tree"], "steps"),
        ([*CHECKED, "steps"], ["a b"], "step"),
        ([*CHECKED, "logits"], None, "logits is None, expected a finite number"),
        ([*CHECKED, "keys"], -1e-9, "keys"),
        ([*CHECKED, "values"], 1, "values"),
        ([*CHECKED, "values"], "0.0", "values"),
        ([*CHECKED, "limit"], 1e-6, "largest difference is 2e-06, expected at most its limit, 1e-06"),
        ([*CHECKED, "not_run"], "no GPU", "no steps and no differences"),
        ([*CHECKED, "not_run"], None, "not_run"),
    ],
)
def test_false_claims_with_a_right_digest(path, value, message):
    with pytest.raises(BundleError) as caught:
        Manifest.from_bytes(forge(content_with(path, value)), "some/manifest.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("some/manifest.json: ")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{",
        b'{"schema": 6, "schema": 1}',
        b'{"schema": 6, "x": NaN}',
        b'{"schema": 6, "x": -Infinity}',
        b'{"schema": 6, "x": 1e999}',
        b'{"schema": 6, "digest": "\xc3\xa9"}',
        b'{"schema": 6, "x": ' + b"9" * 100_000 + b"}",
        b"[" * 1_000_000,
        b'{"schema": 6, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 200_000,
        b" " * (module.MAX_BYTES + 1),
    ],
)
def test_what_is_no_manifest(data):
    with pytest.raises(BundleError):
        Manifest.from_bytes(data, "m")


@pytest.mark.parametrize("depth", [50, 300, 500, 800, 950, 5000])
def test_nesting_in_sources_never_escapes_as_another_error(depth):
    inner = "[" * depth + "]" * depth
    text = make(sources={"x": "MARK"}).to_bytes().decode().replace('"MARK"', inner)
    zeros = text[:15] + "0" * 64 + text[79:]
    data = (text[:15] + hashlib.sha256(zeros.encode()).hexdigest() + text[79:]).encode()
    with pytest.raises(BundleError):
        Manifest.from_bytes(data, "m")


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), "\ud800", object()])
def test_sources_that_are_no_json(value):
    with pytest.raises(BundleError, match="JSON"):
        make(sources={"x": value})


def test_a_manifest_too_large_to_read_is_not_made(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 2000)
    with pytest.raises(BundleError, match="at most 2000"):
        make(sources={"x": "y" * 2000})


def test_a_stale_digest_is_refused():
    with pytest.raises(BundleError, match="digest"):
        dataclasses.replace(make(), producer={"medusa-export": "9"})
    assert dataclasses.replace(make(), producer={"medusa-export": "9"}, digest="").digest != make().digest


@pytest.mark.parametrize(("heads", "top_k", "fits"), [(256, 4096, True), (257, 4096, False), (1, 2**20 + 1, False)])
def test_heads_have_no_more_candidates_than_there_are_ids(heads, top_k, fits):
    if fits:
        assert HeadFacts(heads, 1, "none", top_k).count == heads
    else:
        with pytest.raises(BundleError, match=rf"heads.top_k is {top_k}, expected a whole number from 1 to"):
            HeadFacts(heads, 1, "none", top_k)
