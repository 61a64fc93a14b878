"""Time trees against plain decoding, interleaved, and boil the runs down to figures."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from medusa_profiles.profile import TreeProfile
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.engine import Engine
from medusa_runtime.errors import BundleError, MedusaError, PromptError
from medusa_runtime.threads import default_threads, physical_cores

from medusa_exporter.prompts import Turns, read_prompts
from medusa_exporter.sources import versions as maker_versions
from medusa_exporter.verify import Difference, compare, is_exact, next_logits

FIGURES = ("tokens_per_step", "plain_step_ms", "medusa_step_ms", "overhead", "speedup", "host_us_per_step")
PERCENTILES = (10, 50, 90)


@dataclass(frozen=True)
class Run:
    """One decode: the answer's tokens, the prefill's one included; the steps behind it and their wall time.

    host_seconds: the part of `seconds` that is not the backend's own run: binding, accept rule, commit.
    """

    tokens: tuple[int, ...]
    steps: int
    seconds: float
    host_seconds: float


@dataclass(frozen=True)
class Turn:
    """One user message answered by plain decoding and by every tree; `prompt` and `turn` count from 1."""

    prompt: int
    turn: int
    prompt_ids: tuple[int, ...]
    plain: Run
    trees: dict[str, Run]  # by profile
    differences: dict[str, Difference] = field(default_factory=dict)  # by profile, where tokens part from plain's


@dataclass(frozen=True)
class Skipped:
    """A message that leaves no room for an answer: `tokens` of prompt against the model's `context`."""

    prompt: int
    turn: int
    tokens: int
    context: int

    def describe(self) -> str:
        """Say in a few words what was skipped and why."""
        return f"SKIPPED, {self.tokens} tokens of prompt leave no room in the context of {self.context}"


def run_once(decoder: Decoder, prompt_ids: Sequence[int], max_new_tokens: int) -> Run:
    """Answer one prompt with the decoder's present tree and time its steps; prefill and text are not timed.

    Raises PromptError or CapacityError for a prompt that cannot be answered.
    """
    decoder.start(prompt_ids, max_new_tokens)
    sequence, backend = decoder.sequence, decoder.backend
    assert sequence is not None  # noqa: S101 -- start() has just set it
    steps, seconds, device = 0, 0.0, 0.0
    while sequence.finish is None:
        started = perf_counter()
        decoder.step()
        seconds += perf_counter() - started
        device += backend.run_seconds
        steps += 1
    return Run(tuple(sequence.answer), steps, seconds, seconds - device)


def warm_up(decoder: Decoder) -> None:
    """Take a step or two with the decoder's present tree, so that its buffers exist before a clock runs."""
    decoder.start([0], 3, stop_ids=())
    while decoder.sequence is not None and decoder.sequence.finish is None:
        decoder.step()


def walk(
    engine: Engine,
    conversations: Iterable[Turns],
    trees: Sequence[TreeProfile],
    *,
    max_new_tokens: int,
    first_only: bool = False,
    warm: bool = False,
) -> Iterator[Turn | Skipped]:
    """Answer every user message by plain decoding and by every tree, on one backend, before the next message.

    All answer the same tokens: from the second message on, the conversation holds the plain answers. Who comes first
    rotates from conversation to conversation. A message too long for the context is skipped, with what follows it.
    Raises PromptError naming the prompt that cannot be laid out.
    """
    modes = [TreeProfile.plain(), *trees]
    for number, turns in enumerate(conversations, start=1):
        shift = (number - 1) % len(modes)
        messages: list[dict[str, str]] = []
        for turn, text in enumerate(turns[:1] if first_only else turns, start=1):
            messages.append({"role": "user", "content": text})
            try:
                ids = engine.encode(messages)
            except PromptError as error:
                raise PromptError(f"prompt {number}, turn {turn}: {error}") from error
            if len(ids) >= engine.bundle.model.context:
                yield Skipped(number, turn, len(ids), engine.bundle.model.context)
                break
            runs: list[Run | None] = [None] * len(modes)
            for mode in [*range(shift, len(modes)), *range(shift)]:
                engine.decoder.use(modes[mode])
                if warm:
                    warm_up(engine.decoder)
                runs[mode] = run_once(engine.decoder, ids, max_new_tokens)
            plain, *others = (run for run in runs if run is not None)
            answered = dict(zip((tree.name for tree in trees), others, strict=True))
            reader = next_logits(engine.decoder)
            exact = is_exact(engine.decoder.backend.precision)
            found = {
                name: compare(ids, plain.tokens, run.tokens, reader, exact=exact) for name, run in answered.items()
            }
            differences = {name: difference for name, difference in found.items() if difference is not None}
            yield Turn(number, turn, tuple(ids), plain, answered, differences)
            messages.append({"role": "assistant", "content": engine.tokenizer.decode(plain.tokens)})


def aggregate(turns: Sequence[Turn], profile: TreeProfile, backend: str, precision: str) -> dict[str, Any]:
    """Boil the turns down to one profile's result: figures over all of them, and their spread over prompts.

    Figures are ratios of sums, so a long answer weighs more than a short one; `speedup` counts the turns whose tokens
    are plain decoding's. A figure is None where no step was taken.
    """
    by_prompt: dict[int, list[tuple[Run, Run]]] = defaultdict(list)
    for turn in turns:
        by_prompt[turn.prompt].append((turn.plain, turn.trees[profile.name]))
    single = [_figures(pairs) for pairs in by_prompt.values()]
    parted = [(turn, turn.differences[profile.name]) for turn in turns if profile.name in turn.differences]
    gaps = [difference.gap for _, difference in parted if difference.gap is not None]
    shares = [difference.share for _, difference in parted if difference.share is not None]
    return {
        "backend": backend,
        "precision": precision,
        "profile": profile.name,
        "nodes": profile.size,
        **_figures([pair for pairs in by_prompt.values() for pair in pairs]),
        "identical": not parted,
        "divergences": len(parted),
        "max_gap": max(gaps, default=None if parted else 0.0),
        "max_gap_share": max(shares, default=None if parted else 0.0),
        "failures": sum(difference.fails for _, difference in parted),
        "differences": [
            {"prompt": turn.prompt, "turn": turn.turn, **asdict(difference)} for turn, difference in parted
        ],
        "spread": {name: _spread([figures[name] for figures in single]) for name in FIGURES},
    }


def by_category(
    turns: Sequence[Turn], profile: TreeProfile, categories: Sequence[str | None]
) -> dict[str, dict[str, float | None]]:
    """Return `aggregate`'s figures for each category of prompts, and how many `prompts` of it were answered.

    categories: of prompt 1, 2, …; prompts without one are left out.
    """
    chosen: dict[str, list[Turn]] = defaultdict(list)
    for turn in turns:
        if category := categories[turn.prompt - 1]:
            chosen[category].append(turn)
    return {
        category: {
            "prompts": len({turn.prompt for turn in of}),
            **_figures([(turn.plain, turn.trees[profile.name]) for turn in of]),
        }
        for category, of in chosen.items()
    }


def _figures(pairs: Sequence[tuple[Run, Run]]) -> dict[str, float | None]:
    """Return FIGURES over (plain, medusa) runs, and the sums that let runs on parts of a file be put together.

    Those are the tree's `tokens` (prefill's not among them), its `steps` and plain decoding's `plain_steps`.
    """
    plain, medusa = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    same = [pair for pair in pairs if pair[0].tokens == pair[1].tokens]
    tokens = sum(len(run.tokens) - 1 for run in medusa)
    steps, plain_steps = (sum(run.steps for run in runs) for runs in (medusa, plain))
    seconds = sum(run.seconds for run in medusa)
    plain_ms = _ratio(1e3 * sum(run.seconds for run in plain), plain_steps)
    medusa_ms = _ratio(1e3 * seconds, steps)
    return {
        "tokens": tokens,
        "steps": steps,
        "plain_steps": plain_steps,
        "tokens_per_step": _ratio(tokens, steps),
        "plain_step_ms": plain_ms,
        "medusa_step_ms": medusa_ms,
        "overhead": _ratio(medusa_ms or 0.0, plain_ms or 0.0),
        "speedup": _ratio(sum(pair[0].seconds for pair in same), sum(pair[1].seconds for pair in same)),
        "host_us_per_step": _ratio(1e6 * sum(run.host_seconds for run in medusa), steps),
    }


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return the 10th, 50th and 90th percentile of the values there are."""
    present = [value for value in values if value is not None]
    points = np.percentile(present, PERCENTILES).tolist() if present else [None] * len(PERCENTILES)
    return {f"p{percent}": point for percent, point in zip(PERCENTILES, points, strict=True)}


def load_prompts(file: Path, limit: int | None) -> list[Turns]:
    """Read the first `limit` conversations of JSON lines with 'turns'; PromptError if there are none."""
    prompts = read_prompts(file)
    if not prompts:
        raise PromptError(f"{file} holds no prompts; expected JSON lines with 'turns', a list of user messages")
    return prompts[:limit]


def choose_trees(bundle: Bundle, names: Iterable[str]) -> list[TreeProfile]:
    """Return the named trees of a bundle, each once, or all that it has. Raises BundleError."""
    wanted = list(dict.fromkeys(names)) or bundle.manifest.profiles
    if not wanted:
        raise BundleError(f"{bundle.root} has no profiles, so no tree can be run; build it again with some")
    return [bundle.profile(name) for name in wanted]


def machine(threads: int | None) -> dict[str, Any]:
    """Describe what the figures were taken on."""
    return {
        "cpu": _cpu_model(),
        "cores": physical_cores(),
        "processors": os.cpu_count(),
        "threads": threads or default_threads(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape bundle and run."""
    return {"python": platform.python_version(), "numpy": np.__version__, **maker_versions()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on this system
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def check_output(file: Path, bundle: Path) -> None:
    """Make the folder that is to hold `file`, before hours of work; MedusaError for a place that cannot serve."""
    if file.is_dir():
        raise MedusaError(f"{file} is a folder; give the file to write")
    if file.resolve().is_relative_to(bundle.resolve()):
        raise MedusaError(f"{file} lies in the bundle, which must hold no other files; give another place")
    file.parent.mkdir(parents=True, exist_ok=True)
