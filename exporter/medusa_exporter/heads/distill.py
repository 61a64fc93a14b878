"""Self-distillation: the model answers prompts, and its answers are what heads learn (Medusa paper, section 2.3.2)."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from medusa_exporter.heads import data, prompts
from medusa_exporter.heads.backbone import model_digest
from medusa_exporter.heads.data import DataError, DataFacts, DataSet
from medusa_exporter.heads.generate import Answer, Ids, Job, Lockstep
from medusa_exporter.models import eos_token_ids

PARTIAL = "partial"  # the folder of unfinished work inside the data set's
ANSWERS_PER_PART = 4_096
SYNTHETIC_TEMPERATURE = 0.9
SYNTHETIC_TOKENS = 128
SYNTHETIC_SHARE = 0.25  # of the time that --minutes allows

Message = dict[str, str]
Echo = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to distil; the same plan gives the same jobs, so that a broken-off run can go on.

    conversations: user turns each. synthesize: how many user turns the model writes itself. temperatures: one pass
    over all prompts each. max_new_tokens: per answer. context: most tokens of a row, prompt and answer.
    """

    conversations: tuple[prompts.Turns, ...]
    excluded: tuple[prompts.Turns, ...] = ()
    synthesize: int = 0
    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = 320
    context: int = 768
    seed: int = 0


@dataclass
class _Run:
    """What all stages of one run share."""

    model: Any
    tokenizer: Any
    lockstep: Lockstep
    partial: Path
    eos: tuple[int, ...]
    echo: Echo


def distill(
    model: Any, tokenizer: Any, name: str, plan: Plan, folder: Path, *, rows: int, minutes: float | None, echo: Echo
) -> DataSet:
    """Answer the plan's prompts and save the data set in `folder`; go on where an earlier run of the plan stopped.

    rows: answered at once. minutes: begin no further answer after that long. Raises DataError when `folder` holds
    another plan's work, CapacityError when rows do not fit the model.
    """
    began = time.monotonic()
    facts = DataFacts(
        name, model_digest(model), int(model.config.vocab_size), _eos(model, tokenizer), plan.seed, _settings(plan)
    )
    if (folder / data.META_NAME).is_file():
        if data.load_facts(folder) != facts:
            raise DataError(f"{folder}: holds a data set made with other arguments; give another folder")
        echo(f"{folder}: already complete")
        return data.load_data(folder)
    partial = _open_partial(folder / PARTIAL, facts)
    torch.manual_seed(plan.seed + len(list(partial.iterdir())))  # a run that goes on must not draw the same again
    run = _Run(model, tokenizer, Lockstep(model, rows, plan.context, facts.eos), partial, facts.eos, echo)
    until = math.inf if minutes is None else began + 60 * minutes
    conversations = prompts.without(plan.conversations, plan.excluded)
    echo(f"{len(conversations)} prompts; {len(plan.conversations) - len(conversations)} left out by --exclude")
    if plan.synthesize:
        share = math.inf if minutes is None else began + 60 * minutes * SYNTHETIC_SHARE
        written = prompts.without(_synthesize(run, plan, share), plan.excluded)
        echo(f"{len(written)} prompts written by the model")
        conversations += written
    result = data.from_rows(facts, _answer_all(run, plan, conversations, until))
    if not result.rows:
        raise DataError("no answer was finished; give more prompts, more time or a larger --context")
    data.save_data(result, folder)
    shutil.rmtree(partial)
    seconds = time.monotonic() - began
    echo(f"{result.rows} rows, {int(result.answer.sum())} answer tokens, {seconds:.0f} s -> {folder}")
    return result


def _synthesize(run: _Run, plan: Plan, until: float) -> list[prompts.Turns]:
    """Let the model write first user turns; return the distinct ones."""
    before, after = prompts.user_frame(run.tokenizer)
    start = np.array(run.tokenizer(before, add_special_tokens=False)["input_ids"], np.int64)
    limit = min(SYNTHETIC_TOKENS, plan.context - len(start))
    jobs = [Job(number, start, SYNTHETIC_TEMPERATURE, limit) for number in range(plan.synthesize)]
    answers = _stage(run, "user", jobs, until)
    in_order = [tokens for _, tokens in sorted(answers.items())]
    decoded = [run.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in in_order]
    texts = [
        text
        for tokens, text in zip(in_order, decoded, strict=True)
        if tokens[-1] in run.eos or after in text  # the others were broken off
    ]
    special = sorted(run.tokenizer.all_special_tokens, key=len, reverse=True)
    return [(text,) for text in prompts.distinct(_cut(text, [after, *special]) for text in texts)]


def _cut(text: str, marks: list[str]) -> str:
    """Return the text up to the first of the marks."""
    return min((text.split(mark, 1)[0] for mark in marks if mark), key=len, default=text).strip()


def _answer_all(
    run: _Run, plan: Plan, conversations: list[prompts.Turns], until: float
) -> list[tuple[Ids, Ids, float, int]]:
    """Answer every conversation at every temperature, turn by turn; return rows as `data.from_rows` takes them."""
    threads = list(itertools.product(conversations, plan.temperatures))
    said: dict[int, list[Message]] = {number: [] for number in range(len(threads))}
    rows: list[tuple[Ids, Ids, float, int]] = []
    for turn in range(max((len(turns) for turns in conversations), default=0)):
        open_threads = [number for number in said if len(threads[number][0]) > turn]
        for number in open_threads:
            said[number].append({"role": "user", "content": threads[number][0][turn]})
        laid_out = prompts.lay_out(run.tokenizer, [said[number] for number in open_threads])
        jobs = [
            Job(number, np.array(ids, np.int64), threads[number][1], plan.max_new_tokens)
            for number, ids in zip(open_threads, laid_out, strict=True)
            if len(ids) + plan.max_new_tokens <= plan.context
        ]
        if len(jobs) < len(open_threads):
            run.echo(f"turn {turn + 1}: {len(open_threads) - len(jobs)} prompts are too long for --context, left out")
        random.Random(plan.seed).shuffle(jobs)  # noqa: S311 -- so that a run cut short has a fair share of all
        answers = _stage(run, f"turn{turn + 1}", jobs, until)
        prompt_of = {job.identity: job.prompt for job in jobs}
        texts = [run.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers.values()]
        said = {
            number: [*said[number], {"role": "assistant", "content": text}]
            for number, text in zip(answers, texts, strict=True)
        }
        for number in sorted(answers):
            turns, temperature = threads[number]
            rows.append((prompt_of[number], answers[number], temperature, data.group_of(turns[0])))
    return rows


def _stage(run: _Run, stage: str, jobs: list[Job], until: float) -> dict[int, Ids]:
    """Answer `jobs`, less those that an earlier run answered, and put answers away in parts as they come."""
    answers = _read_parts(run.partial, stage)
    wanted = {job.identity for job in jobs}
    answers = {identity: tokens for identity, tokens in answers.items() if identity in wanted}
    fresh: list[Answer] = []
    bar = tqdm(unit="tok", unit_scale=True, desc=f"{stage}, {len(jobs) - len(answers)} rows", mininterval=1)
    try:
        for answer in run.lockstep.run((job for job in jobs if job.identity not in answers), until):
            fresh.append(answer)
            bar.update(len(answer.tokens))
            if len(fresh) == ANSWERS_PER_PART:
                answers |= _put_away(run.partial, stage, fresh)
                fresh = []
    finally:
        bar.close()
        answers |= _put_away(run.partial, stage, fresh)
    return answers


def _put_away(partial: Path, stage: str, answers: list[Answer]) -> dict[int, Ids]:
    if answers:
        number = len(list(partial.glob(f"{stage}-*.npz")))
        unfinished = partial / "writing"
        with unfinished.open("wb") as file:
            np.savez(
                file,
                identity=np.array([answer.identity for answer in answers]),
                lengths=np.array([len(answer.tokens) for answer in answers]),
                tokens=np.concatenate([answer.tokens for answer in answers]),
            )
        os.replace(unfinished, partial / f"{stage}-{number:05}.npz")  # noqa: PTH105 -- atomic, and says so
    return {answer.identity: answer.tokens for answer in answers}


def _read_parts(partial: Path, stage: str) -> dict[int, Ids]:
    answers: dict[int, Ids] = {}
    for path in sorted(partial.glob(f"{stage}-*.npz")):
        with np.load(path, allow_pickle=False) as part:
            rows = np.split(part["tokens"], np.cumsum(part["lengths"])[:-1])
            answers |= zip(part["identity"].tolist(), rows, strict=True)
    return answers


def _open_partial(partial: Path, facts: DataFacts) -> Path:
    """Make the folder of unfinished work, or check that it belongs to the same plan."""
    partial.mkdir(parents=True, exist_ok=True)
    plan, path = json.dumps(asdict(facts)), partial / "plan.json"
    if path.is_file() and path.read_text(encoding="utf-8") != plan:
        raise DataError(f"{partial}: work begun with other arguments; give the same ones, or another folder")
    path.write_text(plan, encoding="utf-8")
    return partial


def _settings(plan: Plan) -> dict[str, Any]:
    """Return the plan in JSON's terms, the prompts as counts and one digest."""
    texts = "\n".join(json.dumps(turns) for turns in (*plan.conversations, *plan.excluded))
    return {
        "prompts": len(plan.conversations),
        "excluded": len(plan.excluded),
        "texts": f"{data.group_of(texts):016x}",
        "synthesize": plan.synthesize,
        "temperatures": list(plan.temperatures),
        "max_new_tokens": plan.max_new_tokens,
        "context": plan.context,
    }


def _eos(model: Any, tokenizer: Any) -> tuple[int, ...]:
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return tuple(sorted({*eos_token_ids(model), *own}))
