"""`medusa-export inspect`: check a bundle and show its contents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from medusa_profiles.drawing import draw_tree
from medusa_runtime.bundle import Bundle
from medusa_runtime.graph_check import DIFFERENCES

from medusa_exporter.cli.command import Command
from medusa_exporter.cli.options import digest_option
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import table
from medusa_exporter.graph_sizes import files_of_graph, graph_sizes
from medusa_exporter.output_kinds import SUMMARIES
from medusa_exporter.wording import counted

FP32_BYTES = 4  # size of one element of the KV cache


KIND = SUMMARIES["inspect"]


@click.command(name="inspect", cls=Command, example="medusa-export inspect bundle")
@click.argument("folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@digest_option
@click.option("--profile", "name", metavar="NAME", help="Draw this tree of the bundle in place of the whole contents.")
@json_option("the contents")
def command(folder: Path, name: str | None, expected_digest: str | None, results: Results) -> None:
    """Check every file of BUNDLE against its manifest, then show the contents of the bundle.

    The size of a graph is that of its file and of the weights that it uses. Graphs may share weights, so the sizes of
    the graphs can add up to more than the bundle. Exit code 1 if a file is missing or not the one that was written.
    """
    results.check(KIND, bundle=folder)
    bundle = Bundle.open(folder, weights=True, expected_digest=expected_digest)
    if name is not None:
        tree = bundle.profile(name)
        results.write(KIND, {"name": name, "paths": [list(path) for path in tree.paths]})
        results.echo(draw_tree(tree))
        return
    facts = describe(bundle)
    results.write(KIND, facts)
    results.echo(_text(facts))


def describe(bundle: Bundle) -> dict[str, Any]:
    """Return the contents of a bundle as JSON values; all sizes are in bytes."""
    manifest, model, sizes = bundle.manifest, bundle.model, graph_sizes(bundle)
    return {
        "bundle": str(bundle.root),
        "schema": manifest.schema,
        "digest": manifest.digest,
        "model": {**vars(model), "eos_token_ids": list(model.eos_token_ids)},
        "kv_bytes_per_token": {"fp32": model.kv_bytes_per_token(FP32_BYTES)},
        "heads": vars(bundle.heads),
        "graphs": {
            key: {
                **vars(graph),
                "size": sizes[key].size,
                "weights_size": sizes[key].weights,
                "shared_weights_size": sizes[key].shared_weights,
            }
            for key, graph in manifest.graphs.items()
        },
        "graph_checks": {
            file: {**vars(check), "steps": list(check.steps)} for file, check in manifest.graph_checks.items()
        },
        "engines": {
            path.stem: {**vars(engine), "targets": list(engine.targets)}
            for graph in manifest.graphs.values()
            for engine, path in bundle.engines(graph.backend, graph.precision)
        },
        "profiles": {
            name: {"nodes": tree.size, "depth": tree.depth, "source": tree.source}
            for name, tree in bundle.profiles().items()
        },
        "files": {path: facts.size for path, facts in manifest.files.items()},
        "size": sum(facts.size for facts in manifest.files.values()),
        "producer": manifest.producer,
    }


def _text(facts: dict[str, Any]) -> str:
    """Format what `describe` returns: facts of the model and the heads, then a table for each kind of content."""
    tables = (_graphs(facts), _engines(facts), _profiles(facts), _files(facts), _packages(facts))
    return "\n\n".join([_summary(facts), *filter(None, tables)])


def _summary(facts: dict[str, Any]) -> str:
    model = facts["model"]
    ends = ", ".join(map(str, model["eos_token_ids"])) or "none"
    return "\n".join(
        [
            f"bundle    {facts['bundle']}: {_size(facts['size'])}; every file matches the manifest",
            f"          digest {facts['digest']}",
            f"model     {model['name']} ({model['family']}): {model['layers']} layers, hidden size "
            f"{model['hidden_size']}",
            f"          {model['attention_heads']} attention heads and {model['kv_heads']} KV heads of size "
            f"{model['head_dim']}",
            f"          vocabulary of {model['vocab_size']:,} tokens, context of {model['context']:,} tokens",
            f"          end tokens: {ends}",
            f"KV cache  {facts['kv_bytes_per_token']['fp32']:,} bytes per token in fp32",
            *_heads(facts["heads"], model["vocab_size"]),
        ]
    )


def _heads(heads: dict[str, Any], vocab_size: int) -> list[str]:
    if not heads["count"]:
        return ["heads     none: plain decoding, or drafts that are copied from the text"]
    inputs = ["the hidden state", *(f"the input of layer {layer}" for layer in heads["taps"])]
    inputs += ["the token that the model has chosen"] if heads["conditioning"] == "root" else []
    trunk = f" after a gated block of width {heads['trunk']:,}" if heads["trunk"] else ""
    return [
        f"heads     {counted(heads['count'], 'head')} of {counted(heads['layers'], 'residual block')}{trunk}",
        f"          inputs: {', '.join(inputs)}",
        f"          each proposes {heads['top_k']} of {heads['draft_vocabulary'] or vocab_size:,} tokens",
    ]


def _graphs(facts: dict[str, Any]) -> str:
    headings = ("graph", "size", "of which shared", "default tree", "difference from the model")
    rows = [
        (
            key,
            _size(graph["size"]),
            _size(graph["shared_weights_size"]) if graph["shared_weights_size"] else "none",
            graph["profile"],
            _difference(key, facts["graph_checks"]),
        )
        for key, graph in facts["graphs"].items()
    ]
    return table(headings, rows, text=("graph", "default tree", "difference from the model"))


def _difference(key: str, checks: dict[str, dict[str, Any]]) -> str:
    """Format the largest difference that the build found between the files of a graph and the model."""
    found = [checks[file] for file in files_of_graph(key, checks)]
    run = [check for check in found if not check["not_run"]]
    if not run:
        reasons = sorted({check["not_run"] for check in found})
        return f"not measured: {'; '.join(reasons) or 'the build did not run the graph'}"
    worst = max(check[part] for check in run for part in DIFFERENCES)
    files = "" if len(run) == len(found) == 1 else f"; {len(run)} of {len(found)} files measured"
    return f"{worst:.1e} (limit {run[0]['limit']:.0e}{files})"


def _engines(facts: dict[str, Any]) -> str:
    if not facts["engines"]:
        return ""
    headings = ("engine", "size", "GPUs", "built with", "past tokens", "build time", "step")
    rows = [
        (
            name,
            _size(engine["size"]),
            ", ".join(engine["targets"]),
            f"{engine['flavour']} {engine['version']}",
            f"{engine['least']:,} to {engine['most']:,}",
            f"{engine['seconds']:.0f} s",
            "not measured" if engine["step_ms"] is None else f"{engine['step_ms']:.2f} ms",
        )
        for name, engine in sorted(facts["engines"].items())
    ]
    return table(headings, rows, text=("engine", "GPUs", "built with", "past tokens"))


def _profiles(facts: dict[str, Any]) -> str:
    trees = sorted(facts["profiles"].items())
    if not trees:
        return ""
    return table(("tree", "nodes", "depth"), [(name, str(tree["nodes"]), str(tree["depth"])) for name, tree in trees])


def _files(facts: dict[str, Any]) -> str:
    return table(("file", "size"), [(path, _size(size)) for path, size in sorted(facts["files"].items())])


def _packages(facts: dict[str, Any]) -> str:
    return table(("built with", "version"), sorted(facts["producer"].items()), text=("built with", "version"))


def _size(count: int) -> str:
    """Format a number of bytes in a suitable unit, powers of 1,000."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
