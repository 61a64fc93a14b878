import json
import shutil

import pytest
from click.testing import CliRunner
from medusa_exporter import models
from medusa_exporter.cli import distill as distill_cli
from medusa_exporter.cli import heads_report, main, train
from medusa_exporter.distillation import dataset
from medusa_exporter.distillation.dataset import DataError
from medusa_runtime.errors import CapacityError

COMMON = ("--max-new-tokens", 24, "--context", 128, "--batch", 16)


def call(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"turns": [f"question {number}"]}) for number in range(30)))
    return path


def test_the_commands_from_prompts_to_trees(model_folder, prompts, tmp_path):
    answers, heads = tmp_path / "answers", tmp_path / "heads"
    call(distill_cli.command, model_folder, "--prompts", prompts, "--limit", 20, "-o", answers, *COMMON)
    assert dataset.load_facts(answers).model == "tiny-llama"
    call(
        train.command, model_folder, "--data", answers, "-o", heads, "--epochs", 3, "--batch", 64, "--heads", 2,
        "--layers", 1, "--hold-out", 0.3,
    )  # fmt: skip
    line = json.loads((heads / "training.json").read_text())["command"]
    assert line.startswith("train tiny-llama --heads 2 --layers 1 --conditioning root")
    assert str(tmp_path) not in (heads / "training.json").read_text()
    text = call(
        heads_report.command, model_folder, heads, "--data", answers, "--all", "--json", tmp_path / "report.json",
        "--write-profiles", tmp_path / "trees",
    )  # fmt: skip
    assert "20 conversations (greedy)" in text
    assert len(json.loads((tmp_path / "report.json").read_text())["accuracy"]["top1"]) == 2


def test_conversations_go_out_and_come_back(model_folder, prompts, tmp_path):
    ready, out, folder = tmp_path / "ready.jsonl", tmp_path / "out.jsonl", tmp_path / "data"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ready.write_text(json.dumps({"messages": talk}))
    command = (
        distill_cli.command, model_folder, "--prompts", prompts, "--limit", 3, "--answers", ready, "-o", folder,
        "--temperature", 0, "--temperature", 0.7, "--top-k", 20, "--top-p", 0.9, "--min-p", 0, *COMMON,
    )  # fmt: skip
    assert "7 conversations" in call(*command, "--review-out", out)
    before = dataset.load_data(folder)
    assert before.facts.settings["sampling"] == {"top_k": 20, "top_p": 0.9, "min_p": 0}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[6] == {"id": 6, "messages": talk}
    lines[6]["messages"][1]["content"] = "good day"
    out.write_text("\n".join(json.dumps(line) for line in lines[1:]))
    assert "5 unchanged, 1 changed, 1 dropped" in call(*command, "--review-in", out)
    after = dataset.load_data(folder)
    assert after.rows == before.rows - 1
    assert after.row(0)[0].tolist() == before.row(1)[0].tolist()
    assert "up to date" in call(*command)  # the corrections are no other arguments


def test_a_ready_conversation_is_enough(model_folder, tmp_path):
    ready = tmp_path / "ready.jsonl"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ready.write_text(json.dumps({"messages": talk}))
    call(distill_cli.command, model_folder, "--answers", ready, "-o", tmp_path / "data", *COMMON)
    assert dataset.load_data(tmp_path / "data").rows == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--synthesize", "3", "--context", "8"],
        ["--synthesize", "3", "--top-p", "0"],
        ["--synthesize", "3", "--min-p", "2"],
        ["--synthesize", "3", "--seed", "-1"],
        ["--prompts", "no-such-file"],
    ],
)
def test_commands_refuse_what_makes_no_sense(tmp_path, arguments):
    result = CliRunner().invoke(distill_cli.command, ["model", "-o", str(tmp_path), *arguments])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("option", "text", "reason"),
    [
        ("--prompts", "{}", ":1: expected a JSON object with 'turns'"),
        ("--answers", "[]", ":1: expected a JSON object with 'messages'"),
        ("--exclude", '{"turns": []}', ":1: 'turns' must be a list"),
        ("--review-in", "{}", "no finished data set"),
    ],
)
def test_bad_files_are_reported_in_one_line(tmp_path, capsys, option, text, reason):
    (tmp_path / "file").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["distill", "model", "--synthesize", "1", option, str(tmp_path / "file"), "-o", str(tmp_path / "data")])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert reason in told
    assert "expected" in told or "must" in told


def test_train_runs_again_only_for_other_arguments(model_folder, prompts, tmp_path, monkeypatch):
    answers, heads = tmp_path / "answers", tmp_path / "heads"
    call(distill_cli.command, model_folder, "--prompts", prompts, "-o", answers, *COMMON)
    command = (train.command, model_folder, "--data", answers, "-o", heads, "--heads", 1, "--layers", 1, "--epochs", 1)
    call(*command, "--hold-out", 0.3)
    written = (heads / "training.json").read_bytes()
    monkeypatch.setattr(models, "load_model", None)  # what is up to date or refused loads no model
    assert "is up to date; --force trains anew" in call(*command, "--hold-out", 0.3)
    with pytest.raises(DataError, match=r"settings.hold_out was 0.3, is 0.2\); .* --force"):
        call(*command, "--hold-out", 0.2)
    monkeypatch.undo()
    assert (heads / "training.json").read_bytes() == written
    call(*command, "--hold-out", 0.2, "--force")
    assert json.loads((heads / "training.json").read_text())["settings"]["hold_out"] == 0.2


def test_a_context_beyond_the_model_is_refused_before_it_loads(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    arguments = (model_folder, "--synthesize", 1, "-o", tmp_path / "data", "--context", 100_000)
    with pytest.raises(
        CapacityError, match=r"--context is 100000 tokens, expected at most \d+, the model's context; lower it"
    ):
        call(distill_cli.command, *arguments)


def test_the_default_context_fits_a_short_model(model_folder, prompts, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(model_folder, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    arguments = (short, "--prompts", prompts, "--limit", 2, "-o", tmp_path / "data")
    call(distill_cli.command, *arguments, "--max-new-tokens", 16)
    assert dataset.load_facts(tmp_path / "data").settings["context"] == 96
    refused = CliRunner().invoke(distill_cli.command, [str(argument) for argument in arguments])
    assert refused.exit_code == 2
    assert "--max-new-tokens 320 leaves no room for a prompt in a --context of 96 tokens" in refused.output


def test_force_and_corrections_exclude_each_other(tmp_path):
    (tmp_path / "file").write_text("{}")
    arguments = [
        "model",
        "--synthesize",
        "1",
        "-o",
        str(tmp_path / "d"),
        "--force",
        "--review-in",
        str(tmp_path / "file"),
    ]
    result = CliRunner().invoke(distill_cli.command, arguments)
    assert result.exit_code == 2
    assert "leave out one of the two" in result.output
