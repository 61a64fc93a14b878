"""The files that commands write, and how each is recognised before it is overwritten, see `overwrite_check`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from medusa_profiles.profile import ProfileError
from medusa_profiles.toml import from_toml

from medusa_exporter.overwrite_check import MADE_BY, AnyKind, FolderKind, JsonKind, Kind, holds_only, starts_with

REFERENCE_FORMAT = "medusa-export reference 2"
SAVED_AS_ZIP = b"PK\x03\x04"  # the first bytes of a reference file of format 1
FITTED = "fitted on answers of "  # the start of `source` in the trees that heads-report writes
SEARCHED = "found by search-tree for "  # the start of `source` in the trees that search-tree writes
GENERATOR = '<meta name="generator" content="medusa-export report">'
CHECKPOINT = "checkpoint"  # the folder of a training that is not finished
PARTIAL = "partial"  # the folder of a distillation that is not finished
DATA_FORMAT = "medusa-distilled 1"
BATCH_ID = "medusa-batch-"  # the start of the `id` of every line that generate --batch-file writes


def _is_reference(file: Path) -> bool:
    marked = starts_with(b'{"__metadata__":{"format":"medusa-export reference ')
    older = starts_with(SAVED_AS_ZIP, b'"format": "medusa-export recording"')
    return marked(file) or older(file)


def _is_tree(source: str) -> Callable[[Path], bool]:
    """Return a test for files with a tree whose source begins so."""

    def test(file: Path) -> bool:
        try:
            return from_toml(file.read_text(encoding="utf-8"), str(file)).source.startswith(source)
        except ProfileError:
            return False

    return test


def _is_report(file: Path) -> bool:
    marked, older = starts_with(GENERATOR.encode()), starts_with(b": bench</title>", b"--series-6: ")
    return marked(file) or older(file)


def _is_batch(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_BATCH_START)) == _BATCH_START


def _is_batch_part(file: Path) -> bool:
    with file.open("rb") as opened:
        return _BATCH_START.startswith(opened.read(len(_BATCH_START)))  # its only line may be cut off


_BATCH_START = json.dumps({"id": BATCH_ID}).encode().removesuffix(b'"}')
BENCH = JsonKind("medusa-export bench", frozenset({"schema", "machine", "bundle", "settings", "results"}))
CALIBRATION = JsonKind("medusa-export calibrate", frozenset({"schema", "graphs"}))
COMPARE = JsonKind("medusa-export compare", frozenset({"bundle", "reference", "compared", "steps", "tensors"}))
VERIFY = JsonKind("medusa-export verify", frozenset({"bundle", "profiles", "answers", "differences", "quality"}))
HEADS_REPORT = JsonKind(
    "medusa-export heads-report", frozenset({"rows", "positions", "greedy", "accuracy", "vocabularies", "trees"})
)
SUMMARIES = {  # summaries that --json writes; they are recognised by the command that they name
    name: JsonKind(f"medusa-export {name} --json", frozenset({MADE_BY}))
    for name in (
        "build",
        "distill",
        "engines",
        "generate",
        "heads convert",
        "inspect",
        "profiles",
        "report",
        "search-tree",
        "train",
    )
}
REFERENCE = Kind("medusa-export compare --save", _is_reference)
REPORT = Kind("medusa-export report", _is_report)
TREE = Kind("medusa-export heads-report --write-profiles", _is_tree(FITTED))
SEARCHED_TREE = Kind("medusa-export search-tree", _is_tree(SEARCHED))
BATCH = Kind("medusa-export generate --batch-file", _is_batch)
BATCH_PART = Kind("medusa-export generate --batch-file", _is_batch_part)
REVIEW = Kind("medusa-export distill --review-out", lambda _file: False)  # people edit it: never overwritten

# Heads are recognised by their config, which appears together with the weights: no other layout has these keys.
_HEADS = JsonKind("medusa-export", frozenset({"medusa_num_heads", "medusa_conditioning"}))


def _are_weights(file: Path) -> bool:
    config = file.with_name("config.json")
    return config.is_file() and _HEADS.is_ours(config)


HEADS: dict[str, AnyKind] = {
    "config.json": Kind("medusa-export", _HEADS.is_ours),
    "medusa_lm_head.safetensors": Kind("medusa-export", _are_weights),
}
CONVERTED: dict[str, AnyKind] = {  # a training record is not overwritten: it would stay next to other heads
    **HEADS,
    "training.json": Kind("medusa-export heads convert", lambda _file: False),
}
_RECORD = JsonKind("medusa-export train", frozenset({"command", "settings", "data", "steps"}))


def _are_trained(file: Path) -> bool:
    record = file.with_name("training.json")
    return _are_weights(file) and record.is_file() and _RECORD.is_ours(record)


TRAINING: dict[str, AnyKind] = {
    **{name: Kind("medusa-export train", _are_trained) for name in HEADS},
    "training.json": _RECORD,
    **{
        f"{CHECKPOINT}{suffix}": FolderKind("medusa-export train", holds_only("state.safetensors", "state.json"))
        for suffix in ("", ".new", ".old")
    },
}
DATA_ARRAYS = ("tokens", "offsets", "answer", "temperature", "groups")


def _is_data(file: Path) -> bool:
    """Return whether a file is in the folder of a data set, complete or unfinished."""
    return _is_facts(file.with_name("meta.json")) or (file.parent / PARTIAL / "plan.json").is_file()


def _is_facts(file: Path) -> bool:
    if not file.is_file():
        return False
    content = json.loads(file.read_text(encoding="utf-8"))
    return isinstance(content, dict) and content.get("format") == DATA_FORMAT


def _is_partial(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    files = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    begun = not files or "plan.json" in files or _is_facts(folder.with_name("meta.json"))
    return begun and holds_only("plan.json", "batch-*.npz")(folder)


DATA: dict[str, AnyKind] = {
    **{f"{name}.npy": Kind("medusa-export distill", _is_data) for name in DATA_ARRAYS},
    "meta.json": Kind("medusa-export distill", _is_facts),
    PARTIAL: FolderKind("medusa-export distill", _is_partial),
}
