"""The guide to batch files names every field of a body that the code reads, ignores or refuses by its value."""

import re

from medusa_exporter.batch.answering import MAX_FAILURES
from medusa_runtime.openai_format.fields import _IGNORED, _NOT_SUPPORTED, _ONLY, _READ, PARAMETERS
from medusa_runtime.sampling_params import MAX_LOGPROBS

from .pages import ROOT

PAGE = (ROOT / "docs/guides/batch-files.md").read_text(encoding="utf-8")


def fields_section():
    return PAGE.partition("## Fields of a body")[2].partition("### Defaults")[0]


def test_every_field_is_named_and_no_other():
    read = {"model", *PARAMETERS, *(name for names in _READ.values() for name in names)}
    named = set(re.findall(r"`(\w+)[`:]", fields_section())) - {"null"}
    refused = {"audio", "functions", "reasoning_effort"}
    assert refused <= set(_NOT_SUPPORTED)
    assert named == read | set(_IGNORED) | set(_ONLY) | refused | {"true", "false"} & named


def test_numbers_are_those_of_the_code():
    assert f"up to {MAX_LOGPROBS} most likely tokens" in fields_section()
    assert f"If {MAX_FAILURES} requests in a row" in " ".join(PAGE.split())
