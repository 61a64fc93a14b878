"""Mutations of file contents: hypothesis strategies that describe them as JSON, and the functions that apply them.

A description can be sent to a child process and printed, so that every failure can be run again by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import tomli_w
from hypothesis import strategies as st

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Mutation = dict[str, Any]

LARGE = 2**63
HOSTILE_TEXTS = ("", "\0", "../../etc/passwd", "/etc/passwd", "a" * 70_000, "\u202e", "fp32", "plain", "ort-cpu", "NaN")
HOSTILE_JINJA = (
    "{{ '' . __class__.__mro__ }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'x'.center(10 ** 9) }}",
    "{% set x %}{% for i in range(99999) %}{{ messages }}{% endfor %}{% endset %}",
    "{{ raise_exception('no') }}",
    "{{ messages[99].content }}",
    "{%",
    "{{ ([[]] * 9999) | tojson(indent=9999) }}",
)
positions = st.integers(0, 2**31)

numbers = st.sampled_from([-1, 0, 1, 2, 3, 7, 64, 255, 4096, 2**31 - 1, 2**31, LARGE, -LARGE, 10**400, 0.5, 1e308])
scalars = st.one_of(numbers, st.none(), st.booleans(), st.sampled_from(HOSTILE_TEXTS), st.text(max_size=8))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)

flips = st.fixed_dictionaries(
    {"kind": st.just("flip"), "places": st.lists(st.tuples(positions, st.integers(1, 255)), min_size=1, max_size=8)}
)
cuts = st.fixed_dictionaries({"kind": st.just("cut"), "at": positions})
additions = st.fixed_dictionaries(
    {"kind": st.just("add"), "at": positions, "bytes": st.binary(min_size=1, max_size=64)}
)
zeros = st.fixed_dictionaries({"kind": st.just("zero"), "at": positions, "count": st.integers(1, 4096)})
repeats = st.fixed_dictionaries({"kind": st.just("repeat"), "at": positions, "count": st.integers(1, 512)})
swaps = st.fixed_dictionaries({"kind": st.just("swap"), "other": positions})
removals = st.just({"kind": "remove"})
# something else in a file's place, or next to it, where the manifest lists nothing
foreign = st.fixed_dictionaries(
    {
        "kind": st.just("place"),
        "as": st.sampled_from(["folder", "pipe", "/etc/passwd", "/dev/zero", "../..", "manifest.json", "nowhere", "."]),
        "beside": st.just("{name}"),
    }
) | st.fixed_dictionaries(
    {
        "kind": st.just("place"),
        "as": st.sampled_from(["file", "pipe", "/etc/passwd", "manifest.json"]),
        "beside": st.sampled_from(["{name}.tmp", "{name}~", "graphs/.hidden", "extra", "profiles/tree-9.toml"]),
    }
)
bytewise = st.one_of(flips, cuts, additions, zeros, repeats, swaps)

structured = st.fixed_dictionaries(
    {
        "kind": st.just("structure"),
        "path": st.lists(positions, min_size=1, max_size=5),
        "action": st.sampled_from(["replace", "replace", "replace", "delete", "rename", "insert", "move"]),
        "value": values,
    }
)
templates = st.fixed_dictionaries({"kind": st.just("text"), "at": positions, "insert": st.sampled_from(HOSTILE_JINJA)})
graphs = st.fixed_dictionaries(
    {
        "kind": st.just("onnx"),
        "part": st.sampled_from(
            ["attribute", "operator", "edge", "initializer", "external", "external", "input", "output", "opset", "drop"]
        ),
        "index": positions,
        "within": positions,
        "value": st.one_of(numbers.filter(lambda one: isinstance(one, int)), st.sampled_from(HOSTILE_TEXTS)),
    }
)


def to_json(mutation: Mutation) -> Mutation:
    """Bytes as hexadecimal text."""
    return {key: value.hex() if isinstance(value, bytes) else value for key, value in mutation.items()}


def apply(mutation: Mutation, data: bytes, name: str, others: Mapping[str, bytes]) -> bytes:
    """Return the mutated content of the file `name`; others: the contents of all files, by name."""
    kind = mutation["kind"]
    if kind == "structure":
        return _structure(mutation, data, name)
    if kind == "onnx":
        return _onnx(mutation, data)
    if kind == "header":
        return _header(mutation, data)
    return BYTEWISE[kind](mutation, data, others)


def _flip(mutation: Mutation, data: bytes, _others: Mapping[str, bytes]) -> bytes:
    changed = bytearray(data)
    for at, mask in mutation["places"]:
        if changed:
            changed[at % len(changed)] ^= mask
    return bytes(changed)


def _cut(mutation: Mutation, data: bytes, _others: Mapping[str, bytes]) -> bytes:
    return data[: mutation["at"] % (len(data) + 1)]


def _add(mutation: Mutation, data: bytes, _others: Mapping[str, bytes]) -> bytes:
    at = mutation["at"] % (len(data) + 1)
    return data[:at] + bytes.fromhex(mutation["bytes"]) + data[at:]


def _zero(mutation: Mutation, data: bytes, _others: Mapping[str, bytes]) -> bytes:
    at = mutation["at"] % (len(data) + 1)
    count = min(mutation["count"], len(data) - at)
    return data[:at] + bytes(count) + data[at + count :]


def _repeat(mutation: Mutation, data: bytes, _others: Mapping[str, bytes]) -> bytes:
    at = mutation["at"] % (len(data) + 1)
    return data[: at + mutation["count"]] + data[at:]


def _swap(mutation: Mutation, data: bytes, others: Mapping[str, bytes]) -> bytes:
    names = sorted(others)
    return others[names[mutation["other"] % len(names)]] if names else data[::-1]


def _text(mutation: Mutation, data: bytes, _others: Mapping[str, bytes]) -> bytes:
    at = mutation["at"] % (len(data) + 1)
    return data[:at] + mutation["insert"].encode() + data[at:]


BYTEWISE: dict[str, Callable[[Mutation, bytes, Mapping[str, bytes]], bytes]] = {
    "flip": _flip,
    "cut": _cut,
    "add": _add,
    "zero": _zero,
    "repeat": _repeat,
    "swap": _swap,
    "text": _text,
}


def _structure(mutation: Mutation, data: bytes, name: str) -> bytes:
    """Change one value somewhere in a JSON or TOML file."""
    try:
        content = tomllib.loads(data.decode()) if name.endswith(".toml") else json.loads(data)
    except ValueError:
        return data[::-1]
    content = changed(content, mutation)
    if not name.endswith(".toml"):
        return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"
    try:
        return tomli_w.dumps(content).encode()
    except (TypeError, ValueError, AttributeError):  # JSON that TOML cannot say
        return json.dumps(content).encode()


def changed(content: Any, mutation: Mutation) -> Any:
    """Return JSON content with one value, found by the numbers in `path`, replaced, deleted, renamed or moved."""
    place, key, parent = content, None, None
    for number in mutation["path"]:
        if isinstance(place, dict) and place:
            parent, key = place, sorted(place)[number % len(place)]
        elif isinstance(place, list) and place:
            parent, key = place, number % len(place)
        else:
            break
        place = parent[key]
    value, action = mutation["value"], mutation["action"]
    if parent is None:
        return value
    if action == "delete":
        del parent[key]
    elif action == "rename" and isinstance(parent, dict):
        parent[str(value)[:99]] = parent.pop(key)
    elif action == "insert":
        parent.update({str(value)[:99]: place}) if isinstance(parent, dict) else parent.insert(key, value)
    elif action == "move" and len(parent) > 1:
        others = [one for one in (parent if isinstance(parent, dict) else range(len(parent))) if one != key]
        parent[key] = parent[others[mutation["path"][0] % len(others)]]
    else:
        parent[key] = value
    return content


def _onnx(mutation: Mutation, data: bytes) -> bytes:
    """Change one thing in a graph that stays a protocol buffer."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError):
        return data[::-1]
    graph, value = model.graph, mutation["value"]
    number = value if isinstance(value, int) else len(value)
    number = max(-(2**62), min(number, 2**62))

    def pick(items: Any, at: int) -> Any:
        return items[at % len(items)] if len(items) else None

    node = pick(graph.node, mutation["index"])
    weight = pick(graph.initializer, mutation["index"])
    part = mutation["part"]
    if part == "attribute" and (attribute := pick(node.attribute, mutation["within"])) is not None:
        attribute.i, attribute.f = number, float(number)
        if attribute.ints:
            attribute.ints[mutation["within"] % len(attribute.ints)] = number
    elif part == "operator":
        node.op_type = pick(graph.node, mutation["within"]).op_type
    elif part == "edge" and node.input:
        node.input[mutation["within"] % len(node.input)] = pick(pick(graph.node, mutation["within"]).output, 0)
    elif part == "initializer" and weight is not None:
        if mutation["within"] % 2:
            weight.data_type = number % 23
        elif weight.dims:
            weight.dims[mutation["within"] % len(weight.dims)] = number
    elif part == "external":
        outside = [one for one in graph.initializer if one.external_data]
        if (weight := pick(outside, mutation["index"])) is not None:
            pick(weight.external_data, mutation["within"]).value = str(value)
    elif part in ("input", "output"):
        one = pick(graph.input if part == "input" else graph.output, mutation["index"])
        if mutation["within"] % 2 or not one.type.tensor_type.shape.dim:
            one.name = f"{one.name}_{str(value)[:9]}"
        else:
            pick(one.type.tensor_type.shape.dim, mutation["within"] // 2).dim_value = number
    elif part == "opset":
        pick(model.opset_import, mutation["within"]).version = number
    elif part == "drop" and node is not None:
        graph.node.remove(node)
    return bytes(model.SerializeToString())


def _header(mutation: Mutation, data: bytes) -> bytes:
    """Change one value in the JSON header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    try:
        stated = json.loads(data[8 : 8 + length])
    except ValueError:
        return data[::-1]
    header = json.dumps(changed(stated, mutation)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
