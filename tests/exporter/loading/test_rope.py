"""Which ropes are served, and how many tokens a bundle may be made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter import models
from medusa_exporter.loading.rope import MIN_CONTEXT, changes_at, check_rope, choose_context
from medusa_exporter.models import ModelSource, check_family
from medusa_runtime.errors import CapacityError, UnsupportedModelError

from .gguf_models import CASES, CONTEXT, with_keys, write, yarn

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.0, 4.0]}
SERVED: list[dict[str, Any]] = [
    {},
    {"rope_theta": 500000.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"rope_scaling": None},
    {"rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    {"rope_parameters": {"rope_type": "yarn", "factor": None}},
    {"rope_parameters": LLAMA3},
    {"rope_scaling": LONG},
    {"model_type": "phi3", "rope_scaling": {**LONG, "type": "su"}},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic' is not supported .*sequence length"),
    (
        {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        "RoPE type 'mrope' is not supported; expected",
    ),
    ({"rope_scaling": {"type": "su"}}, "RoPE type 'su' is not supported"),
    ({"rope_parameters": {"rope_type": "proportional"}}, "RoPE type 'proportional'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "separate RoPE parameters for full_attention"),
    ({"rope_scaling": [2.0]}, "expected an object"),
    ({"rope_scaling": {"type": "linear"}}, "linear RoPE with factor None, expected a number above 0"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "with factor '2'"),
    ({"rope_scaling": {"type": "yarn", "factor": 0}}, "with factor 0"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "with low_freq_factor None"),
    ({"rope_scaling": {**LONG, "long_factor": []}}, r"with long_factor \[\], expected a number above 0 for each pair"),
    # transformers reads the older name where a file has both
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
]


@pytest.mark.parametrize("config", SERVED, ids=str)
def test_a_rope_that_is_served(config: dict[str, Any]) -> None:
    check_rope(config, "tiny")


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=str)
def test_a_rope_that_is_not_served_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^tiny: .*{message}"):
        check_rope(config, "tiny")


@pytest.mark.parametrize(("config", "_message"), REFUSED, ids=str)
def test_it_is_refused_before_weights_are_read(config: dict[str, Any], _message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config), encoding="utf-8")
    with pytest.raises(UnsupportedModelError):
        check_family(ModelSource.resolve(str(tmp_path)))


def test_the_context_is_the_models_or_the_one_asked_for() -> None:
    config = {"max_position_embeddings": 4096}
    assert choose_context(config, None, "tiny") == 4096
    assert choose_context(config, 4096, "tiny") == 4096
    assert choose_context(config, MIN_CONTEXT, "tiny") == MIN_CONTEXT
    for wanted in (4097, MIN_CONTEXT - 1, 1):
        with pytest.raises(CapacityError, match=f"{wanted}: tiny supports up to 4096 tokens, .*at least {MIN_CONTEXT}"):
            choose_context(config, wanted, "tiny")


def test_yarn_reaches_to_its_factor_times_the_original_length() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {"max_position_embeddings": 32768, "rope_scaling": yarn}
    assert choose_context(config, None, "tiny") == 32768
    assert choose_context(config, 131072, "tiny") == 131072
    with pytest.raises(CapacityError, match="up to 131072"):
        choose_context(config, 131073, "tiny")


@pytest.mark.parametrize("place", ["config", "rope"])
def test_longrope_is_served_up_to_the_length_where_it_changes(place: str) -> None:
    original = {"original_max_position_embeddings": 4096}
    rope = LONG | (original if place == "rope" else {})
    config = {"max_position_embeddings": 131072, "rope_scaling": rope} | (original if place == "config" else {})
    assert changes_at(config) == 4096
    assert choose_context(config, 4096, "tiny") == 4096
    for wanted in (None, 4097):
        with pytest.raises(UnsupportedModelError, match=r"longrope uses other .* beyond 4096.*--context 4096"):
            choose_context(config, wanted, "tiny")
    assert (
        choose_context(config | {"rope_scaling": {**rope, "long_factor": LONG["short_factor"]}}, None, "tiny") == 131072
    )


@pytest.mark.parametrize("value", ["long", 0, 2048.5])
def test_a_length_that_is_none(value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"max_position_embeddings is .*expected a whole number"):
        choose_context({"max_position_embeddings": value}, None, "tiny")


def test_a_config_may_leave_its_length_to_the_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    assert models.choose_context(ModelSource.resolve(str(tmp_path)), None) == 2048


def test_a_gguf_files_context(tmp_path: Path) -> None:
    case = with_keys(CASES["llama"], **yarn(), context_length=256)
    source = ModelSource.resolve(str(write(case, tmp_path / "tiny.gguf")))
    assert models.choose_context(source, None) == 256
    assert models.choose_context(source, 200) == 200
    with pytest.raises(CapacityError, match=r"tiny\.gguf supports up to 256"):
        models.choose_context(source, 257)
    assert CONTEXT < MIN_CONTEXT  # a model may be smaller than what may be asked for
    small = ModelSource.resolve(str(write(CASES["llama"], tmp_path / "small.gguf")))
    assert models.choose_context(small, None) == CONTEXT
