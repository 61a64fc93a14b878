import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from medusa_exporter.cli import distill as distill_cli
from medusa_exporter.cli import heads_report, train
from medusa_exporter.heads import data, distill
from medusa_exporter.heads.data import DataError
from medusa_exporter.heads.generate import Lockstep

PLAN = distill.Plan(
    conversations=(("hello there", "and then?"), ("one two",), ("leave me out",)),
    excluded=(("Leave me OUT!",),),
    temperatures=(0.0, 0.8),
    max_new_tokens=12,
    context=200,
)


def run(model, tokenizer, folder, plan=PLAN, rows=4, minutes=None, lines=None):
    lines = [] if lines is None else lines
    return distill.distill(model, tokenizer, "tiny", plan, folder, rows=rows, minutes=minutes, echo=lines.append)


def test_rows_hold_prompts_answers_and_their_facts(model, tokenizer, tmp_path):
    lines = []
    found = run(model, tokenizer, tmp_path, lines=lines)
    assert "1 left out by --exclude" in lines[0]
    assert found.rows == 6  # two conversations at two temperatures, and a second turn of one
    assert sorted(found.temperature.tolist()) == pytest.approx([0, 0, 0, 0.8, 0.8, 0.8])
    assert len(set(found.groups.tolist())) == 2
    tokens, answer = found.row(0)
    assert tokenizer.decode(tokens[~answer]) == "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.from_numpy(tokens[~answer].astype(np.int64))[None]
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
    )
    assert tokens.tolist() == expected[0].tolist()
    second = [found.row(index) for index in range(4, 6)]
    assert all("and then?" in tokenizer.decode(tokens[~answer]) for tokens, answer in second)
    assert not (tmp_path / "partial").exists()
    assert data.load_data(tmp_path).facts == found.facts


def test_a_broken_off_run_goes_on(model, tokenizer, tmp_path, monkeypatch):
    begun = []
    real = Lockstep.run

    def broken(self, jobs, deadline):
        answers = real(self, jobs, deadline)
        yield next(answers)
        raise KeyboardInterrupt

    monkeypatch.setattr(Lockstep, "run", broken)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, tmp_path)
    with pytest.raises(DataError, match="other arguments"):
        run(model, tokenizer, tmp_path, distill.Plan((("x",),)))

    def counted(self, jobs, deadline):
        jobs = list(jobs)
        begun.append(len(jobs))
        return real(self, jobs, deadline)

    monkeypatch.setattr(Lockstep, "run", counted)
    assert run(model, tokenizer, tmp_path).rows == 6
    assert begun == [3, 2]
    assert run(model, tokenizer, tmp_path).rows == 6  # complete: nothing is done again
    assert len(begun) == 2
    with pytest.raises(DataError, match="other arguments"):
        run(model, tokenizer, tmp_path, distill.Plan((("x",),)))


def test_the_model_writes_user_turns_of_its_own(model, tokenizer, tmp_path):
    plan = distill.Plan(conversations=(), synthesize=40, max_new_tokens=4, context=200, seed=3)
    lines = []
    try:
        found = run(model, tokenizer, tmp_path, plan, rows=40, lines=lines)
    except DataError:  # a random model may end no turn
        pytest.fail("no user turn came to an end")
    opened = tokenizer.decode(found.row(0)[0])
    assert opened.startswith("<|im_start|>user\n")
    assert opened.count("<|im_end|>") >= 1
    assert f"{found.rows} prompts written" in lines[1]


def test_user_turns_end_at_the_first_mark():
    assert distill._cut(" a b<|im_end|>\nx<|im_start|>", ["<|im_end|>", "<|im_start|>"]) == "a b"
    assert distill._cut("plain", ["<|im_end|>"]) == "plain"


def test_prompts_too_long_are_left_out(model, tokenizer, tmp_path):
    lines = []
    plan = distill.Plan((("x" * 100,), ("y",)), max_new_tokens=12, context=64)
    assert run(model, tokenizer, tmp_path, plan, lines=lines).rows == 1
    assert any("1 prompts are too long" in line for line in lines)


def test_no_time_is_no_data(model, tokenizer, tmp_path):
    with pytest.raises(DataError, match="no answer was finished"):
        run(model, tokenizer, tmp_path, minutes=1e-9)


def test_the_commands_from_prompts_to_trees(model_folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"turns": [f"question {number}"]}) for number in range(30)))
    runner = CliRunner()

    def call(command, *arguments):
        result = runner.invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    answers, heads = tmp_path / "answers", tmp_path / "heads"
    common = ("--max-new-tokens", 24, "--context", 128, "--batch", 16)
    call(distill_cli.command, model_folder, "--prompts", prompts, "--limit", 20, "-o", answers, *common)
    assert data.load_facts(answers).model == "tiny-llama"
    call(
        train.command, model_folder, "--data", answers, "-o", heads, "--epochs", 3, "--batch", 64, "--heads", 2,
        "--layers", 1, "--hold-out", 0.3,
    )  # fmt: skip
    line = json.loads((heads / "training.json").read_text())["command"]
    assert line.startswith("train tiny-llama --heads 2 --layers 1 --conditioning root --epochs 3.0 --batch 64")
    assert str(tmp_path) not in (heads / "training.json").read_text()
    text = call(
        heads_report.command, model_folder, heads, "--data", answers, "--all", "--json", tmp_path / "report.json",
        "--write-profiles", tmp_path / "trees",
    )  # fmt: skip
    assert "20 rows (greedy)" in text
    assert len(json.loads((tmp_path / "report.json").read_text())["accuracy"]["top1"]) == 2


def test_commands_refuse_what_makes_no_sense(tmp_path):
    for arguments in ([], ["--synthesize", "3", "--context", "8"]):
        result = CliRunner().invoke(distill_cli.command, ["model", "-o", str(tmp_path), *arguments])
        assert result.exit_code == 2
