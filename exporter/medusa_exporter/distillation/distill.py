"""Self-distillation: the model answers prompts, and its answers are what heads learn (Medusa paper, section 2.3.2)."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medusa_runtime.errors import CapacityError, PromptError

from medusa_exporter import prompts
from medusa_exporter.distillation import checkpoint, dataset
from medusa_exporter.distillation.attention import lockstep_obstacle
from medusa_exporter.distillation.batches import generate_batches, split_batches
from medusa_exporter.distillation.cleaning import clean_rows
from medusa_exporter.distillation.conversations import Conversation, conversation_rows
from medusa_exporter.distillation.dataset import DataError, DataFacts, DataSet, Row
from medusa_exporter.distillation.lockstep import LockstepGenerator
from medusa_exporter.distillation.review import without_review
from medusa_exporter.distillation.sampling import Sampling
from medusa_exporter.distillation.scripts import (
    Request,
    RowGenerator,
    ScriptSettings,
    drop_long_prompts,
    make_scripts,
    shuffle_requests,
)
from medusa_exporter.distillation.template_parts import EndTokens, Ids, TemplateParts, split_template
from medusa_exporter.distillation.transformers_generate import TransformersGenerator
from medusa_exporter.loading.end_tokens import end_token_ids
from medusa_exporter.loading.rope import changes_at
from medusa_exporter.output_kinds import DATA, PARTIAL
from medusa_exporter.training.model_digest import is_distilled_from, model_digest

MIN_P = Sampling()

Echo = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to distil; the same plan gives the same waves, so that a broken-off run can go on.

    conversations: user turns each. excluded: user turns to leave out. answers: ready conversations to add. synthesize:
    how many conversations the model opens itself. follow_ups: go on with user turns of its own. temperatures: one
    stream a prompt each. max_new_tokens: per answer. context: positions of a row. rows: of a wave.
    chat_template: see `describe_wanted`.
    """

    conversations: tuple[prompts.Turns, ...] = ()
    excluded: tuple[prompts.Turns, ...] = ()
    answers: tuple[Conversation, ...] = ()
    synthesize: int = 0
    follow_ups: bool = True
    temperatures: tuple[float, ...] = (0.0,)
    sampling: Sampling = MIN_P
    max_new_tokens: int = 320
    context: int = 768
    rows: int = 256
    seed: int = 0
    chat_template: str | None = None

    def settings(self) -> dict[str, Any]:
        """The plan in JSON's terms, texts as counts and one digest."""
        texts = [
            json.dumps(text)
            for text in (*self.conversations, *self.excluded, *(answer.messages for answer in self.answers))
        ]
        return {
            "prompts": len(self.conversations),
            "excluded": len(self.excluded),
            "answers": len(self.answers),
            "texts": f"{dataset.group_of(chr(10).join(texts)):016x}",
            "synthesize": self.synthesize,
            "follow_ups": self.follow_ups,
            "temperatures": list(self.temperatures),
            "sampling": asdict(self.sampling),
            "max_new_tokens": self.max_new_tokens,
            "context": self.context,
            "rows": self.rows,
            **({"chat_template": self.chat_template} if self.chat_template else {}),
        }


def distill(
    model: Any, tokenizer: Any, name: str, plan: Plan, folder: Path, *, minutes: float | None, echo: Echo
) -> DataSet:
    """Write the plan's conversations and save the data set in `folder`; go on where an earlier run of the plan stopped.

    minutes: begin no wave that would end later. Raises DataError when `folder` holds another plan's work,
    CapacityError when rows do not fit the model, PromptError when the model's template cannot serve the plan.
    """
    began = time.monotonic()
    eos = end_token_ids(model, tokenizer)
    facts = DataFacts(name, model_digest(model), int(model.config.vocab_size), eos, plan.seed, plan.settings())
    if (folder / dataset.META_NAME).is_file():
        found = without_review(dataset.load_facts(folder))
        if is_distilled_from(found.digest, model):  # an earlier version's digest is of less
            found = replace(found, digest=facts.digest)
        if found != facts:
            raise DataError(f"{folder}: holds a data set made with other arguments; give another folder")
        if DATA[PARTIAL].is_ours(folder / PARTIAL):  # a killed run was removing it
            shutil.rmtree(folder / PARTIAL)
        echo(f"{folder}: already complete")
        return dataset.load_data(folder)
    if plan.context > model.config.max_position_embeddings:
        raise CapacityError(
            f"rows of {plan.context} tokens exceed the model's {model.config.max_position_embeddings}; "
            "give a smaller --context"
        )
    if (change := changes_at(model.config.to_dict())) is not None and plan.context > change:
        raise CapacityError(
            f"rows of {plan.context} tokens, whose longrope takes other frequencies beyond {change} tokens; expected "
            f"rows that one set serves: give --context {change} or less"
        )
    frame, follow_ups = _frame(tokenizer, plan, eos, echo)
    waves = split_batches(_streams(tokenizer, plan, echo), plan.rows)
    unfinished = checkpoint.open_checkpoint(folder, facts)
    pace = None
    if waves:
        terms = ScriptSettings(plan.context, plan.max_new_tokens, frame, follow_ups)
        ends = frame.ends if frame else EndTokens(eos)
        pace = generate_batches(
            waves,
            _writer(model, len(waves[0]), plan, ends, echo),
            lambda wave: make_scripts(tokenizer, wave, terms),
            unfinished,
            context=plan.context,
            seed=plan.seed,
            until=math.inf if minutes is None else began + 60 * minutes,
        )
    rows = _cleaned(tokenizer, plan, waves, unfinished) + _ready(tokenizer, plan, eos, echo)
    if not rows:
        raise DataError("no answer was finished; give more prompts, more time or a larger --context")
    result = dataset.from_rows(facts, rows)
    dataset.save_data(result, folder)
    shutil.rmtree(unfinished)
    rate = (
        f", {pace.answer_tokens / pace.seconds:,.0f} answer tokens/s while writing"
        if pace and pace.answer_tokens
        else ""
    )
    seconds = time.monotonic() - began
    echo(f"{result.rows} rows, {int(result.answer.sum()):,} answer tokens, {seconds:.0f} s{rate} -> {folder}")
    return result


def _frame(tokenizer: Any, plan: Plan, eos: tuple[int, ...], echo: Echo) -> tuple[TemplateParts | None, bool]:
    """Cut the template and say whether the model can go on with user turns of its own.

    Raises PromptError when it cannot open conversations, but is to.
    """
    frame, reason = None, "no special token ends a user turn in the chat template"
    try:
        frame = split_template(tokenizer, eos)
    except PromptError as error:
        reason = str(error)
    able = frame is not None and frame.ends.user is not None
    if plan.synthesize and not (able and frame is not None and len(frame.opening)):
        reason = reason if not able else "the chat template writes nothing before a user turn"
        raise PromptError(f"--synthesize needs user turns that the model can write itself, but {reason}; leave it out")
    if frame is None and any(len(turns) > 1 for turns in plan.conversations):
        echo(f"only the first turn of each prompt is answered: {reason}")
    if plan.follow_ups and not able and plan.conversations:
        echo(f"no follow-ups: {reason}")
    return frame, plan.follow_ups and able


def _streams(tokenizer: Any, plan: Plan, echo: Echo) -> list[Request]:
    """The plan's streams, less the prompts that are excluded or too long, which is said."""
    allowed = prompts.without(plan.conversations, plan.excluded)
    short = drop_long_prompts(tokenizer, allowed, plan.context - plan.max_new_tokens)
    left_out = f"{len(plan.conversations) - len(allowed)} left out by --exclude"
    echo(f"{len(short)} prompts; {left_out}, {len(allowed) - len(short)} too long for --context")
    return shuffle_requests(short, plan.synthesize, plan.temperatures, plan.seed)


def _writer(model: Any, rows: int, plan: Plan, ends: EndTokens, echo: Echo) -> RowGenerator:
    """Rows in lockstep where they serve the model, else transformers' `generate`, which is said."""
    reason = lockstep_obstacle(model, plan.context)
    if reason is None:
        return LockstepGenerator(model, rows, plan.context, ends, plan.sampling, echo)
    echo(f"transformers' generate writes the answers, slowly: {reason}")
    return TransformersGenerator(model, plan.context, ends, plan.sampling)


def _cleaned(tokenizer: Any, plan: Plan, waves: Sequence[Sequence[Request]], unfinished: Path) -> list[Row]:
    """The data set's rows of all finished waves."""
    refused = prompts.turn_keys(plan.excluded)
    openings = prompts.turn_keys(turns[:1] for turns in plan.conversations)

    def decode(tokens: list[Ids]) -> list[str]:
        texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []
        return texts

    rows: list[Row] = []
    for number, wave in enumerate(waves):
        if checkpoint.is_saved(unfinished, number):
            rows += clean_rows(wave, checkpoint.load_batch(unfinished, number), decode, refused, openings)
    return rows


def _ready(tokenizer: Any, plan: Plan, eos: tuple[int, ...], echo: Echo) -> list[Row]:
    """The rows of the plan's ready conversations, less the excluded ones."""
    refused = prompts.turn_keys(plan.excluded)
    allowed = [ready for ready in plan.answers if not prompts.shares_turn(ready.turns, refused)]
    rows = conversation_rows(tokenizer, allowed, plan.context, eos)
    if plan.answers:
        left_out = f"{len(plan.answers) - len(allowed)} left out by --exclude"
        echo(f"{len(rows)} ready conversations; {left_out}, {len(allowed) - len(rows)} without an answer in --context")
    return rows
