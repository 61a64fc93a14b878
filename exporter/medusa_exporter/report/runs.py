"""Reads the JSON files of `medusa-export bench`, and checks them before anything is drawn."""

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

from medusa_exporter.bench.schema import SCHEMA
from medusa_exporter.report.results import BenchResult, check_metric

REMEDY = "give files that medusa-export bench --json wrote"
REQUIRED = {  # the parts of a file that the page shows
    "machine": ("cpu", "threads", "platform"),
    "versions": ("python",),
    "prompts": ("file", "count"),
    "settings": ("accept", "forced"),
    "bundle": ("model", "digest"),
    "backends": (),
    "failures": (),
}
BACKEND_TEXTS = ("device", "library", "version", "precision")
BACKEND_METRICS = ("weight_bytes", "kv_bytes_per_token", "memory_bytes_per_second")


class ReportError(MedusaError):
    """A file is not a benchmark's, or cannot be on one page with the other files."""


@dataclass(frozen=True)
class BenchRun:
    """One JSON file of a benchmark, by the keys of the JSON; `letter` is the run's name on the page."""

    letter: str
    file: str
    bundle: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    prompts: Mapping[str, Any]
    settings: Mapping[str, Any]
    backends: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, str]
    results: tuple[BenchResult, ...]

    @property
    def model(self) -> str:
        """The name of the model."""
        return str(self.bundle["model"])

    @property
    def forced(self) -> Mapping[str, str] | None:
        """File and model of the recording that forced the acceptance; None where the model decided."""
        found: Mapping[str, str] | None = self.settings["forced"]
        return found

    def device(self, backend: str) -> str:
        """Return the name of the device that a backend ran on."""
        return str(self.backends[backend]["device"])


def read_runs(files: Sequence[Path]) -> list[BenchRun]:
    """Read the files of one model.

    Raises:
        ReportError: A file is not a benchmark's, is given twice, or measures another model; in one sentence.
    """
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
        run = _parse_run(letter, file, data)
        if runs and run.model != runs[0].model:
            raise ReportError(
                f"{file} measures {run.model}, {files[0]} measures {runs[0].model}; make a report of each model"
            )
        runs.append(run)
    return runs


def _parse_run(letter: str, file: Path, data: bytes) -> BenchRun:
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        content = json.loads(data.decode(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{file} is not valid JSON: {error}; {REMEDY}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        again = "; measure again with this version" if type(schema) is int else ""
        raise ReportError(f"{file} has schema {schema!r:.40}, expected {SCHEMA}{again}; {REMEDY}")
    try:
        return _check_run(letter, file.name, content)
    except KeyError as error:
        raise ReportError(f"{file} lacks {error.args[0]!r}; {REMEDY}") from None
    except BundleError as error:
        raise ReportError(f"{file}: {error}; {REMEDY}") from None


def _check_run(letter: str, name: str, content: dict[str, Any]) -> BenchRun:
    """Check all values: KeyError for a missing one, BundleError for a wrong one."""
    parts: dict[str, dict[str, Any]] = {}
    for part, keys in REQUIRED.items():
        parts[part] = check_object(part, content[part])
        for key in keys:
            _ = parts[part][key]
    check_text("bundle.model", parts["bundle"]["model"])
    check_text("bundle.digest", parts["bundle"]["digest"])
    for backend, values in parts["backends"].items():
        facts = check_object(f"backends.{backend}", values)
        for key in BACKEND_TEXTS:
            check_text(f"backends.{backend}.{key}", facts[key])
        for key in BACKEND_METRICS:
            check_metric(f"backends.{backend}.{key}", facts[key])
        _ = facts["driver"], facts["capability"]
    if parts["settings"]["forced"] is not None:
        forced = check_object("settings.forced", parts["settings"]["forced"])
        _ = forced["file"], forced["model"]
    found = content["results"]
    if not isinstance(found, list) or not found:
        refuse("results", found, "a list of at least one")
    results = tuple(BenchResult.from_json(letter, f"results[{number}]", result) for number, result in enumerate(found))
    for result in results:
        if result.backend not in parts["backends"]:
            refuse("a result's backend", result.backend, f"one of {', '.join(parts['backends']) or 'none'}")
    return BenchRun(letter, name, results=results, **parts)
