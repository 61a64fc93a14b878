"""Results of peers.py as they would be after a measurement, with chosen times."""

from __future__ import annotations

from peers_results import Report, Results

TOKENS = 4  # of an answer; the first one is the prefill's


def facts(name: str, precision_class: str = "fp32", *, own: bool = False, plain: str | None = None, **more: object):
    return {
        "name": name,
        "precision_class": precision_class,
        "own": own,
        "speculates": plain is not None,
        "plain": plain,
        "identity": "1",
        "model_bytes": 2_000_000,
    } | more


def report(*seconds: float, answer: tuple[int, ...] = (5, 6, 7, 8), steps: int = TOKENS - 1) -> Report:
    """A report with an answer for each of `seconds`, the time of its decoding."""
    prompts = [
        {
            "tokens": TOKENS - 1,
            "steps": steps,
            "decode_seconds": second,
            "cores_used": 1.9,
            "other_load": 0.01,
            "answer": list(answer),
        }
        for second in seconds
    ]
    prefills = [{"prompt_tokens": 64, "prefill_seconds": second} for second in (0.07, 0.05, 0.06)]
    memory = {"rss": 300_000_000, "pss": 290_000_000, "anonymous": 100_000_000}
    return {"prompts": prompts, "prefills": prefills, "start_seconds": 0.5, "memory_bytes": memory}


def results(*measured: tuple[dict[str, object], list[Report]]) -> Results:
    """Results of contenders, each with its reports by round."""
    machine = {"processor": "CPU", "physical_cores": 2, "features": ["avx2"]}
    found = Results({"machine": machine, "settings": {"threads": 2}})
    for one, reports in measured:
        for number, each in enumerate(reports):
            found.add(one, number, each)
    return found
