from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from medusa_exporter.distillation import batches, checkpoint, dataset, distill
from medusa_exporter.distillation.conversations import Conversation
from medusa_exporter.distillation.dataset import DataError, DataFacts
from medusa_exporter.distillation.review import ConversationReader
from medusa_exporter.distillation.sampling import Sampling
from medusa_exporter.distillation.scripts import GeneratedRow
from medusa_runtime.errors import CapacityError, PromptError

PLAN = distill.DistillationPlan(
    conversations=(("hello there", "and then?"), ("one two",), ("leave me out",)),
    excluded=(("Leave me OUT!",),),
    temperatures=(0.0, 0.8),
    follow_ups=False,
    max_new_tokens=12,
    context=200,
    batch=4,
)
FACTS = DataFacts("m", "d", 256, (1,), 0, {})
TALK = Conversation(({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}), "f:1")


def run(model, tokenizer, folder, plan=PLAN, minutes=None, lines=None, force=False):
    lines = [] if lines is None else lines
    return distill.distill(model, tokenizer, "tiny", plan, folder, minutes=minutes, report=lines.append, force=force)


def continued(model, prompt, limit=12):
    ids = torch.tensor(np.array(prompt, np.int64))[None]
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def same(left, right):
    return left.facts == right.facts and all(
        np.array_equal(getattr(left, name), getattr(right, name), equal_nan=name == "temperature")
        for name in dataset.ARRAYS
    )


def test_rows_hold_whole_conversations(model, tokenizer, tmp_path):
    lines = []
    found = run(model, tokenizer, tmp_path, lines=lines)
    assert lines[0] == "2 prompts; 1 left out by --exclude, 0 too long for --context"
    assert sorted(found.temperature.tolist()) == pytest.approx([0, 0, 0.8, 0.8])
    assert sorted(set(found.groups.tolist())) == sorted(map(dataset.group_of, ("hello there", "one two")))
    for number in np.flatnonzero(found.temperature == 0):
        tokens, marks = found.row(number)
        edges = np.flatnonzero(np.diff(marks)) + 1
        parts = np.split(tokens, edges)
        assert len(parts) == (4 if found.groups[number] == dataset.group_of("hello there") else 2)
        for before, answer in zip(edges[::2], parts[1::2], strict=True):
            assert answer.tolist() == continued(model, tokens[:before])
    texts = [tokenizer.decode(found.row(number)[0]) for number in range(4)]
    assert sum("and then?<|im_end|>\n<|im_start|>assistant\n" in text for text in texts) == 2
    assert not (tmp_path / "partial").exists()
    assert same(dataset.load_data(tmp_path), found)
    assert f"{found.rows} conversations, {found.answer.sum():,} answer tokens, " in lines[-1]
    assert "answer tokens/s" in lines[-1]


def test_follow_ups_fill_the_rows(model, tokenizer, tmp_path):
    found = run(model, tokenizer, tmp_path, replace(PLAN, follow_ups=True, seed=5))
    assert found.rows == 4
    lengths = np.diff(found.offsets)
    assert (lengths > 100).any()
    assert lengths.max() <= 200
    for number in range(4):
        tokens, marks = found.row(number)
        given = tokenizer.decode(tokens[~marks])
        assert given.count("<|im_start|>user\n") == given.count("<|im_start|>assistant\n")
        assert marks[-1]


def test_a_broken_off_run_goes_on_and_gives_the_same(model, tokenizer, tmp_path, monkeypatch):
    plan = replace(PLAN, follow_ups=True, synthesize=6, batch=2, context=100)
    whole = run(model, tokenizer, tmp_path / "whole", plan)
    assert not same(whole, run(model, tokenizer, tmp_path / "other", replace(plan, seed=1)))
    real, begun = batches.save_batch, []

    def broken(partial, number, lines):
        begun.append(number)
        if number == 2:
            raise KeyboardInterrupt
        real(partial, number, lines)

    monkeypatch.setattr(batches, "save_batch", broken)
    broken_off = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, broken_off, plan)
    with pytest.raises(
        DataError, match=r"interrupted run with other arguments .*\(settings.rows was 2, is 3\); .* --force"
    ):
        run(model, tokenizer, broken_off, replace(plan, batch=3))
    monkeypatch.setattr(batches, "save_batch", lambda *arguments: (begun.append(arguments[1]), real(*arguments)))
    assert same(run(model, tokenizer, broken_off, plan), whole)
    assert begun == [0, 1, 2, 2, 3, 4]
    assert same(run(model, tokenizer, broken_off, plan), whole)  # complete: nothing is done again
    assert len(begun) == 6
    with pytest.raises(DataError, match=r"other arguments \(settings.sampling.top_k was 0, is 3\); .* --force"):
        run(model, tokenizer, broken_off, replace(plan, sampling=Sampling(top_k=3)))


def test_force_distils_anew_and_keeps_the_data_until_then(model, tokenizer, tmp_path, monkeypatch):
    before = run(model, tokenizer, tmp_path)
    other = replace(PLAN, seed=7, batch=1)
    real, begun = batches.save_batch, []

    def broken(partial, number, rows):
        begun.append(number)
        if number == 2:
            raise KeyboardInterrupt
        real(partial, number, rows)

    monkeypatch.setattr(batches, "save_batch", broken)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, tmp_path, other, force=True)
    assert same(dataset.load_data(tmp_path), before)
    assert checkpoint.replaces_data(tmp_path)
    with pytest.raises(DataError, match=r"interrupted run with other arguments .*seed was 7, is 0"):
        run(model, tokenizer, tmp_path)
    monkeypatch.setattr(batches, "save_batch", lambda *arguments: (begun.append(arguments[1]), real(*arguments)))
    after = run(model, tokenizer, tmp_path, other)  # without --force it resumes
    assert begun == [0, 1, 2, 2, 3]
    assert after.facts.seed == 7
    assert same(dataset.load_data(tmp_path), after)
    lines = []
    run(model, tokenizer, tmp_path, other, lines=lines)
    assert lines == [f"{tmp_path} is up to date; --force distills anew"]
    run(model, tokenizer, tmp_path, other, force=True)
    assert begun == [0, 1, 2, 2, 3, 0, 1, 2, 3]


def test_a_killed_removal_leaves_work_that_resumes(model, tokenizer, tmp_path, monkeypatch):
    partial = checkpoint.open_checkpoint(tmp_path, FACTS)
    for number in range(2):
        checkpoint.save_batch(partial, number, [GeneratedRow(np.array([1, 2]), np.array([0, 1]))])
    removed = []

    def killed(path, **_more):
        removed.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.remove_checkpoint(tmp_path)
    assert removed[0].startswith("batch-")
    monkeypatch.undo()
    assert checkpoint.open_checkpoint(tmp_path, FACTS) == partial


def test_the_model_opens_conversations_of_its_own(model, tokenizer, tmp_path):
    plan = distill.DistillationPlan(
        synthesize=40, temperatures=(0.0, 0.6), max_new_tokens=4, context=160, batch=40, seed=3
    )
    found = run(model, tokenizer, tmp_path, plan)
    assert 2 < found.rows <= 40
    assert len(set(found.groups.tolist())) == found.rows  # no opening twice
    assert set(found.temperature.tolist()) == {0.0, np.float32(0.6)}
    for number in range(found.rows):
        tokens, marks = found.row(number)
        opened = tokenizer.decode(tokens[: np.argmax(marks)])
        assert opened.startswith("<|im_start|>user\n")
        assert opened.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_row_ends_before_an_excluded_turn_of_the_model_s_own(model, tokenizer, tmp_path):
    talk = tuple((f"number {number}",) for number in range(10))
    plan = replace(PLAN, conversations=talk, follow_ups=True, temperatures=(0.0,), batch=10, context=256)
    found = run(model, tokenizer, tmp_path / "all", plan)
    reader = ConversationReader(tokenizer, found.facts.eos)
    owns = [reader.messages(*found.row(number))[2::2] for number in range(found.rows)]
    number = int(np.argmax([len(own) for own in owns]))
    own = owns[number]
    assert len(own) > 1
    cut = run(model, tokenizer, tmp_path / "cut", replace(plan, excluded=((own[1]["content"].upper(),),)))
    same_row = int(np.flatnonzero(cut.groups == found.groups[number])[0])
    assert reader.messages(*cut.row(same_row))[2::2] == own[:1]
    assert found.row(number)[0].tolist()[: len(cut.row(same_row)[0])] == cut.row(same_row)[0].tolist()


def test_ready_conversations_are_added(model, tokenizer, tmp_path):
    other = replace(TALK, messages=({"role": "user", "content": "leave me out"}, TALK.messages[1]))
    long = replace(TALK, messages=({"role": "user", "content": "x" * 300}, TALK.messages[1]))
    lines = []
    found = run(model, tokenizer, tmp_path / "a", replace(PLAN, answers=(TALK, other, long)), lines=lines)
    assert "1 ready conversations; 1 left out by --exclude, 1 without an answer in --context" in lines
    assert found.rows == 5
    assert np.isnan(found.temperature).tolist() == [False] * 4 + [True]
    assert tokenizer.decode(found.row(4)[0]).endswith("hello<|im_end|>")
    alone = run(model, tokenizer, tmp_path / "b", distill.DistillationPlan(answers=(TALK,), context=200), lines=lines)
    assert alone.rows == 1
    assert alone.answer.sum() == len("hello") + 1


PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REWRITING = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'].split('</think>')[-1] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(("text", "turns"), [(PLAIN, 2), (REWRITING, 1)])
def test_where_a_template_shows_too_little_it_is_told(model, template, tmp_path, text, turns):
    tokenizer, lines = template(text), []
    plan = replace(PLAN, temperatures=(0.0,), follow_ups=True)
    found = run(model, tokenizer, tmp_path, plan, lines=lines)
    row = int(np.flatnonzero(found.groups == dataset.group_of("hello there"))[0])
    tokens, marks = found.row(row)
    assert tokenizer.decode(tokens[: np.argmax(marks)]) == "user: hello there\nassistant: "
    assert (np.diff(marks.astype(int)) == 1).sum() == turns
    assert any(line.startswith("no follow-ups: ") for line in lines)
    assert any(line.startswith("only the first turn") for line in lines) == (turns == 1)
    with pytest.raises(PromptError, match="leave it out"):
        run(model, tokenizer, tmp_path / "other", replace(plan, synthesize=1))


def test_a_template_that_writes_nothing_first_cannot_be_opened_by_the_model(model, template, tmp_path):
    bare = template(
        "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    with pytest.raises(PromptError, match="writes nothing before a user turn"):
        run(model, bare, tmp_path, distill.DistillationPlan(synthesize=1, context=100, max_new_tokens=4))


def test_what_lockstep_cannot_serve_goes_through_generate(mistral, tokenizer, tmp_path):
    lines, plan = [], replace(PLAN, context=120, follow_ups=True, conversations=PLAN.conversations[:2])
    slow = run(mistral(16), tokenizer, tmp_path / "slow", plan, lines=lines)
    assert any("generate" in line and "sliding window of 16" in line for line in lines)
    assert slow.rows == 4
    model = mistral(128)
    fast = run(model, tokenizer, tmp_path / "fast", replace(plan, temperatures=(0.0,), follow_ups=False), lines=[])
    assert fast.rows == 2
    (row,) = np.flatnonzero(fast.groups == dataset.group_of("one two"))
    tokens, marks = fast.row(row)
    assert tokens[marks].tolist() == continued(model, tokens[~marks])


def test_rows_longer_than_the_model_are_refused(model, tokenizer, tmp_path):
    with pytest.raises(CapacityError, match="--context is 300 tokens, expected at most 256, the model's context"):
        run(model, tokenizer, tmp_path, replace(PLAN, context=300))


def test_rows_beyond_the_change_of_a_longrope_are_refused(own_model, tokenizer, tmp_path):
    own_model.config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 60,
    }
    assert PLAN.context > 60
    with pytest.raises(
        CapacityError,
        match="--context is 200 tokens, expected at most 60, beyond which the model's longrope uses other",
    ):
        run(own_model, tokenizer, tmp_path, PLAN)


def test_prompts_too_long_are_left_out(model, tokenizer, tmp_path):
    lines = []
    plan = distill.DistillationPlan((("x" * 100,), ("y",)), max_new_tokens=12, context=64)
    assert run(model, tokenizer, tmp_path, plan, lines=lines).rows == 1
    assert "1 too long for --context" in lines[0]


def test_no_time_is_no_data(model, tokenizer, tmp_path):
    with pytest.raises(DataError, match="no answer was finished"):
        run(model, tokenizer, tmp_path, minutes=1e-9)
