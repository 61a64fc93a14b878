"""Verifies a bundle: every tree must give the tokens of plain decoding, and plain decoding those of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import MedusaError
from medusa_runtime.loading import LoadedBundle

from medusa_exporter.answer_differences import AnswerDifference, compare_answers, is_exact, next_logits
from medusa_exporter.bench.conversations import BackendMeasurements, Skipped, converse
from medusa_exporter.bench.timing import Measurement, TimedDecoder
from medusa_exporter.precisions import FORMATS
from medusa_exporter.prompts import Turns
from medusa_exporter.quality import Quality, Text, measure_quality
from medusa_exporter.transformers_reference import TransformersReference

Report = Callable[[str], None]


@dataclass(frozen=True)
class FoundDifference:
    """The first difference of one answer.

    Attributes:
        prompt: Number of the prompt, from 1.
        turn: Number of the user message in the prompt, from 1.
        subject: What was compared with what.
        difference: Position, tokens and gap.
    """

    prompt: int
    turn: int
    subject: str
    difference: AnswerDifference

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, those of the difference among them."""
        return {"prompt": self.prompt, "turn": self.turn, "subject": self.subject, **asdict(self.difference)}


@dataclass
class Verification:
    """What the answers to all prompts have shown.

    Attributes:
        texts: Each prompt with its answer by plain decoding.
        skipped: Number of conversations that were not answered to their end, because they do not fit the context.
        differences: The first difference of every answer that has one, ties included.
    """

    texts: list[Text] = field(default_factory=list)
    skipped: int = 0
    differences: list[FoundDifference] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of tokens in all answers."""
        return sum(len(text.answer) for text in self.texts)

    @property
    def failures(self) -> int:
        """Number of differences that are more than a tie."""
        return sum(found.difference.fails for found in self.differences)

    def describe(self) -> str:
        """Say in a few words how the answers compare."""
        if self.failures:
            return f"{self.failures} of {len(self.differences)} differences are more than a tie"
        return f"{len(self.differences)} ties, all else the same" if self.differences else "the same tokens"


def verify_answers(
    loaded: LoadedBundle,
    trees: Sequence[TreeProfile],
    prompts: Sequence[Turns],
    *,
    max_new_tokens: int,
    first_turn_only: bool = False,
    reference: TransformersReference | None = None,
    report: Report = lambda _line: None,
    show: Report = lambda _line: None,
) -> Verification:
    """Answer every prompt by plain decoding, by every tree and by the reference, and compare the tokens.

    Args:
        loaded: The bundle with one backend.
        trees: The trees to verify.
        prompts: The user messages of each conversation.
        max_new_tokens: Maximum number of tokens of an answer.
        first_turn_only: Whether to ask only the first message of each conversation.
        reference: The model as transformers runs it, or None to compare trees with plain decoding only.
        report: Called with a line of progress after each answer.
        show: Called with a line for each difference as soon as it is found.

    Raises:
        MedusaError: No prompt fits the context.
    """
    found = Verification()
    for measured in _answers(loaded, trees, prompts, max_new_tokens, first_turn_only):
        if isinstance(measured, Skipped):
            found.skipped += 1
            report(f"prompt {measured.prompt}/{len(prompts)}, turn {measured.turn}: {measured.describe()}")
            continue
        (answers,) = measured.values()  # one backend
        question, plain = answers.question, answers.plain.tokens
        found.texts.append(Text(question.ids, plain))
        report(
            f"prompt {question.prompt}/{len(prompts)}, turn {question.turn}: {len(question.ids)} tokens of prompt, "
            f"{len(plain)} answered"
        )
        for subject, difference in _differences(loaded, answers, reference, max_new_tokens):
            found.differences.append(FoundDifference(question.prompt, question.turn, subject, difference))
            show(f"prompt {question.prompt}, turn {question.turn}, {subject}: {difference.describe(loaded.tokenizer)}")
    if not found.texts:
        context = loaded.decoder.cache.context
        raise MedusaError(
            f"no prompt, of {len(prompts)}, fits the context of {context} tokens; expected at "
            "least one: shorten the prompts, or build the bundle with a larger --context"
        )
    return found


def measure_precisions(
    bundle: Bundle, backend: str, gpu: int, texts: Sequence[Text], report: Report = lambda _line: None
) -> dict[str, Quality]:
    """Compare each quantised graph of a backend with its fp32 graph on the same texts.

    Args:
        bundle: The bundle.
        backend: Name of the backend.
        gpu: Index of the GPU, for backends that use one.
        texts: Prompts with the answers on which the graphs are compared.
        report: Called with a line of progress for each precision.

    Returns:
        The quality of each quantised precision; empty if the backend has no fp32 graph or no other one.
    """
    quantised = measurable_precisions(bundle, backend)
    if not quantised:
        return {}
    found, reference = {}, load_backend(bundle, backend, gpu=gpu)
    for precision in quantised:
        report(f"quality of {precision} compared with fp32, on {len(texts)} answers")
        found[precision] = measure_quality(reference, load_backend(bundle, backend, precision, gpu=gpu), texts)
    return found


def measurable_precisions(bundle: Bundle, backend: str) -> list[str]:
    """Return the quantised precisions of a backend that can be compared with its fp32 graph; empty without one."""
    graphs = [facts.precision for facts in bundle.manifest.graphs.values() if facts.backend == backend]
    quantised = [precision for precision in FORMATS if precision in graphs and not is_exact(precision)]
    return quantised if len(quantised) < len(graphs) else []


def _answers(
    loaded: LoadedBundle,
    trees: Sequence[TreeProfile],
    prompts: Sequence[Turns],
    max_new_tokens: int,
    first_turn_only: bool,
) -> Iterator[BackendMeasurements | Skipped]:
    """Answer every user message by plain decoding and by every tree."""
    return converse(
        {loaded.decoder.backend.name: TimedDecoder(loaded.decoder, trees, warm=False)},
        loaded.prompt_encoder,
        loaded.decoder.cache.context,
        prompts,
        max_new_tokens=max_new_tokens,
        first_only=first_turn_only,
    )


def _differences(
    loaded: LoadedBundle, answers: Measurement, reference: TransformersReference | None, max_new_tokens: int
) -> Iterator[tuple[str, AnswerDifference]]:
    """Yield each difference of the answers to one message, with what was compared."""
    for name, difference in answers.differences.items():
        yield f"{name} against plain decoding", difference
    if reference is None:
        return
    prompt = answers.question.ids
    expected = reference.answer(prompt, max_new_tokens)
    readers = next_logits(loaded.decoder), reference.next_logits
    own = compare_answers(prompt, expected, answers.plain.tokens, *readers)
    if own is not None:
        yield "plain decoding against transformers", own
