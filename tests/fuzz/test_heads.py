"""Mutated files of heads, of every published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from ..exporter.heads import published
from . import mutations
from .child import Child
from .tally import Tally, run_cases


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with heads of each layout."""
    folder = tmp_path_factory.mktemp("fuzz-heads")
    places = folder / "layouts"
    published.write(places / "authors", published.authors(), "medusa_lm_head.safetensors", {"medusa_num_layers": 1})
    published.write(places / "tensorrt-llm", published.tensorrt_llm())
    published.write(places / "vllm", published.vllm(), config={"architectures": ["MedusaModel"]})
    own = published.authors(prefix="medusa_head.")
    published.write_shards(places / "shards", {"a.safetensors": own, "b.safetensors": published.decoder()})
    return folder


def test_heads(state: Path, tallies: list[Tally]) -> None:
    """Each mutated folder of heads is refused, or gives the numbers that stand in its files."""
    scratch = state.parent / f"{state.name}-scratch"
    scratch.mkdir()
    files = [(layout.name, file.name) for layout in (state / "layouts").iterdir() for file in layout.iterdir()]
    tally = run_cases(
        "heads", Child("heads_cases", state, scratch), cases(sorted(files)), 2_000, 80, lambda _one: False
    )
    tallies.append(tally)
    assert sum(tally.counts.values()) >= 50
    assert not tally.findings, "\n".join(json.dumps(one) for one in tally.findings[:12])
    assert tally.growth < 300


def cases(files: list[tuple[str, str]]) -> st.SearchStrategy[dict[str, Any]]:
    """A layout, and mutations of its files; those of headers are what a loader believes."""

    def of(place: tuple[str, str]) -> st.SearchStrategy[dict[str, Any]]:
        layout, name = place
        kinds = [mutations.bytewise, *([mutations.structured] * 2 if name.endswith(".json") else [headers] * 2)]
        one = st.tuples(st.just(name), st.one_of(kinds).map(mutations.to_json)).map(list)
        return st.fixed_dictionaries({"layout": st.just(layout), "mutations": st.lists(one, min_size=1, max_size=2)})

    return st.sampled_from(files).flatmap(of)


headers = mutations.structured.map(lambda mutation: mutation | {"kind": "header"})
