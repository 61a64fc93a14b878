"""The loop that times trees against plain decoding, and the arithmetic from runs to figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from medusa_exporter import bench
from medusa_exporter.bench import FIGURES, Run, Skipped, Turn, aggregate, by_category, run_once, walk
from medusa_exporter.verify import Difference
from medusa_profiles.profile import TreeProfile
from medusa_runtime import Engine
from medusa_runtime.errors import BundleError, MedusaError, PromptError

CHAIN = TreeProfile("chain-2", ((0,), (0, 0)))


def run(tokens: int, steps: int, seconds: float, host: float = 0.0, first: int = 0) -> Run:
    return Run(tuple(range(first, first + tokens)), steps, seconds, host)


def turn(plain: Run, medusa: Run, prompt: int = 1, number: int = 1, difference: Difference | None = None) -> Turn:
    differences = {} if difference is None else {CHAIN.name: difference}
    return Turn(prompt, number, (1, 2), plain, {CHAIN.name: medusa}, differences)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.load(tiny_bundle, profile="plain", threads=1)


def test_figures_are_ratios_of_sums() -> None:
    turns = [
        turn(run(11, 10, 1.0), run(11, 5, 0.6, 0.1)),
        turn(run(31, 30, 3.0), run(31, 10, 1.2, 0.2), number=2),
        turn(run(3, 2, 0.4), run(3, 2, 0.6, 0.1), prompt=2),
    ]
    result = aggregate(turns, CHAIN, "ort-cpu", "fp32")
    assert (result["backend"], result["precision"], result["profile"], result["nodes"]) == (
        "ort-cpu", "fp32", "chain-2", 3,
    )  # fmt: skip
    assert result["tokens_per_step"] == pytest.approx(42 / 17)
    assert result["plain_step_ms"] == pytest.approx(4400 / 42)
    assert result["medusa_step_ms"] == pytest.approx(2400 / 17)
    assert result["overhead"] == pytest.approx(result["medusa_step_ms"] / result["plain_step_ms"])
    assert result["speedup"] == pytest.approx(4.4 / 2.4)
    assert result["speedup"] == pytest.approx(result["tokens_per_step"] / result["overhead"])
    assert result["host_us_per_step"] == pytest.approx(0.4e6 / 17)
    assert result["identical"] is True
    assert (result["divergences"], result["max_gap"], result["failures"], result["differences"]) == (0, 0.0, 0, [])


def test_the_spread_is_over_prompts_not_turns() -> None:
    turns = [
        turn(run(11, 10, 1.0), run(11, 10, 1.0), prompt=1),
        turn(run(11, 10, 1.0), run(11, 5, 1.0), prompt=1, number=2),
        turn(run(11, 10, 1.0), run(11, 5, 1.0), prompt=2),
        turn(run(11, 10, 1.0), run(11, 2, 1.0), prompt=3),
    ]
    spread = aggregate(turns, CHAIN, "ort-cpu", "fp32")["spread"]
    assert set(spread) == set(FIGURES)
    assert spread["tokens_per_step"]["p50"] == pytest.approx(2.0)  # of 20/15, 10/5, 10/2
    assert all(values["p10"] <= values["p50"] <= values["p90"] for values in spread.values())
    assert all(list(values) == ["p10", "p50", "p90"] for values in spread.values())


def test_categories_have_figures_of_their_own() -> None:
    turns = [
        turn(run(11, 10, 1.0), run(11, 5, 0.75), prompt=1),
        turn(run(11, 10, 1.0), run(11, 2, 0.25), prompt=2),
        turn(run(11, 10, 1.0), run(11, 3, 0.25), prompt=2, number=2),
        turn(run(11, 10, 1.0), run(11, 1, 0.25), prompt=3),
    ]
    found = by_category(turns, CHAIN, ["maths", "code", None])
    assert list(found) == ["maths", "code"]
    assert [found[name]["tokens_per_step"] for name in found] == [2.0, 4.0]
    assert [found[name]["prompts"] for name in found] == [1, 1]
    assert found["code"]["speedup"] == pytest.approx(4.0)


def test_a_turn_that_parts_counts_but_not_for_the_speedup() -> None:
    turns = [
        turn(run(11, 10, 1.0), run(11, 5, 0.5)),
        turn(run(11, 10, 1.0), run(11, 5, 9.0, first=1), prompt=2, difference=Difference(3, 7, 8, 2e-4)),
        turn(run(11, 10, 1.0), run(11, 5, 9.0, first=1), prompt=3, difference=Difference(0, 7, 8, 0.5)),
        turn(run(11, 10, 1.0), run(10, 5, 9.0), prompt=4, difference=Difference(10, 7, None, None)),
    ]
    result = aggregate(turns, CHAIN, "ort-cpu", "fp32")
    assert result["speedup"] == pytest.approx(2.0)
    assert result["identical"] is False
    assert (result["divergences"], result["failures"], result["max_gap"]) == (3, 2, 0.5)
    assert result["differences"][0] == {
        "prompt": 2, "turn": 1, "position": 3, "expected": 7, "got": 8, "gap": 2e-4, "share": None,
        "exact": True,
    }  # fmt: skip
    assert aggregate(turns[3:], CHAIN, "ort-cpu", "fp32")["max_gap"] is None


def test_answers_of_one_token_give_no_figures_but_spoil_none() -> None:
    nothing = turn(run(1, 0, 0.0), run(1, 0, 0.0), prompt=2)
    alone = aggregate([nothing], CHAIN, "ort-cpu", "fp32")
    assert all(alone[name] is None and set(alone["spread"][name].values()) == {None} for name in FIGURES)
    whole = turn(run(11, 10, 1.0), run(11, 5, 0.5))
    both, without = (aggregate(turns, CHAIN, "ort-cpu", "fp32") for turns in ([whole, nothing], [whole]))
    assert both == without
    json.dumps(both, allow_nan=False)


def test_a_run_counts_its_tokens_and_the_host_s_share(engine: Engine) -> None:
    ids = engine.encode("a b c")
    for tree, least in ((TreeProfile.plain(), 1), (engine.bundle.profile("tree-8"), 1)):
        engine.decoder.use(tree)
        for limit in (1, 2, 17):
            done = run_once(engine.decoder, ids, limit)
            assert len(done.tokens) == limit
            assert (done.steps == limit - 1) if tree.size == 1 else (done.steps <= limit - 1)
            assert 0 <= done.host_seconds <= done.seconds
            assert (done.seconds > 0) == (limit > least)


def test_profiles_take_turns_at_every_place(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    warmed: list[str] = []
    once, warm = run_once, bench.warm_up
    monkeypatch.setattr(bench, "run_once", lambda d, *a: (ran.append(d.profile.name), once(d, *a))[1])
    monkeypatch.setattr(bench, "warm_up", lambda d: (warmed.append(d.profile.name), warm(d))[1])
    trees = [engine.bundle.profile(name) for name in ("chain-1", "tree-4")]
    prompts = [("one", "and then?"), ("two",), ("three",), ("four",)]
    turns = list(walk(engine, prompts, trees, max_new_tokens=3, warm=True))
    one, two, three = ["plain", "chain-1", "tree-4"], ["chain-1", "tree-4", "plain"], ["tree-4", "plain", "chain-1"]
    assert ran == warmed == [*one, *one, *two, *three, *one]
    assert [(t.prompt, t.turn) for t in turns] == [(1, 1), (1, 2), (2, 1), (3, 1), (4, 1)]


def test_a_second_message_is_asked_after_plain_decoding_s_own_answer(engine: Engine) -> None:
    trees = [engine.bundle.profile("tree-8")]
    first, second = walk(engine, [("What is a tree?", "Write code")], trees, max_new_tokens=40)
    assert isinstance(first, Turn)
    assert isinstance(second, Turn)
    answer = engine.tokenizer.decode(first.plain.tokens)
    assert second.prompt_ids == tuple(
        engine.encode(
            [
                {"role": "user", "content": "What is a tree?"},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "Write code"},
            ]
        )
    )
    assert first.trees["tree-8"].tokens == first.plain.tokens
    assert first.trees["tree-8"].steps < first.plain.steps
    assert first.differences == second.differences == {}
    only = list(walk(engine, [("What is a tree?", "Write code")], trees, max_new_tokens=4, first_only=True))
    assert len(only) == 1


def test_a_message_beyond_the_context_is_skipped_with_what_follows(engine: Engine) -> None:
    prompts = [("word " * 600, "never asked"), ("short", "word " * 600), ("short",)]
    turns = list(walk(engine, prompts, [CHAIN], max_new_tokens=2))
    assert [(type(t).__name__, t.prompt, t.turn) for t in turns] == [
        ("Skipped", 1, 1), ("Turn", 2, 1), ("Skipped", 2, 2), ("Turn", 3, 1),
    ]  # fmt: skip
    assert isinstance(turns[0], Skipped)
    assert turns[0].tokens >= turns[0].context == engine.bundle.model.context
    assert str(turns[0].tokens) in turns[0].describe()


def test_a_prompt_that_cannot_be_laid_out_is_named(engine: Engine) -> None:
    with pytest.raises(PromptError, match=r"prompt 2, turn 1: .*not valid Unicode"):
        list(walk(engine, [("fine",), ("\ud800",)], [CHAIN], max_new_tokens=2))


def test_prompts_are_limited_and_an_empty_file_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"turns": ["a", "b"]}\n\n{"turns": ["c"]}\n')
    assert bench.load_prompts(file, None) == [("a", "b"), ("c",)]
    assert bench.load_prompts(file, 1) == [("a", "b")]
    file.write_text("\n")
    with pytest.raises(PromptError, match="holds no prompts"):
        bench.load_prompts(file, None)


def test_trees_are_chosen_by_name_each_once(engine: Engine) -> None:
    assert [tree.name for tree in bench.choose_trees(engine.bundle, ("tree-4", "chain-1", "tree-4"))] == [
        "tree-4", "chain-1",
    ]  # fmt: skip
    assert len(bench.choose_trees(engine.bundle, ())) == len(engine.bundle.manifest.profiles)
    with pytest.raises(BundleError, match="no profile 'oak'"):
        bench.choose_trees(engine.bundle, ("oak",))


def test_the_folder_of_the_json_is_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "out.json"
    bench.check_output(file, tmp_path / "bundle")
    assert file.parent.is_dir()
    assert not file.exists()


def test_places_that_cannot_hold_the_json_are_refused_early(tmp_path: Path) -> None:
    with pytest.raises(MedusaError, match="is a folder"):
        bench.check_output(tmp_path, tmp_path / "bundle")
    with pytest.raises(MedusaError, match="lies in the bundle"):
        bench.check_output(tmp_path / "bundle" / "out.json", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    described = bench.machine(3)
    assert set(described) == {"cpu", "cores", "processors", "threads", "platform"}
    assert described["threads"] == 3
    assert described["cpu"]
    assert bench.machine(None)["threads"] == described["cores"]
    assert bench.versions().keys() >= {"python", "numpy", "medusa-export", "onnxruntime"}
