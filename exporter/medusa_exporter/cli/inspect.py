"""`medusa-export inspect`: check a bundle, then show what it holds."""

from __future__ import annotations

import json
from typing import Any

import click
from medusa_profiles.drawing import draw_tree
from medusa_runtime.bundle import Bundle
from medusa_runtime.graph_check import DIFFERENCES

from medusa_exporter.cli.options import digest_option

FP32_BYTES = 4  # of one element of the KV cache


@click.command()
@click.argument("folder", metavar="BUNDLE", type=click.Path())
@digest_option
@click.option("--profile", "name", metavar="NAME", help="Draw this tree instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(folder: str, name: str | None, as_json: bool, expected_digest: str | None) -> None:
    """Check the files of BUNDLE against its manifest, then show what it holds."""
    bundle = Bundle.open(folder, engines=True, expected_digest=expected_digest)
    if name is not None:
        tree = bundle.profile(name)
        click.echo(json.dumps({"name": name, "paths": tree.paths}) if as_json else draw_tree(tree))
        return
    facts = describe(bundle)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else "\n".join(_lines(facts)))


def describe(bundle: Bundle) -> dict[str, Any]:
    """Return the facts that `inspect` shows, as plain JSON values; sizes in bytes."""
    manifest, model = bundle.manifest, bundle.model
    return {
        "bundle": str(bundle.root),
        "schema": manifest.schema,
        "digest": manifest.digest,
        "model": {**vars(model), "eos_token_ids": list(model.eos_token_ids)},
        "kv_bytes_per_token": {"fp32": model.kv_bytes_per_token(FP32_BYTES)},
        "heads": vars(bundle.heads),
        "graphs": {
            key: {**vars(graph), "size": manifest.files[graph.file].size} for key, graph in manifest.graphs.items()
        },
        "graph_checks": {
            file: {**vars(check), "steps": list(check.steps)} for file, check in manifest.graph_checks.items()
        },
        "engines": {
            path.stem: {**vars(one), "targets": list(one.targets)}
            for graph in manifest.graphs.values()
            for one, path in bundle.engines(graph.backend, graph.precision)
        },
        "profiles": {
            name: {"nodes": tree.size, "depth": tree.depth, "source": tree.source}
            for name, tree in bundle.profiles().items()
        },
        "files": {path: facts.size for path, facts in manifest.files.items()},
        "size": sum(facts.size for facts in manifest.files.values()),
        "producer": manifest.producer,
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    model, heads = facts["model"], facts["heads"]
    files = sorted(facts["files"].items())
    sees = ["the hidden state", *(f"what layer {layer} reads" for layer in heads["taps"])]
    sees += ["the root token"] if heads["conditioning"] == "root" else []
    scores = heads["draft_vocabulary"] or model["vocab_size"]
    return [
        f"bundle    {facts['bundle']}, every file as its manifest says",
        f"          digest {facts['digest']}",
        f"model     {model['name']} ({model['family']}): {model['layers']} layers, hidden size {model['hidden_size']}, "
        f"{model['attention_heads']} attention heads and {model['kv_heads']} KV heads of {model['head_dim']}",
        f"          vocabulary {model['vocab_size']:,}, context {model['context']:,} tokens, "
        f"ends at token {' or '.join(map(str, model['eos_token_ids'])) or 'none'}",
        f"KV cache  {facts['kv_bytes_per_token']['fp32']:,} bytes a token in fp32",
        f"heads     {heads['count']} of {heads['layers']} ResBlocks"
        + (f" behind a gated block of {heads['trunk']:,}" if heads["trunk"] else ""),
        f"          they see {' and '.join(sees)}; each ranks {heads['top_k']} of {scores:,} tokens",
        *_section(
            "graphs",
            [
                (
                    key,
                    _size(graph["size"]),
                    graph["file"],
                    f"by default with {graph['profile']}",
                    _differs_by(key, facts["graph_checks"]),
                )
                for key, graph in facts["graphs"].items()
            ],
        ),
        *_section(
            "engines",
            [
                (
                    name,
                    _size(engine["size"]),
                    f"for {', '.join(engine['targets'])}, {engine['flavour']} {engine['version']}",
                    f"{engine['least']:,} to {engine['most']:,} rows, built in {engine['seconds']:.0f} s"
                    + ("" if engine["step_ms"] is None else f", {engine['step_ms']:.2f} ms a step"),
                )
                for name, engine in sorted(facts["engines"].items())
            ],
        ),
        *_section(
            "profiles",
            [(name, f"{p['nodes']} nodes", f"depth {p['depth']}") for name, p in sorted(facts["profiles"].items())],
        ),
        *_section("files", [("total", _size(facts["size"])), *((path, _size(size)) for path, size in files)]),
        *_section("producer", sorted(facts["producer"].items())),
    ]


def _differs_by(key: str, checks: dict[str, dict[str, Any]]) -> str:
    """Say how far a graph's numbers were from the model's: the worst of its files, and those that were not run."""
    found = {file: check for file, check in checks.items() if file.startswith((f"graphs/{key}.", f"graphs/{key}-"))}
    run = [check for check in found.values() if not check["not_run"]]
    files = "" if len(found) == 1 else f" ({len(run)} of {len(found)} files run)"
    if run:
        worst = max(check[part] for check in run for part in DIFFERENCES)
        return f"differs by {worst:.1e}, at most {run[0]['limit']:.0e} allowed{files}"
    reasons = sorted({check["not_run"] for check in found.values()})
    return f"not compared with the model: {'; '.join(reasons) or 'not by this build'}"


def _section(title: str, rows: list[tuple[str, ...]]) -> list[str]:
    """Lay rows out in columns under a title; the last column is not padded."""
    rows = rows or [("none",)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [title, *("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)]


def _size(count: int) -> str:
    """Write a number of bytes in the unit that suits it, powers of 1,000."""
    for unit, worth in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= worth:
            return f"{count / worth:.1f} {unit}"
    return f"{count} bytes"
