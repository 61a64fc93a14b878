"""Measures constrained decoding with drafts against plain constrained decoding, which takes a step for every token.

Every prompt asks for a document of a JSON schema. It is answered by plain decoding and by each draft in turns, with the
same masks, so that the speed of a machine which drifts is the same for all. Answers are checked: all are JSON, and how
many equal those of plain decoding in every token is counted. Prefill and first token are not counted in tokens per
second.

    python benchmarks/structured_outputs.py BUNDLE --precision w8a8 --rounds 3
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_runtime.engine import Engine
from medusa_runtime.results import GenerationResult
from medusa_runtime.sampling_params import DRAFTS, SamplingParams

PLAIN, FREE = "plain", "free"  # plain constrained decoding; plain decoding without a schema, for the cost of masks


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(length: int) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": length}


def _list(items: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_NUMBER = {"type": "integer", "minimum": 0, "maximum": 10_000}
_DATE = {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"}
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "person": (
        "Invent a person and describe them as JSON.",
        _object(
            first_name=_text(20),
            last_name=_text(20),
            age={"type": "integer", "minimum": 18, "maximum": 99},
            address=_object(street=_text(30), city=_text(30), postal_code={"type": "string", "pattern": "^[0-9]{5}$"}),
            email_addresses=_list(_object(kind={"enum": ["home", "work"]}, address=_text(40)), 1, 2),
        ),
    ),
    "invoice": (
        "Write an invoice for three office items as JSON.",
        _object(
            invoice_number={"type": "string", "pattern": "^INV-[0-9]{4}$"},
            issue_date=_DATE,
            line_items=_list(_object(description=_text(30), quantity=_NUMBER, unit_price_cents=_NUMBER), 3, 3),
            payment_status={"enum": ["paid", "unpaid", "overdue"]},
        ),
    ),
    "extraction": (
        "Extract the meetings as JSON. On 2025-03-04 Anna Berg and Tom Reed meet in Berlin about the budget. On "
        "2025-04-11 Lucy Hall and Omar Said meet in Cairo about the new bridge.",
        _object(
            meetings=_list(
                _object(meeting_date=_DATE, location=_text(20), participants=_list(_text(30), 2, 2), topic=_text(40)),
                2,
                2,
            )
        ),
    ),
    "review": (
        "Rate this review as JSON: 'The battery lasts two days, but the screen scratches easily and support was rude.'",
        _object(
            overall_sentiment={"enum": ["positive", "negative", "mixed"]},
            aspects=_list(
                _object(
                    aspect_name=_text(20), sentiment={"enum": ["positive", "negative"]}, confidence_percent=_NUMBER
                ),
                3,
                3,
            ),
            would_recommend={"type": "boolean"},
        ),
    ),
    "call": (
        "Book a table for four at an Italian restaurant in Rome tomorrow evening: write the call of the tool as JSON.",
        _object(
            tool_name={"const": "book_restaurant_table"},
            arguments=_object(
                restaurant_cuisine={"enum": ["italian", "french", "indian"]},
                city_name=_text(20),
                number_of_guests={"type": "integer", "minimum": 1, "maximum": 20},
                reservation_time={"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
                outdoor_seating={"type": "boolean"},
            ),
        ),
    ),
}


@dataclass
class Totals:
    """Answers of one way of decoding."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    answers: int = 0
    as_plain: int = 0

    def add(self, result: GenerationResult, plain: GenerationResult) -> None:
        """Count an answer."""
        self.tokens += len(result.token_ids) - 1
        self.steps += result.steps
        self.seconds += result.times.decode
        self.answers += 1
        self.as_plain += result.token_ids == plain.token_ids

    def as_json(self, plain: Totals) -> dict[str, Any]:
        """Return the figures; `speedup` is that of the tokens per second of all answers."""
        return {
            "answers": self.answers,
            "as_plain": self.as_plain,
            "tokens": self.tokens,
            "tokens_per_step": self.tokens / self.steps,
            "tokens_per_second": self.tokens / self.seconds,
            "speedup": self.tokens / self.seconds * plain.seconds / plain.tokens,
        }


def measure(engine: Engine, drafts: list[str], rounds: int, tight: bool, max_tokens: int) -> dict[str, Totals]:
    """Answer all prompts in every way, in an order that rotates; the first round is a warm-up."""
    totals = {name: Totals() for name in (PLAIN, FREE, *drafts)}
    for number in range(rounds + 1):
        for turn, (prompt, schema) in enumerate(PROMPTS.values()):
            structured = {"json": schema, "disable_any_whitespace": tight}
            ways: dict[str, dict[str, Any]] = {
                PLAIN: {"structured_outputs": structured, "profile": PLAIN},
                FREE: {"profile": PLAIN, "min_tokens": max_tokens // 4, "max_tokens": max_tokens // 4},
                **{draft: {"structured_outputs": structured, "draft": draft} for draft in drafts},
            }
            names = list(ways)
            shift = (number + turn) % len(names)
            results = {
                way: engine.generate(prompt, SamplingParams(**{"max_tokens": max_tokens} | ways[way]))
                for way in names[shift:] + names[:shift]
            }
            for way, result in results.items():
                if way != FREE and result.finish_reason == "stop":
                    json.loads(result.text)
                if number:
                    totals[way].add(result, results[PLAIN])
    return totals


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision")
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--draft", action="append", choices=DRAFTS, help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=300)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with Engine.load(options.bundle, backend=options.backend, precision=options.precision) as engine:
        for tight in (True, False):
            layout = "without white space" if tight else "white space as the model likes"
            totals = measure(engine, options.draft or list(DRAFTS), options.rounds, tight, options.max_tokens)
            figures[layout] = {name: found.as_json(totals[PLAIN]) for name, found in totals.items()}
            print(f"{layout}:")
            for name, one in figures[layout].items():
                print(
                    f"  {name:6} {one['tokens_per_second']:6.1f} tokens/s, {one['tokens_per_step']:.2f} tokens/step, "
                    f"{one['speedup']:.2f} times plain, {one['as_plain']} of {one['answers']} answers as plain",
                    flush=True,
                )


if __name__ == "__main__":
    main()
