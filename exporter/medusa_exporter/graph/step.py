"""The module that is traced: one step = draft, then verify (design: `medusa_runtime.contract`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_exporter.graph.row_attention import ATTENTION_NAME, RowMajorCache
from medusa_exporter.heads.taps import capture_taps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from medusa_exporter.heads.modules import MedusaHeads


class Step(torch.nn.Module):
    """A decoder and its heads behind the graph contract's inputs and outputs."""

    def __init__(self, model: PreTrainedModel, heads: MedusaHeads, top_k: int, rows: Tensor | None = None) -> None:
        """Take a causal decoder and heads made for it; `top_k` candidates are kept per head.

        rows: (D, H), what stands for the lm_head's rows of a draft vocabulary; None for these rows themselves.
        """
        super().__init__()
        self.model, self.heads, self.top_k = model, heads, top_k
        self.model.config._attn_implementation = ATTENTION_NAME
        self.window: int | None = getattr(model.config, "sliding_window", None)
        self._wanted_rows: Tensor | None = None
        self._hidden: Tensor | None = None
        lm_head = model.get_output_embeddings()
        self._draft_lm_head = lm_head.weight, lm_head.bias  # of its own only where the heads score fewer tokens
        if heads.token_map is not None:
            bias = None if lm_head.bias is None else lm_head.bias[heads.token_map]
            self._draft_lm_head = lm_head.weight[heads.token_map] if rows is None else rows, bias

    def _keep_wanted_rows(self, _module: torch.nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        """Before the lm_head: capture all hidden states, hand on the wanted rows only, (B, T, H) -> (B·R, H).

        Flat rows make the product one Gemm over the weight as it lies, which a tied embedding then shares.
        """
        hidden, rows = arguments[0], self._wanted_rows
        assert rows is not None  # noqa: S101 -- forward() has just set it
        self._hidden = hidden
        B, T, H = hidden.shape
        # (B, 1): where a sequence begins; sliced, not multiplied by T, which a GPU would have to fetch from the host
        first = torch.arange(B * T, dtype=torch.int32).reshape(B, T)[:, :1]
        return (hidden.reshape(B * T, H).index_select(0, (first + rows).reshape(-1)),)

    def draft(self, input_ids: Tensor, draft_hidden: Tensor) -> Tensor:
        """Fill the candidates in: (B, T) ids, (N, S) hidden -> (B, T) tokens. With N = 0 all ids are literal."""
        B, N = input_ids.shape[0], draft_hidden.shape[0]
        root_embedding = None
        if self.heads.conditioning == "root":
            roots = input_ids[:, 0].index_select(0, torch.arange(N))  # (N,)
            root_embedding = self.model.get_input_embeddings()(roots)

        def logits(rows: Tensor) -> Tensor:
            return torch.nn.functional.linear(rows, *self._draft_lm_head)

        number = -1 - input_ids  # of a candidate: head · top_k + rank; negative for literals
        used = self._heads_used(number)
        proposed = self.heads.propose(draft_hidden, root_embedding, logits, self.top_k, used)  # (N, used, top_k)
        proposed = proposed.flatten(1).to(torch.int32)
        # a Gather from no rows at all is an error in ONNX Runtime: append B dummy rows, keep the first B
        proposed = torch.cat((proposed, torch.zeros(B, proposed.shape[1], dtype=torch.int32)))[:B]
        literal = input_ids >= 0
        candidate = torch.gather(proposed, 1, torch.where(literal, 0, number).long())
        return torch.where(literal, input_ids, candidate)

    def _heads_used(self, number: Tensor) -> int:
        """How many heads the tree's candidates come from: no other is scored."""
        later = self.top_k * torch.arange(1, self.heads.heads, dtype=torch.int32)  # the first number of each
        used: int = ((number.max() >= later).sum() + 1).item()  # type: ignore[assignment]
        torch._check(used >= 1)  # type: ignore[no-untyped-call]
        torch._check(used <= self.heads.heads)  # type: ignore[no-untyped-call]
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
        """Run one step; shapes as in `medusa_runtime.contract`."""
        tokens = self.draft(input_ids, draft_hidden)
        seen = _seen(tree_mask, past_length, past_keys[0].shape[1])
        more = {}
        if self.window is not None:
            near = _distance(position_ids, past_keys[0].shape[1]) < self.window
            more["windowed_mask"] = _additive(seen & near)
        cache = RowMajorCache(past_keys, past_values)
        self._wanted_rows = logit_rows
        hook = self.model.get_output_embeddings().register_forward_pre_hook(self._keep_wanted_rows)
        with capture_taps(self.model, self.heads.taps) as caught, hook:
            logits = self.model(
                input_ids=tokens,
                position_ids=position_ids,
                attention_mask=_additive(seen),
                past_key_values=cache,
                use_cache=True,
                **more,
            ).logits.unflatten(0, logit_rows.shape)  # (B·R, V) -> (B, R, V)
        hidden, self._hidden, self._wanted_rows = self._hidden, None, None
        assert hidden is not None  # noqa: S101 -- the hook has just set it
        if self.heads.taps:
            hidden = torch.cat((hidden, *(caught[layer] for layer in self.heads.taps)), dim=-1)
        layers = range(len(past_keys))
        return (
            tokens,
            logits.argmax(-1).to(torch.int32),
            logits,
            hidden,
            [cache.new_keys[i] for i in layers],
            [cache.new_values[i] for i in layers],
        )


def _seen(tree_mask: Tensor, past_length: Tensor, P: int) -> Tensor:
    """(B, T, T) bool, (B,) -> (B, T, P + T) bool: which rows, past and new, each node may see."""
    B, T, _ = tree_mask.shape
    past = torch.arange(P, dtype=torch.int32) < past_length.reshape(B, 1, 1)
    return torch.cat((past.expand(B, T, P), tree_mask), dim=2)


def _distance(position_ids: Tensor, P: int) -> Tensor:
    """(B, T) -> (B, T, P + T) int32: how far back each row lies from each node."""
    B, T = position_ids.shape
    past = torch.arange(P, dtype=torch.int32).reshape(1, 1, P).expand(B, T, P)
    new = position_ids.unsqueeze(1).expand(B, T, T)
    return position_ids.unsqueeze(2) - torch.cat((past, new), dim=2)


def _additive(seen: Tensor) -> Tensor:
    """(B, T, S) bool -> (B, 1, T, S) float32 to add to scores: 0, or a finite minimum (never an empty softmax)."""
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min).unsqueeze(1)
