"""The graph contract: names, shapes and types of one step's inputs and outputs.

One step = draft, then verify. B sequences, T nodes each, P rows of past bound, R rows whose logits are wanted,
N in {0, B} draft rows (0 skips the heads: plain decoding and prefill), S what the heads see of a token (the hidden
size, and as much again for every layer they tap), V vocabulary, W = kv_heads * head_dim elements of one token's K or V
row of one layer.

It has three forms. As traced, the past is read only and comes as rows, and a step gives its new rows (`input_specs`,
`output_specs`). In place, one sequence at a time, the past is a buffer of C rows for each key head, which is an input
and an output at once: a step writes its T rows behind the `past_length` real ones, where the next step finds them or
writes over them (`in_place_specs`). On a GPU no size may depend on a number there: P is then the length of one input
more, `past_rows`, past_length at least, and P + T at most C. Beside that graph there may be another one, for tokens in
a row: it lacks the inputs `CAUSAL_OMITTED_INPUTS`, and each of its rows sees all that is before it. Stacked, as traced
but for one input of all layers' past rows and one output of all new ones (`stacked_specs`).
"""

from __future__ import annotations

from dataclasses import dataclass

INPUT_IDS = "input_ids"  # (B, T) int32: a literal token, or -1 - (head * top_k + rank); column 0 is the root
POSITION_IDS = "position_ids"  # (B, T) int32: past_length + depth of the node
TREE_MASK = "tree_mask"  # (B, T, T) bool: node i may see node j of this step
PAST_LENGTH = "past_length"  # (B,) int32: rows of the past that are real
DRAFT_HIDDEN = "draft_hidden"  # (N, S) float: the hidden state whose logits gave the root
LOGIT_ROWS = "logit_rows"  # (B, R) int32: the rows that need logits
PAST = "past"  # (B, P, 2 * layers * W) float, together: a token's keys of all layers, then its values
PAST_ROWS = "past_rows"  # (P,) int32, in place on a GPU: 0, 1, …, as many as rows of the past may be seen

CAUSAL_OMITTED_INPUTS = (TREE_MASK, DRAFT_HIDDEN)

# Of a buffer in place, behind the capacity that steps may fill: a graph may put a dummy beside a row that stands alone.
SPARE_ROWS = 1

TOKENS = "tokens"  # (B, T) int32: input_ids with the candidates filled in
ARGMAX = "argmax"  # (B, R) int32: greedy next token at each wanted row
LOGITS = "logits"  # (B, R, V) float
HIDDEN = "hidden"  # (B, T, S) float: after the final norm; behind it what the tapped layers read
NEW = "new"  # (B, T, 2 * layers * W) float, together: this step's keys of all layers, then its values


def past_key(layer: int) -> str:
    """(B, P, W) float, input: this layer's keys of the past, one token a contiguous row."""
    return f"past_key_{layer}"


def past_value(layer: int) -> str:
    """(B, P, W) float, input: this layer's values of the past."""
    return f"past_value_{layer}"


def present_key(layer: int) -> str:
    """(1, kv_heads, C, head_dim) float, output, in place: the buffer that `past_key` names."""
    return f"present_key_{layer}"


def present_value(layer: int) -> str:
    """(1, kv_heads, C, head_dim) float, output, in place: the buffer that `past_value` names."""
    return f"present_value_{layer}"


def new_key(layer: int) -> str:
    """(B, T, W) float, output: this step's keys only."""
    return f"new_key_{layer}"


def new_value(layer: int) -> str:
    """(B, T, W) float, output: this step's values only."""
    return f"new_value_{layer}"


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: its name, its ONNX element type, and its dimensions (a str is symbolic)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def input_specs(layers: int, state_size: int, kv_row: int, dtype: str = "float32") -> tuple[TensorSpec, ...]:
    """All inputs of a graph, in order. `state_size` is S, `dtype` that of KV rows: all other floats are float32."""
    return (
        TensorSpec(INPUT_IDS, "int32", ("B", "T")),
        TensorSpec(POSITION_IDS, "int32", ("B", "T")),
        TensorSpec(TREE_MASK, "bool", ("B", "T", "T")),
        TensorSpec(PAST_LENGTH, "int32", ("B",)),
        TensorSpec(DRAFT_HIDDEN, "float32", ("N", state_size)),
        TensorSpec(LOGIT_ROWS, "int32", ("B", "R")),
        *(TensorSpec(past_key(i), dtype, ("B", "P", kv_row)) for i in range(layers)),
        *(TensorSpec(past_value(i), dtype, ("B", "P", kv_row)) for i in range(layers)),
    )


def output_specs(
    layers: int, state_size: int, vocab_size: int, kv_row: int, dtype: str = "float32"
) -> tuple[TensorSpec, ...]:
    """All outputs of a graph, in order."""
    return (
        TensorSpec(TOKENS, "int32", ("B", "T")),
        TensorSpec(ARGMAX, "int32", ("B", "R")),
        TensorSpec(LOGITS, "float32", ("B", "R", vocab_size)),
        TensorSpec(HIDDEN, "float32", ("B", "T", state_size)),
        *(TensorSpec(new_key(i), dtype, ("B", "T", kv_row)) for i in range(layers)),
        *(TensorSpec(new_value(i), dtype, ("B", "T", kv_row)) for i in range(layers)),
    )


def stacked_specs(
    layers: int, state_size: int, vocab_size: int, kv_row: int, dtype: str = "float32"
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """All inputs, and all outputs, of a graph whose rows are one tensor for all layers, a token a row."""
    width = 2 * layers * kv_row
    past, new = TensorSpec(PAST, dtype, ("B", "P", width)), TensorSpec(NEW, dtype, ("B", "T", width))
    return (*input_specs(0, state_size, 0), past), (*output_specs(0, state_size, vocab_size, 0), new)


def in_place_specs(
    layers: int,
    state_size: int,
    vocab_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: str = "float32",
    *,
    bound: bool = False,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """All inputs, and all outputs, of a graph that writes its rows in place: B is 1, and C the buffers' capacity.

    bound: whether `past_rows` is among the inputs.
    """
    buffer = (1, kv_heads, "C", head_dim)
    step, results = (
        tuple(TensorSpec(one.name, one.dtype, tuple(1 if size == "B" else size for size in one.shape)) for one in specs)
        for specs in (input_specs(0, state_size, 0, dtype), output_specs(0, state_size, vocab_size, 0, dtype))
    )
    pasts, presents = (
        tuple(TensorSpec(name(i), dtype, buffer) for name in names for i in range(layers))
        for names in ((past_key, past_value), (present_key, present_value))
    )
    more = (TensorSpec(PAST_ROWS, "int32", ("P",)),) if bound else ()
    return (*step, *pasts, *more), (*results, *presents)
