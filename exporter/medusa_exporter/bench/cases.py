"""Runs the cases of a benchmark: loads the backends, then asks each of them the prompts of each case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from medusa_profiles.profile import TreeProfile
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import CapacityError, MedusaError
from medusa_runtime.prompt_encoder import PromptEncoder

from medusa_exporter.bench.conversations import BackendMeasurements, Skipped, ask_each, converse
from medusa_exporter.bench.forced_acceptance import RecordedAcceptance
from medusa_exporter.bench.results import Case
from medusa_exporter.bench.worker import LoadedBackend, Worker, WorkerSettings
from medusa_exporter.prompts import Turns

Report = Callable[[str], None]  # prints a line of progress


@dataclass(frozen=True)
class Job:
    """What a benchmark measures.

    Attributes:
        bundle: The bundle to measure.
        encoder: The bundle's chat template and tokenizer.
        prompts: The user messages of each conversation.
        categories: The category of each prompt, None for none.
        fixed_length_prompts: Token ids of prompts, by their length.
        trees: The trees to measure; plain decoding is always measured.
        cases: Pairs of prompt length and output length.
        first_only: Whether only the first message of each conversation is asked.
        forced: How many tokens each step accepts; None to let the model decide.
        max_length: Maximum number of tokens of a sequence; None for the model's context.
        gpu: Index of the GPU.
    """

    bundle: Bundle
    encoder: PromptEncoder
    prompts: Sequence[Turns]
    categories: Sequence[str | None]
    fixed_length_prompts: Mapping[int, Sequence[Sequence[int]]]
    trees: Sequence[TreeProfile]
    cases: Sequence[Case]
    first_only: bool
    forced: RecordedAcceptance | None
    max_length: int | None = None
    gpu: int = 0

    def stop_at_eos(self, case: Case) -> bool:
        """Whether end tokens end the answers: not for prompts of fixed length, nor where acceptance is forced."""
        return case.prompt_length is None and self.forced is None


def open_backends(
    job: Job, workers: Mapping[str, Worker], precision: str | None, threads: int | None, report: Report
) -> dict[str, LoadedBackend]:
    """Load every backend and return those that could be loaded.

    Raises:
        MedusaError: No backend could be loaded.
    """
    settings = WorkerSettings(job.bundle, job.trees, precision, threads, job.max_length, job.forced, job.gpu)
    opened = {}
    for name, worker in workers.items():
        report(f"backend {name}: loading")
        found = worker.open(settings)
        if found is None:
            report(f"FAILED: {worker.failure}")
        else:
            opened[name] = found
            report(f"backend {name}: {found.facts.library} {found.facts.version} on {found.facts.device}")
    if not opened:
        raise MedusaError("; ".join(str(worker.failure) for worker in workers.values()))
    return opened


def check_capacity(job: Job, opened: Mapping[str, LoadedBackend]) -> int:
    """Check that every case fits, and return the number of tokens that every backend has room for.

    Raises:
        CapacityError: A case needs more tokens.
    """
    name, context = min(((name, one.context) for name, one in opened.items()), key=lambda pair: pair[1])
    nodes = max((tree.size for tree in job.trees), default=1)
    for length, new in job.cases:
        if length is not None and length + new + nodes > context:
            raise CapacityError(
                f"prompts of {length} tokens, {new} new tokens and a tree of {nodes} nodes need {length + new + nodes} "
                f"tokens, expected at most the {context} of {name}; use a smaller --prompt-length or --max-new-tokens"
            )
    return context


def run_case(
    job: Job, case: Case, workers: Mapping[str, Worker], context: int, report: Report
) -> tuple[list[BackendMeasurements], list[Skipped]]:
    """Ask every prompt of one case and report progress; return the measurements and the messages skipped.

    Raises:
        PromptError: The chat template cannot write a prompt; the error names it.
    """
    done: list[BackendMeasurements] = []
    skipped: list[Skipped] = []
    names = [tree.name for tree in job.trees]
    tokens, steps = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    failed = {name for name, worker in workers.items() if worker.failure}
    for answers in _ask_prompts(job, case, workers, context):
        if isinstance(answers, Skipped):
            skipped.append(answers)
            report(f"prompt {answers.prompt}/{len(job.prompts)}, turn {answers.turn}: {answers.describe()}")
            continue
        done.append(answers)
        for name in workers.keys() - answers.keys() - failed:
            failed.add(name)
            report(f"FAILED: {workers[name].failure}")
        first = next(iter(answers.values()))
        for name, answer in first.trees.items():
            tokens[name] += len(answer.tokens) - 1
            steps[name] += answer.steps
        so_far = ", ".join(f"{name} {tokens[name] / steps[name]:.2f}" for name in tokens if steps[name])
        where = f"prompt {first.question.prompt}/{len(job.prompts)}, turn {first.question.turn}"
        report(f"{where}: {len(first.plain.tokens)} tokens; tokens/step so far: {so_far or 'none'}")
    return done, skipped


def _ask_prompts(
    job: Job, case: Case, workers: Mapping[str, Worker], context: int
) -> Iterator[BackendMeasurements | Skipped]:
    if case.prompt_length is not None:
        yield from ask_each(workers, job.fixed_length_prompts[case.prompt_length], case.max_new_tokens)
        return
    yield from converse(
        workers,
        job.encoder,
        context,
        job.prompts,
        max_new_tokens=case.max_new_tokens,
        first_only=job.first_only,
        stop_at_eos=job.stop_at_eos(case),
    )
