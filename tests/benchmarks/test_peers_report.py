"""Tables of peers.py: what is compared with what."""

from pathlib import Path

import pytest
from peers_report import class_rows, plot, print_tables, repeated, system_rows
from peers_results import Results

from .factories import facts, report, results


@pytest.fixture
def measured() -> Results:
    """Two of our builds, a tree that differs in one of two answers, and a peer that speculates."""
    plain = [report(3.0, 3.0)]
    other = report(1.0, 1.0, steps=1)
    other["prompts"][1]["answer"] = [5, 6, 0, 8]
    return results(
        (facts("medusa int8", "8 bit", own=True), plain),
        (facts("medusa w8a8", "8 bit", own=True), [report(2.0, 2.0)]),
        (facts("medusa int8 tree", "8 bit", own=True, plain="medusa int8"), [other]),
        (facts("genai", "8 bit"), [report(4.0, 4.0)]),
        (facts("genai n-gram", "8 bit", speculates=True), [report(0.5, 0.5)]),
        (facts("F16", "extra"), [report(0.1, 0.1)]),
    )


def test_classes_compare_the_best_of_each_kind(measured: Results) -> None:
    rows = class_rows(measured, frozenset())
    assert {heading: cells[0] for heading, cells in rows.items()} == {
        "class": "8 bit",
        "own plain": "medusa w8a8",
        "best peer, plain": "genai",
        "own plain ÷ it": "2.000 (2.000–2.000)",
        "best tree": "medusa int8 tree",
        "tree ÷ own plain": "2.000 (2.000–2.000)",
        "tree ÷ peer, plain": "4.000 (4.000–4.000)",
        "best peer": "genai n-gram",
        "tree ÷ best peer": "0.500 (0.500–0.500)",
        "answers as plain": "1/2",  # compared with its own build
    }


def test_systems_are_sorted_by_class_and_speed(measured: Results) -> None:
    rows = system_rows(measured, [64], frozenset())
    names = ["genai n-gram", "medusa int8 tree", "medusa w8a8", "medusa int8", "genai", "F16"]
    assert rows["system"] == names
    tree = {heading: cells[1] for heading, cells in rows.items()}
    assert tree["tokens/s"] == "3.0 (3.0–3.0)"
    assert tree["tokens/step"] == "3.00"
    assert tree["first token 64, ms"] == "60"
    assert (tree["RSS, MB"], tree["anonymous"], tree["file, MB"]) == ("300", "100", "2")
    assert rows["tokens/step"][0] == "–"  # genai hands out the tokens of its steps one by one
    assert rows["answers as own plain"] == ["2/2, 100% of tokens", "1/2", "–", "–", "2/2, 100% of tokens", "–"]


def test_repeated_text_is_what_followed_the_same_tokens_before() -> None:
    assert repeated(report(1.0, answer=(1, 2, 3, 4, 5))) == 0
    assert repeated(report(1.0, answer=(1, 2, 3, 4, 1, 2, 3, 4, 1, 9))) == 0.2
    assert repeated(report(1.0, answer=(7,) * 10)) == 0.6


def test_an_incomplete_class_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    only_peers = results((facts("genai"), [report(1.0)]))
    assert class_rows(only_peers, frozenset()) == {}
    print_tables(only_peers, [64], frozenset())
    printed = capsys.readouterr().out
    assert printed.startswith("CPU, 2 cores, avx2\n")
    assert "genai" in printed


def test_the_plot_has_a_panel_for_each_class(measured: Results, tmp_path: Path) -> None:
    plot(measured, tmp_path / "plot.svg")
    assert b"benchmarks/peers.py --plot" in (tmp_path / "plot.svg").read_bytes()[:4096]
