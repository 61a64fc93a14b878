"""The page: complete, without network access, its text escaped, its plots drawn from the results."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.report import plots
from medusa_exporter.report.page import number, render_page, span
from medusa_exporter.report.ratios import Ratio, ReportData
from medusa_exporter.report.runs import BenchRun, read_runs
from medusa_runtime.errors import MissingExtraError

from .factories import content, written


def runs(folder: Path, *contents: dict[str, Any]) -> list[BenchRun]:
    return read_runs([written(folder / f"{at}.json", one) for at, one in enumerate(contents)])


class Outline(HTMLParser):
    """Tags that were opened and not closed, ids, headings, and everything that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.tags: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attributes:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {value}")
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_one_file_that_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    text = render_page(runs(tmp_path, content({"ort-cuda": 2.0, "tensorrt": 1.0})))
    found = Outline(text)
    assert found.open == []
    assert found.fetched == []
    assert not found.tags["script"] and not found.tags["link"] and not found.tags["img"]
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert found.tags["svg"] == 4
    assert not [name for name, count in found.ids.items() if count > 1]
    assert found.tags["tr"] == 1 + 12 + 1 + 2
    for plot in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        ElementTree.fromstring(plot)  # well formed


def test_ratios_and_results_are_shown(tmp_path: Path) -> None:
    text = " ".join(render_page(runs(tmp_path, content({"ort-cuda": 2.0, "tensorrt": 1.0}))).split())
    assert '2.50×</div> <div class="range">chain-2 over its own plain decoding (2.50 to 2.50, median of 2' in text
    assert '<h3>tensorrt fp16 ÷ ort-cuda fp16</h3> <div class="big">2.00×' in text
    assert "1.25× over the fastest plain decoding on that device" in text
    assert "580.65 (CUDA 13.0)" in text
    assert "†" not in text
    assert "Forced" not in text


def test_ratios_between_runs_are_marked_and_explained(tmp_path: Path) -> None:
    other = content({"tensorrt": 1.0}, device="RTX 3060")
    other["prompts"]["file"] = "others.jsonl"
    text = render_page(runs(tmp_path, content({"ort-cuda": 2.0}), other, content({"ort-cpu": 1.5})))
    assert "B: tensorrt fp16 ÷ A: ort-cuda fp16†" in text
    assert "on different devices" in text
    assert "† The two sides were measured in different runs." in text
    assert "different prompt files (prompts.jsonl, others.jsonl)" in text
    assert "1.88×" in text  # A's tree over C's plain decoding, on one device
    assert "fastest plain decoding on that device†" in text


def test_forced_acceptance_and_failures_come_first(tmp_path: Path) -> None:
    given = content({"ort-cuda": 2.0})
    given["settings"] = {"accept": "forced", "forced": {"file": "real.json", "model": "real"}}
    given["failures"] = {"tensorrt": "backend tensorrt: its process died"}
    text = render_page(runs(tmp_path, given))
    assert text.index("Forced acceptance.") < text.index('class="cards"')
    assert "as in a recorded run of real" in text
    assert "backend tensorrt: its process died" in text
    assert "Different answers." not in text
    given["results"][1]["mismatches"] = 2
    assert "0.json: 2 answers differ from those of plain decoding" in render_page(runs(tmp_path, given))
    assert "(not compared where acceptance was forced)" in text


def test_text_from_the_files_is_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert('$x$ & y')</script>"
    given = content({"ort-cuda": 2.0})
    given["bundle"]["model"] = given["machine"]["cpu"] = nasty
    given["backends"]["ort-cuda"]["device"] = nasty
    for result in given["results"]:
        if result["profile"] == "pair":
            result["profile"] = nasty
    text = render_page(runs(tmp_path, given))
    assert not Outline(text).tags["script"]
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 6  # the plots' too


def test_empty_plots_are_left_out(tmp_path: Path) -> None:
    given = content({"ort-cpu": 2.0}, (None,), bandwidth=None)
    for result in given["results"]:
        for name in ("tokens_per_step", "overhead", "speedup", "tokens_per_second", "tpot_ms", "mean_past_length"):
            result[name] = None
        result["step_ms"] = dict.fromkeys(result["step_ms"])
    data = ReportData(runs(tmp_path, given))
    assert plots.throughput(data) is plots.latency(data) is plots.first_token(data) is None
    text = render_page([*data.runs.values()])
    assert "as is + 13" in text
    assert Outline(text).tags["svg"] == 1


def drawn(svg: str) -> str:
    """The text in a plot."""
    return " ".join("".join(one.itertext()) for one in ElementTree.fromstring(svg).iter() if one.tag.endswith("text"))


def test_plots_show_the_results_in_the_page_s_colours(tmp_path: Path) -> None:
    data = ReportData(runs(tmp_path, content({"ort-cuda": 2.0, "tensorrt": 1.0})))
    rates, latency, trees = plots.throughput(data), plots.latency(data), plots.tree_sizes(data)
    assert rates is not None
    assert latency is not None
    assert trees is not None
    assert "500" in drawn(rates) and "×2.50" in drawn(rates)  # tokens per second of plain decoding, the tree's speed-up
    assert "ort-cuda fp16, plain" in drawn(rates) and "tensorrt fp16, chain-2" in drawn(rates)
    assert "memory bound" in drawn(latency) and "tokens in the KV cache" in drawn(latency)
    assert {"tokens per step", "overhead: step time", "speed-up"} <= set(
        re.findall("tokens per step|overhead: step time|speed-up", drawn(trees))
    )
    for plot in (rates, latency, trees):
        assert "var(--series-1)" in plot and "currentColor" in plot
        assert not re.search(r"#0[1-4]0", plot)
    assert plots.throughput(data) == rates  # the same figures, the same file


def test_numbers_have_about_three_digits() -> None:
    assert [number(value) for value in (None, 0.123, 9.999, 12.34, 1234.5)] == ["–", "0.12", "10.00", "12.3", "1,234"]
    assert span(Ratio(2.0, 1.0, 3.0, 1)) == ""
    assert span(Ratio(2.0, 1.0, 3.0, 4)) == " (1.00 to 3.00, median of 4 cases)"


def test_without_matplotlib_the_pip_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib is not installed .*pip install 'medusa-export\[export\]'"):
        render_page(runs(tmp_path, content({"ort-cuda": 2.0})))
