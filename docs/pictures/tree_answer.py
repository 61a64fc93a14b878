"""Draws a tree at work: an animated SVG with one frame for each step of a real answer.

    python docs/pictures/tree_answer.py bundles/smollm2-135m-instruct "What is a hash table?" -o docs/tree_answer.svg

Each frame shows the tokens that the heads proposed, the path that the decoder accepted (green), and the answer so far.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from medusa_profiles.profile import TreeProfile
from medusa_runtime.accept import Acceptance, greedy
from medusa_runtime.loading import LoadedBundle, load_bundle
from medusa_runtime.rows import RowReader

SECONDS = 1.6  # how long one frame is shown
WIDTH, COLUMN, ROW, BOX = 880, 172, 25, 140  # pixels: the picture, one depth of the tree, one leaf, one node
TREE_TOP, LINE, CHARACTERS = 118, 18, 108  # pixels above the tree, pixels of a text line, characters in it
STYLE = """
  text { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #24292f; }
  .page { fill: #ffffff; } .box { fill: #f6f8fa; stroke: #8c959f; } .edge { stroke: #8c959f; fill: none; }
  .kept .box { fill: #dafbe1; stroke: #1a7f37; stroke-width: 1.6; } .kept.edge { stroke: #1a7f37; stroke-width: 2.2; }
  .new { fill: #1a7f37; font-weight: bold; } .note { fill: #57606a; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .page { fill: #0d1117; } .box { fill: #161b22; stroke: #6e7681; } .edge { stroke: #6e7681; }
    .kept .box { fill: #12361f; stroke: #3fb950; } .kept.edge { stroke: #3fb950; }
    .new { fill: #3fb950; } .note { fill: #9198a1; }
  }
"""


@dataclass(frozen=True)
class Frame:
    """One step: the T node labels of the tree, the accepted nodes (root first), and the answer before and after it."""

    labels: list[str]
    path: list[int]
    before: str
    added: str
    tokens: int  # in the answer after this step


def record(loaded: LoadedBundle, prompt: str, max_new_tokens: int) -> list[Frame]:
    """Answer `prompt` greedily and return one frame for each step."""
    decoder, tokenizer = loaded.decoder, loaded.tokenizer
    steps: list[tuple[list[int], list[int]]] = []

    def observed(tree: TreeProfile, tokens: Sequence[int], argmax: Sequence[int], logits: RowReader) -> Acceptance:
        verdict = greedy(tree, tokens, argmax, logits)
        steps.append((list(tokens), list(verdict[0])))
        return verdict

    decoder.accept = observed
    answer = decoder.start(loaded.prompt_encoder.encode(prompt), max_new_tokens)
    frames = []
    while decoder.sequence is not None and decoder.sequence.finish_reason is None:
        before = tokenizer.decode(answer)
        answer += decoder.step()
        tokens, path = steps[-1]
        after = tokenizer.decode(answer)
        frames.append(
            Frame([tokenizer.decode([token]) for token in tokens], path, before, after[len(before) :], len(answer))
        )
    return frames


def draw(profile: TreeProfile, prompt: str, frames: list[Frame]) -> str:
    """Return the SVG as text."""
    places = _places(profile)
    height = TREE_TOP + ROW * (1 + max(row for _, row in places)) + 8
    seconds = SECONDS * len(frames)
    show = (
        f"@keyframes show {{ 0% {{ opacity: 1 }} {100 / len(frames):.4f}% {{ opacity: 0 }} 100% {{ opacity: 0 }} }}\n"
        f"  .frame {{ opacity: 0; animation: show {seconds:.1f}s infinite step-end; }} .frame.last {{ opacity: 1 }}\n"
        "  @media (prefers-reduced-motion: reduce) { .frame { animation: none; } }"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">',
        f"<title>{escape(profile.name)} answers: {escape(prompt)}</title>",
        f"<style>{STYLE}  {show}\n</style>",
        f'<rect class="page" width="{WIDTH}" height="{height:.0f}"/>',
    ]
    titles = ["last token", *(f"head {head} proposes" for head in range(profile.depth))]
    for column, title in enumerate(titles):
        parts.append(f'<text x="{12 + COLUMN * column}" y="{TREE_TOP - 9}" class="note">{title}</text>')
    for number, frame in enumerate(frames):
        last = " last" if number == len(frames) - 1 else ""
        delay = SECONDS * (number - len(frames))
        parts.append(f'<g class="frame{last}" style="animation-delay: {delay:.1f}s">')
        parts += [*_text(prompt, frame, number + 1), *_tree(profile, places, frame)]
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _places(profile: TreeProfile) -> list[tuple[int, float]]:
    """Return each node's column (its depth) and row: one row for each leaf, a parent in the row of its first child."""
    rows, leaves = [0.0] * profile.size, 0
    for node in range(profile.size):  # depth-first order: a node without children is the next leaf
        if not profile.children[node]:
            rows[node], leaves = float(leaves), leaves + 1
    for node in reversed(range(profile.size)):
        if profile.children[node]:
            rows[node] = rows[profile.children[node][0]]
    return [(int(depth), row) for depth, row in zip(profile.depths, rows, strict=True)]


def _text(prompt: str, frame: Frame, steps: int) -> list[str]:
    """Return the question, the number of tokens and steps, and the answer's last lines with its new part in green."""
    text, start = frame.before + frame.added, len(frame.before)
    lines = [(first, text[first : first + CHARACTERS]) for first in range(0, len(text), CHARACTERS)][-3:]
    summary = f"{frame.tokens} tokens, {steps} step{'s' * (steps > 1)} after the prompt"
    parts = [f'<text x="12" y="20" class="note">{escape(prompt)}</text>']
    parts.append(f'<text x="{WIDTH - 12}" y="20" class="note" text-anchor="end">{summary}</text>')
    for number, (first, line) in enumerate(lines):
        old = min(max(start - first, 0), len(line))
        spans = f'<tspan>{_visible(line[:old])}</tspan><tspan class="new">{_visible(line[old:])}</tspan>'
        parts.append(f'<text x="12" y="{44 + LINE * number}" xml:space="preserve">{spans}</text>')
    return parts


def _tree(profile: TreeProfile, places: list[tuple[int, float]], frame: Frame) -> list[str]:
    """Return the edges and boxes of the tree, those of the accepted path marked."""
    kept, edges, boxes = set(frame.path), [], []
    for node, (column, row) in enumerate(places):
        x, y = 12 + COLUMN * column, TREE_TOP + ROW * row
        mark = "kept" if node in kept else ""
        if node:
            parent_column, parent_row = places[profile.parents[node]]
            left, top = 12 + COLUMN * parent_column + BOX, TREE_TOP + ROW * parent_row + 10
            middle = (left + x) / 2
            curve = f"M{left},{top:g} C{middle:g},{top:g} {middle:g},{y + 10:g} {x},{y + 10:g}"
            edges.append(f'<path class="edge {mark}" d="{curve}"/>')
        label = _visible(frame.labels[node][:15].replace(" ", "·"))
        box = f'<rect class="box" x="{x}" y="{y:g}" width="{BOX}" height="20" rx="5"/>'
        boxes.append(f'<g class="{mark}">{box}<text x="{x + 7}" y="{y + 14:g}">{label}</text></g>')
    return edges + boxes


def _visible(text: str) -> str:
    """Escape `text`, line breaks shown as one character."""
    return escape(text.replace("\n", "↵"))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("--profile", default="tree-16", help="the tree (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=36, help="length of the answer (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the SVG file to write")
    arguments = parser.parse_args()
    loaded = load_bundle(arguments.bundle, profile=arguments.profile)
    frames = record(loaded, arguments.prompt, arguments.max_new_tokens)
    arguments.output.write_text(draw(loaded.decoder.profile, arguments.prompt, frames), encoding="utf-8")


if __name__ == "__main__":
    main()
