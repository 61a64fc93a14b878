"""The torch module that is traced: one step drafts with the heads, then verifies with the decoder.

Inputs and outputs are described in `medusa_runtime.contract`. Shapes: B sequences, T nodes, P past rows, R rows with
logits, N draft rows, H hidden size, E size of what the heads read, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_exporter.graph.row_attention import ATTENTION_NAME, RowMajorCache
from medusa_exporter.heads.taps import capture_taps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from medusa_exporter.heads.modules import MedusaHeads


class StepModule(torch.nn.Module):
    """A decoder and its heads with the inputs and outputs of the graph contract.

    Args:
        model: A causal decoder.
        heads: Heads that were trained for it; None for a step without a draft, whose ids are all tokens.
        top_k: The number of candidates that each head proposes.
        draft_rows: (D, H), a stand-in for the lm_head's rows of a draft vocabulary of D tokens; None to use these rows.
    """

    def __init__(
        self, model: PreTrainedModel, heads: MedusaHeads | None, top_k: int, draft_rows: Tensor | None = None
    ) -> None:
        super().__init__()
        self.model, self.heads, self.top_k = model, heads, top_k
        self._taps = () if heads is None else heads.taps
        self.model.config._attn_implementation = ATTENTION_NAME
        self.window: int | None = getattr(model.config, "sliding_window", None)
        self._logit_rows: Tensor | None = None
        self._hidden: Tensor | None = None
        lm_head = model.get_output_embeddings()
        self._draft_lm_head = lm_head.weight, lm_head.bias  # another one if there is a draft vocabulary
        if heads is not None and heads.token_map is not None:
            bias = None if lm_head.bias is None else lm_head.bias[heads.token_map]
            self._draft_lm_head = lm_head.weight[heads.token_map] if draft_rows is None else draft_rows, bias

    def _select_logit_rows(self, _module: torch.nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        """Keep all hidden states, and pass the rows that need logits to the lm_head: (B, T, H) -> (B * R, H).

        With flat rows the lm_head is one Gemm by the weight as it is stored, which a tied embedding can then share. For
        example, with B = 2, T = 5 and rows [[4], [2]] the flat indices are [0 + 4, 5 + 2].
        """
        hidden, rows = arguments[0], self._logit_rows
        assert rows is not None  # noqa: S101 -- forward() has just set it
        self._hidden = hidden
        B, T, H = hidden.shape
        # (B, 1): index of each sequence's first row; sliced, because a GPU would have to copy T from the host
        first = torch.arange(B * T, dtype=torch.int32).reshape(B, T)[:, :1]
        return (hidden.reshape(B * T, H).index_select(0, (first + rows).reshape(-1)),)

    def draft(self, input_ids: Tensor, draft_hidden: Tensor) -> Tensor:
        """Replace candidate ids by the tokens that the heads propose; with N = 0 all ids must be tokens.

        An id of -1 - (head * top_k + rank) stands for a candidate: with top_k = 10, -1 is the most likely token of head
        0, and -14 the fourth of head 1.

        Args:
            input_ids: (B, T) tokens, or ids of candidates.
            draft_hidden: (N, E), what the heads read.

        Returns:
            (B, T) tokens.
        """
        heads = self.heads
        if heads is None:
            return input_ids.clone()
        B, N = input_ids.shape[0], draft_hidden.shape[0]
        root_embedding = None
        if heads.conditioning == "root":
            roots = input_ids[:, 0].index_select(0, torch.arange(N))  # (N,)
            root_embedding = self.model.get_input_embeddings()(roots)

        def logits(rows: Tensor) -> Tensor:
            return torch.nn.functional.linear(rows, *self._draft_lm_head)

        number = -1 - input_ids  # head * top_k + rank of a candidate; negative for tokens
        used = self._heads_used(number, heads.heads)
        proposed = heads.propose(draft_hidden, root_embedding, logits, self.top_k, used)  # (N, used, top_k)
        proposed = proposed.flatten(1).to(torch.int32)
        # ONNX Runtime refuses a Gather from a tensor without rows: append B dummy rows and keep the first B
        proposed = torch.cat((proposed, torch.zeros(B, proposed.shape[1], dtype=torch.int32)))[:B]
        literal = input_ids >= 0
        candidate = torch.gather(proposed, 1, torch.where(literal, 0, number).long())
        return torch.where(literal, input_ids, candidate)

    def _heads_used(self, number: Tensor, count: int) -> int:
        """Return from how many of the `count` heads the candidates come; only these are run."""
        firsts = self.top_k * torch.arange(1, count, dtype=torch.int32)  # each head's first number
        used: int = ((number.max() >= firsts).sum() + 1).item()  # type: ignore[assignment]
        torch._check(used >= 1)  # type: ignore[no-untyped-call]
        torch._check(used <= count)  # type: ignore[no-untyped-call]
        return used

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        tree_mask: Tensor,
        past_length: Tensor,
        draft_hidden: Tensor,
        logit_rows: Tensor,
        past_keys: list[Tensor],
        past_values: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Run one step; names and shapes are those of `medusa_runtime.contract`."""
        tokens = self.draft(input_ids, draft_hidden)
        visible = _visible(tree_mask, past_length, past_keys[0].shape[1])
        more = {}
        if self.window is not None:
            near = _distance(position_ids, past_keys[0].shape[1]) < self.window
            more["windowed_mask"] = _additive(visible & near)
        cache = RowMajorCache(past_keys, past_values)
        self._logit_rows = logit_rows
        hook = self.model.get_output_embeddings().register_forward_pre_hook(self._select_logit_rows)
        with capture_taps(self.model, self._taps) as caught, hook:
            logits = self.model(
                input_ids=tokens,
                position_ids=position_ids,
                attention_mask=_additive(visible),
                past_key_values=cache,
                use_cache=True,
                **more,
            ).logits.unflatten(0, logit_rows.shape)  # (B * R, V) -> (B, R, V)
        hidden, self._hidden, self._logit_rows = self._hidden, None, None
        assert hidden is not None  # noqa: S101 -- the hook has just set it
        if self._taps:
            hidden = torch.cat((hidden, *(caught[layer] for layer in self._taps)), dim=-1)
        layers = range(len(past_keys))
        return (
            tokens,
            logits.argmax(-1).to(torch.int32),
            logits,
            hidden,
            [cache.new_keys[i] for i in layers],
            [cache.new_values[i] for i in layers],
        )


def _visible(tree_mask: Tensor, past_length: Tensor, P: int) -> Tensor:
    """Return which rows, past and new, each node may see: (B, T, T) bool, (B,) -> (B, T, P + T) bool."""
    B, T, _ = tree_mask.shape
    past = torch.arange(P, dtype=torch.int32) < past_length.reshape(B, 1, 1)
    return torch.cat((past.expand(B, T, P), tree_mask), dim=2)


def _distance(position_ids: Tensor, P: int) -> Tensor:
    """Return how many positions each row is before each node: (B, T) -> (B, T, P + T) int32."""
    B, T = position_ids.shape
    past = torch.arange(P, dtype=torch.int32).reshape(1, 1, P).expand(B, T, P)
    new = position_ids.unsqueeze(1).expand(B, T, T)
    return position_ids.unsqueeze(2) - torch.cat((past, new), dim=2)


def _additive(visible: Tensor) -> Tensor:
    """Return the mask to add to scores: (B, T, S) bool -> (B, 1, T, S) fp32.

    Hidden scores get the lowest finite value: with infinities the softmax of a row that sees nothing would be NaN.
    """
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min).unsqueeze(1)
