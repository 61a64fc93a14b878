"""Self-distillation: the model answers prompts, and heads are trained on its answers.

See the Medusa paper, arXiv 2401.10774, section 2.3.2.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
from medusa_exporter.resume import describe_differences
from medusa_exporter.training.model_digest import is_distilled_from, model_digest

DEFAULT_SAMPLING = Sampling()

Report = Callable[[str], None]


@dataclass(frozen=True)
class DistillationPlan:
    """What is distilled; the same plan gives the same batches, so that an interrupted run can resume.

    Attributes:
        conversations: The user turns of each prompt.
        excluded: User turns that must not be in the data.
        answers: Ready conversations to add.
        synthesize: How many conversations the model opens itself.
        follow_ups: Let the model continue each conversation with user turns that it writes itself.
        temperatures: Sampling temperatures; each prompt is answered once per temperature.
        sampling: Which tokens may be drawn at temperatures above 0.
        max_new_tokens: Maximum number of tokens of an answer.
        context: Maximum number of tokens of a row.
        batch: Rows that are generated together.
        seed: Seed of order and samples.
        chat_template: Description of the chat template, see `describe_wanted`; `None` for the model's default.
        revision: Branch, tag or commit of the model on the hub; `None` for its default.
    """

    conversations: tuple[prompts.Turns, ...] = ()
    excluded: tuple[prompts.Turns, ...] = ()
    answers: tuple[Conversation, ...] = ()
    synthesize: int = 0
    follow_ups: bool = True
    temperatures: tuple[float, ...] = (0.0,)
    sampling: Sampling = DEFAULT_SAMPLING
    max_new_tokens: int = 320
    context: int = 768
    batch: int = 256
    seed: int = 0
    chat_template: str | None = None
    revision: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return the plan for JSON, texts as counts and one digest."""
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
            "rows": self.batch,
            **({"chat_template": self.chat_template} if self.chat_template else {}),
            **({"revision": self.revision} if self.revision else {}),
        }


def longest_conversation(config: Mapping[str, Any]) -> int:
    """Return the largest context in tokens that `check_context` accepts for a model with this config."""
    longest, change = int(config["max_position_embeddings"]), changes_at(config)
    return longest if change is None else min(longest, change)


def check_context(config: Mapping[str, Any], context: int) -> None:
    """Refuse rows that are longer than a model supports; this needs its config alone, not its weights.

    Args:
        config: The model's config with its `max_position_embeddings`.
        context: Maximum number of tokens of a row.

    Raises:
        CapacityError: The model does not support rows of `context` tokens.
    """
    if context > config["max_position_embeddings"]:
        raise CapacityError(
            f"--context is {context} tokens, expected at most {config['max_position_embeddings']}, the model's "
            "context; lower it"
        )
    if (change := changes_at(config)) is not None and context > change:
        raise CapacityError(
            f"--context is {context} tokens, expected at most {change}, beyond which the model's longrope uses other "
            "frequencies; lower it"
        )


def distill(
    model: Any,
    tokenizer: Any,
    name: str,
    plan: DistillationPlan,
    folder: Path,
    *,
    minutes: float | None,
    report: Report,
    force: bool = False,
) -> DataSet:
    """Generate the plan's conversations and save the data set in `folder`.

    A run of the same plan that was interrupted is resumed; a data set that it finished is loaded.

    Args:
        model: The decoder.
        tokenizer: Its tokenizer, whose chat template writes the conversations.
        name: The model's name.
        plan: What is distilled.
        folder: The data set's folder, which holds the finished batches meanwhile.
        minutes: Start no batch that would end later; `None` for no limit.
        report: Called with each line of progress.
        force: Distill anew, whatever an earlier run left in `folder`. Its data set stays until the new one is complete.

    Returns:
        The data set.

    Raises:
        DataError: `folder` holds the work of another plan.
        CapacityError: The rows do not fit the model or the device's memory.
        PromptError: The model's chat template cannot serve the plan.
    """
    began = time.monotonic()
    eos = end_token_ids(model, tokenizer)
    facts = DataFacts(name, model_digest(model), int(model.config.vocab_size), eos, plan.seed, plan.settings())
    finished = (folder / dataset.META_NAME).is_file()
    if force:
        checkpoint.remove_checkpoint(folder)
    elif finished and not checkpoint.replaces_data(folder):
        return _finished_data(folder, facts, model, report)
    check_context(model.config.to_dict(), plan.context)
    partial = checkpoint.open_checkpoint(folder, facts, replaces=finished)
    template, follow_ups = _split_template(tokenizer, plan, eos, report)
    batches = split_batches(_requests(tokenizer, plan, report), plan.batch)
    throughput = None
    if batches:
        script_settings = ScriptSettings(plan.context, plan.max_new_tokens, template, follow_ups)
        ends = template.ends if template else EndTokens(eos)
        throughput = generate_batches(
            batches,
            _generator(model, len(batches[0]), plan, ends, report),
            lambda batch: make_scripts(tokenizer, batch, script_settings),
            partial,
            context=plan.context,
            seed=plan.seed,
            until=math.inf if minutes is None else began + 60 * minutes,
        )
    rows = _cleaned_rows(tokenizer, plan, batches, partial) + _ready_rows(tokenizer, plan, eos, report)
    if not rows:
        raise DataError("no answer was finished; give more prompts, more time or a larger --context")
    result = dataset.from_rows(facts, rows)
    dataset.save_data(result, folder)
    checkpoint.remove_checkpoint(folder)
    rate = ""
    if throughput and throughput.answer_tokens:
        rate = f", {throughput.answer_tokens / throughput.seconds:,.0f} answer tokens/s"
    seconds = time.monotonic() - began
    report(
        f"{result.rows} conversations, {int(result.answer.sum()):,} answer tokens, {seconds:.0f} s{rate} -> {folder}"
    )
    return result


def _finished_data(folder: Path, facts: DataFacts, model: Any, report: Report) -> DataSet:
    """Load the data set in `folder`, which is finished, if it is the one asked for."""
    found = without_review(dataset.load_facts(folder))
    if is_distilled_from(found.digest, model):  # earlier versions hashed less
        found = replace(found, digest=facts.digest)
    if differing := describe_differences(json.loads(json.dumps(asdict(found))), asdict(facts)):
        raise DataError(
            f"{folder}: holds a data set that was distilled with other arguments ({differing}); give the same ones, "
            "another folder, or --force to distill anew"
        )
    if DATA[PARTIAL].is_ours(folder / PARTIAL):  # left by a run that was killed after it had saved the data set
        checkpoint.remove_checkpoint(folder)
    report(f"{folder} is up to date; --force distills anew")
    return dataset.load_data(folder)


def _split_template(
    tokenizer: Any, plan: DistillationPlan, eos: tuple[int, ...], report: Report
) -> tuple[TemplateParts | None, bool]:
    """Return the parts of the chat template, and whether the model can generate user turns.

    Raises:
        PromptError: The plan needs conversations that the model opens itself, but it cannot open any.
    """
    template, reason = None, "no special token ends a user turn in the chat template"
    try:
        template = split_template(tokenizer, eos)
    except PromptError as error:
        reason = str(error)
    able = template is not None and template.ends.user is not None
    if plan.synthesize and not (able and template is not None and len(template.before_user)):
        reason = reason if not able else "the chat template writes nothing before a user turn"
        raise PromptError(
            f"--synthesize needs user turns that the model can generate, but {reason}; leave it out and give --prompts"
        )
    if template is None and any(len(turns) > 1 for turns in plan.conversations):
        report(f"only the first turn of each prompt is answered: {reason}")
    if plan.follow_ups and not able and plan.conversations:
        report(f"no follow-ups: {reason}")
    return template, plan.follow_ups and able


def _requests(tokenizer: Any, plan: DistillationPlan, report: Report) -> list[Request]:
    """Return the plan's requests, without prompts that are excluded or too long, whose number is reported."""
    allowed = prompts.without(plan.conversations, plan.excluded)
    short = drop_long_prompts(tokenizer, allowed, plan.context - plan.max_new_tokens)
    left_out = f"{len(plan.conversations) - len(allowed)} left out by --exclude"
    report(f"{len(short)} prompts; {left_out}, {len(allowed) - len(short)} too long for --context")
    return shuffle_requests(short, plan.synthesize, plan.temperatures, plan.seed)


def _generator(model: Any, rows: int, plan: DistillationPlan, ends: EndTokens, report: Report) -> RowGenerator:
    """Return the lockstep generator if it works with the model, else transformers' `generate`, which is reported."""
    reason = lockstep_obstacle(model, plan.context)
    if reason is None:
        return LockstepGenerator(model, rows, plan.context, ends, plan.sampling, report)
    report(f"answers are generated by transformers' generate, which is slow: {reason}")
    return TransformersGenerator(model, plan.context, ends, plan.sampling)


def _cleaned_rows(
    tokenizer: Any, plan: DistillationPlan, batches: Sequence[Sequence[Request]], partial: Path
) -> list[Row]:
    """Return the data set's rows of all finished batches."""
    refused = prompts.turn_keys(plan.excluded)
    openings = prompts.turn_keys(turns[:1] for turns in plan.conversations)

    def decode(tokens: list[Ids]) -> list[str]:
        texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []
        return texts

    rows: list[Row] = []
    for number, batch in enumerate(batches):
        if checkpoint.is_saved(partial, number):
            rows += clean_rows(batch, checkpoint.load_batch(partial, number), decode, refused, openings)
    return rows


def _ready_rows(tokenizer: Any, plan: DistillationPlan, eos: tuple[int, ...], report: Report) -> list[Row]:
    """Return the rows of the plan's ready conversations, without those that share a turn with an excluded one."""
    refused = prompts.turn_keys(plan.excluded)
    allowed = [ready for ready in plan.answers if not prompts.shares_turn(ready.turns, refused)]
    rows = conversation_rows(tokenizer, allowed, plan.context, eos)
    if plan.answers:
        left_out = f"{len(plan.answers) - len(allowed)} left out by --exclude"
        report(
            f"{len(rows)} ready conversations; {left_out}, {len(allowed) - len(rows)} without an answer in --context"
        )
    return rows
