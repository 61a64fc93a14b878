"""One run of the bench: which cases there are, and every backend taken through each of them."""

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

Report = Callable[[str], None]  # takes a line that says how far the work is


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    categories: of each prompt, None for none. texts: prompts of token ids, by their length. first_only: no later turns
    of a conversation. max_length: tokens a sequence may come to, None for the model's context. gpu: its number.
    """

    bundle: Bundle
    encoder: PromptEncoder
    prompts: Sequence[Turns]
    categories: Sequence[str | None]
    texts: Mapping[int, Sequence[Sequence[int]]]
    trees: Sequence[TreeProfile]
    cases: Sequence[Case]
    first_only: bool
    recording: RecordedAcceptance | None
    max_length: int | None = None
    gpu: int = 0

    def ends(self, case: Case) -> bool:
        """Whether answers end by themselves: those to prompts of a length, and tokens without meaning, do not."""
        return case.prompt_length is None and self.recording is None


def open_backends(
    job: Job, workers: Mapping[str, Worker], precision: str | None, threads: int | None, report: Report
) -> dict[str, LoadedBackend]:
    """Load every backend; those that cannot be are left out. Raises MedusaError where none can."""
    setup = WorkerSettings(job.bundle, job.trees, precision, threads, job.max_length, job.recording, job.gpu)
    opened = {}
    for name, worker in workers.items():
        report(f"backend {name}: loading")
        found = worker.open(setup)
        if found is None:
            report(f"FAILED: {worker.failure}")
        else:
            opened[name] = found
            report(f"backend {name}: {found.facts.library} {found.facts.version} on {found.facts.device}")
    if not opened:
        raise MedusaError("; ".join(str(worker.failure) for worker in workers.values()))
    return opened


def check_capacity(job: Job, opened: Mapping[str, LoadedBackend]) -> int:
    """Return how many tokens every backend takes; CapacityError for a case that needs more, before any is run."""
    name, context = min(((name, one.context) for name, one in opened.items()), key=lambda pair: pair[1])
    nodes = max(tree.size for tree in job.trees)
    for length, new in job.cases:
        if length is not None and length + new + nodes > context:
            raise CapacityError(
                f"prompts of {length} tokens, {new} new ones and a tree of {nodes} nodes are {length + new + nodes} in "
                f"all; {name} takes {context}: ask for fewer by --prompt-length or --max-new-tokens"
            )
    return context


def run_case(
    job: Job, case: Case, workers: Mapping[str, Worker], context: int, report: Report
) -> tuple[list[BackendMeasurements], list[Skipped]]:
    """Ask every prompt of one case, and tell how far it is. Raises PromptError naming one that cannot be laid out."""
    done: list[BackendMeasurements] = []
    skipped: list[Skipped] = []
    names = [tree.name for tree in job.trees]
    tokens, steps = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    failed = {name for name, worker in workers.items() if worker.failure}
    for answers in _asked(job, case, workers, context):
        if isinstance(answers, Skipped):
            skipped.append(answers)
            report(f"prompt {answers.prompt}/{len(job.prompts)}, turn {answers.turn}: {answers.describe()}")
            continue
        done.append(answers)
        for name in workers.keys() - answers.keys() - failed:
            failed.add(name)
            report(f"FAILED: {workers[name].failure}")
        turn = next(iter(answers.values()))
        for name, run in turn.trees.items():
            tokens[name] += len(run.tokens) - 1
            steps[name] += run.steps
        so_far = ", ".join(f"{name} {tokens[name] / steps[name]:.2f}" for name in tokens if steps[name])
        where = f"prompt {turn.question.prompt}/{len(job.prompts)}, turn {turn.question.turn}"
        report(f"{where}: {len(turn.plain.tokens)} tokens; tokens/step so far: {so_far or 'none'}")
    return done, skipped


def _asked(
    job: Job, case: Case, workers: Mapping[str, Worker], context: int
) -> Iterator[BackendMeasurements | Skipped]:
    if case.prompt_length is not None:
        yield from ask_each(workers, job.texts[case.prompt_length], case.max_new_tokens)
        return
    yield from converse(
        workers,
        job.encoder,
        context,
        job.prompts,
        max_new_tokens=case.max_new_tokens,
        first_only=job.first_only,
        ends=job.ends(case),
    )
