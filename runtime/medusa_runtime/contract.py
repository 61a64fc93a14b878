"""The graph contract: names, shapes and element types of the inputs and outputs of one step.

One step drafts and verifies in one run of the graph: the Medusa heads propose candidates, a token tree is filled with
them, and the decoder computes logits at every node of the tree.

Symbols: B sequences, T tree nodes, P rows of past keys and values that are passed to the graph, R rows whose logits
are computed, S rows that are summarised (0, or R), K = min(64, V) entries of a summary, N draft rows (B, or 0 to skip
the heads, as prefill and plain decoding do), E elements of the state that the heads read (hidden size, times 1 + the
number of tapped layers), V vocabulary, D head dimension, and W = kv_heads * D elements of one token's key (or value) in
one layer.

========================  ==============  =======  ================================================================
Input                     Shape           Type     Meaning
========================  ==============  =======  ================================================================
``input_ids``             (B, T)          int32    A token id, or -1 - (head * top_k + rank) for a candidate of a
                                                   head (`medusa_profiles.node_ids`). Column 0 is the root and
                                                   always a token id.
``position_ids``          (B, T)          int32    ``past_length`` + depth of the node.
``tree_mask``             (B, T, T)       bool     Whether node i attends to node j of this step.
``past_length``           (B,)            int32    Valid rows of the past; every node attends to all of them.
``draft_hidden``          (N, E)          float32  ``hidden`` at the row whose logits chose the root token.
``logit_rows``            (B, R)          int32    Nodes whose logits are computed.
``summary_rows``          (B, S)          int32    Indices into ``logit_rows``, from 0 to R - 1: the rows of logits
                                                   that are summarised. Graphs for a GPU only.
``past_key_i``            (B, P, W)       float    Past keys of layer i; ``past_value_i`` holds the values.
========================  ==============  =======  ================================================================

========================  ==============  =======  ================================================================
Output                    Shape           Type     Meaning
========================  ==============  =======  ================================================================
``tokens``                (B, T)          int32    ``input_ids`` with each candidate replaced by its token id.
``argmax``                (B, R)          int32    Most likely next token at each of ``logit_rows``.
``logits``                (B, R, V)       float32  Logits at each of ``logit_rows``.
``finite``                (B, R)          bool     True only if all V logits of the row are finite; may be false where
                                                   just their sum overflows in fp32. Graphs for a GPU only, as are
                                                   the next three.
``top_ids``               (B, S, K)       int32    The K most likely tokens at each of ``summary_rows``, descending by
                                                   logit. Equal logits are in any order, and where they reach beyond
                                                   the last entry, any of them are there.
``top_logits``            (B, S, K)       float32  The logits of ``top_ids``.
``logsumexp``             (B, S)          float32  The natural logarithm of the sum of exp(logit) over all V tokens.
                                                   Unspecified, as the two above, where the row is not finite.
``hidden``                (B, T, E)       float32  Hidden state after the final norm, then what tapped layers read.
``new_key_i``             (B, T, W)       float    Keys of this step's nodes; ``new_value_i`` holds the values.
========================  ==============  =======  ================================================================

Example: ``top_k`` is 10, the past holds 5 tokens, the root token is 42, and the tree has the paths [0], [0, 0] and
[1]. So node 1 is head 0's most likely token, node 2 head 1's most likely token behind node 1, and node 3 head 0's
second::

    node       0 (root)   1    2    3          tree_mask    0 1 2 3
    depth      0          1    2    1                     0 x . . .
    input_ids  42        -1  -11   -2                     1 x x . .
    position_ids  5       6    7    6                     2 x x x .
    logit_rows    0       1    2    3                     3 x . . x
    past_length   5

    tokens     42         7   19    8
    argmax      7        19    3    5

Node 1 holds token 7, which is the decoder's choice at the root, and node 2 holds token 19, its choice at node 1: the
path [0, 1, 2] is accepted and token 3 follows it. The step yields the tokens 7, 19 and 3. The caller appends the rows
0, 1 and 2 of ``new_key_i`` and ``new_value_i`` to the past, which then has 8 rows, and discards row 3. The next root
is token 3, and ``hidden[0, 2]`` is the next ``draft_hidden``.

A row of logits stays in the memory of the device, and copying it to the host takes V floats. The summary of a row is
small, and it suffices for a check of the values, for log-probabilities, and for sampling wherever the choice provably
falls among the K most likely tokens. Every graph for a GPU has ``summary_rows`` and the four outputs of summaries; with
S = 0 they cost nothing. Graphs for a CPU have neither: there, logits are in the host's memory anyway.

A graph variant stores keys and values in one of three ways:

* One tensor per layer, as in the tables (`input_specs`, `output_specs`): the past is read only, and a step returns its
  new rows.
* Stacked (`stacked_specs`): as above, but one input holds the past rows of all layers and one output the new rows.
* In place, for one sequence (`in_place_specs`): each ``past_key_i`` is a buffer of C rows per key head, which is also
  the output ``present_key_i``. A step writes its T rows behind the ``past_length`` valid ones, and the next step reads
  or overwrites them there. On a GPU, where sizes may not depend on the values of a tensor, P is the length of one more
  input, ``past_rows``; it is at least ``past_length``, and P + T is at most C.

Next to an in-place GPU graph there may be a causal graph for steps without branches. It lacks the inputs in
`CAUSAL_OMITTED_INPUTS`, and each of its rows attends to all rows before it.
"""

from __future__ import annotations

from dataclasses import dataclass

INPUT_IDS = "input_ids"  # (B, T) int32: a token id, or -1 - (head * top_k + rank); column 0 is the root
POSITION_IDS = "position_ids"  # (B, T) int32: past_length + depth of the node
TREE_MASK = "tree_mask"  # (B, T, T) bool: node i attends to node j of this step
PAST_LENGTH = "past_length"  # (B,) int32: valid rows of the past
DRAFT_HIDDEN = "draft_hidden"  # (N, E) float: the hidden state whose logits chose the root
LOGIT_ROWS = "logit_rows"  # (B, R) int32: the nodes whose logits are computed
SUMMARY_ROWS = "summary_rows"  # (B, S) int32, on a GPU: indices into logit_rows, the rows that are summarised
PAST = "past"  # (B, P, 2 * layers * W) float, stacked: a token's keys of all layers, then its values
PAST_ROWS = "past_rows"  # (P,) int32, in place on a GPU: 0, 1, …, P - 1

CAUSAL_OMITTED_INPUTS = (TREE_MASK, DRAFT_HIDDEN)

# Rows of an in-place buffer behind the capacity that steps may fill: a graph may round its number of keys up.
SPARE_ROWS = 3
# Entries of a row's summary, where the vocabulary has so many tokens.
MAX_SUMMARY_TOKENS = 64

TOKENS = "tokens"  # (B, T) int32: input_ids with the candidates filled in
ARGMAX = "argmax"  # (B, R) int32: most likely next token at each of the logit rows
LOGITS = "logits"  # (B, R, V) float
FINITE = "finite"  # (B, R) bool: true only if all logits of the row are finite
TOP_IDS = "top_ids"  # (B, S, K) int32: most likely tokens at each of the summary rows, descending
TOP_LOGITS = "top_logits"  # (B, S, K) float: their logits
LOGSUMEXP = "logsumexp"  # (B, S) float: log of the sum of exp(logit) over the vocabulary
SUMMARY_OUTPUTS = (FINITE, TOP_IDS, TOP_LOGITS, LOGSUMEXP)
HIDDEN = "hidden"  # (B, T, E) float: the hidden state after the final norm, then what the tapped layers read
NEW = "new"  # (B, T, 2 * layers * W) float, stacked: this step's keys of all layers, then its values


def past_key(layer: int) -> str:
    """Name the input (B, P, W) with a layer's past keys, one contiguous row per token."""
    return f"past_key_{layer}"


def past_value(layer: int) -> str:
    """Name the input (B, P, W) with a layer's past values."""
    return f"past_value_{layer}"


def present_key(layer: int) -> str:
    """Name the in-place output (1, kv_heads, C, D): the same buffer as the layer's `past_key`."""
    return f"present_key_{layer}"


def present_value(layer: int) -> str:
    """Name the in-place output (1, kv_heads, C, D): the same buffer as the layer's `past_value`."""
    return f"present_value_{layer}"


def new_key(layer: int) -> str:
    """Name the output (B, T, W) with a layer's keys of this step's nodes."""
    return f"new_key_{layer}"


def new_value(layer: int) -> str:
    """Name the output (B, T, W) with a layer's values of this step's nodes."""
    return f"new_value_{layer}"


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of one graph input or output; a str in the shape is a symbolic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def summary_tokens(vocab_size: int) -> int:
    """Return K, the number of entries of a row's summary."""
    return min(MAX_SUMMARY_TOKENS, vocab_size)


def summary_specs(vocab_size: int) -> tuple[TensorSpec, ...]:
    """Return the outputs that describe rows, in order: the finite flag of all of them, and the summaries of some."""
    K = summary_tokens(vocab_size)
    return (
        TensorSpec(FINITE, "bool", ("B", "R")),
        TensorSpec(TOP_IDS, "int32", ("B", "S", K)),
        TensorSpec(TOP_LOGITS, "float32", ("B", "S", K)),
        TensorSpec(LOGSUMEXP, "float32", ("B", "S")),
    )


def input_specs(
    layers: int, state_size: int, kv_row: int, dtype: str = "float32", *, summaries: bool = False
) -> tuple[TensorSpec, ...]:
    """Return all inputs of a graph with one past tensor per layer, in order.

    Args:
        layers: Number of decoder layers.
        state_size: E, elements of the state that the heads read.
        kv_row: W, elements of one token's key in one layer.
        dtype: Element type of keys and values; all other floats are float32.
        summaries: Whether the graph summarises rows, as graphs for a GPU do.
    """
    return (
        TensorSpec(INPUT_IDS, "int32", ("B", "T")),
        TensorSpec(POSITION_IDS, "int32", ("B", "T")),
        TensorSpec(TREE_MASK, "bool", ("B", "T", "T")),
        TensorSpec(PAST_LENGTH, "int32", ("B",)),
        TensorSpec(DRAFT_HIDDEN, "float32", ("N", state_size)),
        TensorSpec(LOGIT_ROWS, "int32", ("B", "R")),
        *((TensorSpec(SUMMARY_ROWS, "int32", ("B", "S")),) if summaries else ()),
        *(TensorSpec(past_key(i), dtype, ("B", "P", kv_row)) for i in range(layers)),
        *(TensorSpec(past_value(i), dtype, ("B", "P", kv_row)) for i in range(layers)),
    )


def output_specs(
    layers: int, state_size: int, vocab_size: int, kv_row: int, dtype: str = "float32", *, summaries: bool = False
) -> tuple[TensorSpec, ...]:
    """Return all outputs of a graph with one new tensor per layer, in order; `vocab_size` is V, the rest as above."""
    return (
        TensorSpec(TOKENS, "int32", ("B", "T")),
        TensorSpec(ARGMAX, "int32", ("B", "R")),
        TensorSpec(LOGITS, "float32", ("B", "R", vocab_size)),
        *(summary_specs(vocab_size) if summaries else ()),
        TensorSpec(HIDDEN, "float32", ("B", "T", state_size)),
        *(TensorSpec(new_key(i), dtype, ("B", "T", kv_row)) for i in range(layers)),
        *(TensorSpec(new_value(i), dtype, ("B", "T", kv_row)) for i in range(layers)),
    )


def stacked_specs(
    layers: int, state_size: int, vocab_size: int, kv_row: int, dtype: str = "float32"
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return all inputs and all outputs of a graph that stacks the keys and values of all layers in one tensor.

    Such graphs are for TensorRT, so they summarise rows.
    """
    width = 2 * layers * kv_row
    past, new = TensorSpec(PAST, dtype, ("B", "P", width)), TensorSpec(NEW, dtype, ("B", "T", width))
    inputs = input_specs(0, state_size, 0, summaries=True)
    return (*inputs, past), (*output_specs(0, state_size, vocab_size, 0, summaries=True), new)


def in_place_specs(
    layers: int,
    state_size: int,
    vocab_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: str = "float32",
    *,
    gpu: bool = False,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return all inputs and all outputs of a graph that writes keys and values in place: B is 1, C the capacity.

    Args:
        layers: Number of decoder layers.
        state_size: E, elements of the state that the heads read.
        vocab_size: V.
        kv_heads: Number of key (and value) heads.
        head_dim: D, elements of one head.
        dtype: Element type of keys and values.
        gpu: Whether the graph is for a GPU: it then has the input ``past_rows`` and summarises rows.
    """
    buffer = (1, kv_heads, "C", head_dim)
    step, results = (
        tuple(TensorSpec(one.name, one.dtype, tuple(1 if size == "B" else size for size in one.shape)) for one in specs)
        for specs in (
            input_specs(0, state_size, 0, summaries=gpu),
            output_specs(0, state_size, vocab_size, 0, summaries=gpu),
        )
    )
    pasts, presents = (
        tuple(TensorSpec(name(i), dtype, buffer) for name in names for i in range(layers))
        for names in ((past_key, past_value), (present_key, present_value))
    )
    more = (TensorSpec(PAST_ROWS, "int32", ("P",)),) if gpu else ()
    return (*step, *pasts, *more), (*results, *presents)
