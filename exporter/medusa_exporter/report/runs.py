"""Reads what `medusa-export bench --json` wrote, and checks it before anything is drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NoReturn

from medusa_runtime.errors import BundleError, MedusaError
from medusa_runtime.field_checks import check_object, check_text, refuse

from medusa_exporter.bench.results import SCHEMA
from medusa_exporter.report.results import BenchResult, check_figure

REMEDY = "give files that medusa-export bench --json wrote"
NEEDED = {  # what the page tells of a run
    "machine": ("cpu", "threads", "platform"),
    "versions": ("python",),
    "prompts": ("file", "count"),
    "settings": ("accept", "forced"),
    "bundle": ("model", "digest"),
    "backends": (),
    "failures": (),
}
TOLD, MEASURED = ("device", "library", "version", "precision"), ("weights", "row", "bandwidth")  # of a backend


class ReportError(MedusaError):
    """A file that is no bench's, or does not go with the others."""


@dataclass(frozen=True)
class BenchRun:
    """One file: where it was measured and its cells. letter: what the page calls it. The rest is as in the JSON."""

    letter: str
    file: str
    bundle: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    prompts: Mapping[str, Any]
    settings: Mapping[str, Any]
    backends: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, str]
    cells: tuple[BenchResult, ...]

    @property
    def model(self) -> str:
        """Its name."""
        return str(self.bundle["model"])

    @property
    def forced(self) -> Mapping[str, str] | None:
        """File and model of the recording that acceptance was taken from, None where the heads decided."""
        found: Mapping[str, str] | None = self.settings["forced"]
        return found

    def device(self, backend: str) -> str:
        """What a backend ran on."""
        return str(self.backends[backend]["device"])


def read_runs(files: Sequence[Path]) -> list[BenchRun]:
    """Read files of one model, each once. Raises ReportError in one sentence for what cannot be on one page."""
    if len(files) > len(ascii_uppercase):
        raise ReportError(f"got {len(files)} files, expected {len(ascii_uppercase)} at most; make several reports")
    runs: list[BenchRun] = []
    seen: dict[str, Path] = {}
    for letter, file in zip(ascii_uppercase, files, strict=False):
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ReportError(f"{file} cannot be read: {error}; {REMEDY}") from None
        digest = hashlib.sha256(data).hexdigest()
        if digest in seen:
            raise ReportError(f"{file} is the same run as {seen[digest]}; name each once")
        seen[digest] = file
        run = _run(letter, file, data)
        if runs and run.model != runs[0].model:
            raise ReportError(
                f"{file} measures {run.model}, {files[0]} measures {runs[0].model}; make a report of each model"
            )
        runs.append(run)
    return runs


def _run(letter: str, file: Path, data: bytes) -> BenchRun:
    def number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        content = json.loads(data.decode(), parse_constant=number)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{file} is not valid JSON: {error}; {REMEDY}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        raise ReportError(f"{file} has schema {schema!r:.40}, this version reads {SCHEMA}; {REMEDY}")
    try:
        return _checked(letter, file.name, content)
    except KeyError as error:
        raise ReportError(f"{file} lacks {error.args[0]!r}; {REMEDY}") from None
    except BundleError as error:
        raise ReportError(f"{file}: {error}; {REMEDY}") from None


def _checked(letter: str, name: str, content: dict[str, Any]) -> BenchRun:
    """Raises KeyError for what is lacking, BundleError for what is wrong."""
    parts: dict[str, dict[str, Any]] = {}
    for part, keys in NEEDED.items():
        parts[part] = check_object(part, content[part])
        for key in keys:
            _ = parts[part][key]
    check_text("bundle.model", parts["bundle"]["model"])
    check_text("bundle.digest", parts["bundle"]["digest"])
    for backend, given in parts["backends"].items():
        facts = check_object(f"backends.{backend}", given)
        for key in TOLD:
            check_text(f"backends.{backend}.{key}", facts[key])
        for key in MEASURED:
            check_figure(f"backends.{backend}.{key}", facts[key])
        _ = facts["driver"], facts["capability"]
    if parts["settings"]["forced"] is not None:
        forced = check_object("settings.forced", parts["settings"]["forced"])
        _ = forced["file"], forced["model"]
    results = content["results"]
    if not isinstance(results, list) or not results:
        refuse("results", results, "a list of at least one")
    cells = tuple(BenchResult.checked(letter, f"results[{number}]", result) for number, result in enumerate(results))
    for cell in cells:
        if cell.backend not in parts["backends"]:
            refuse("a result's backend", cell.backend, f"one of {', '.join(parts['backends']) or 'none'}")
    return BenchRun(letter, name, cells=cells, **parts)
