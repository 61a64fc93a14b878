"""The PyTorch module of Medusa heads: ResBlocks on the decoder's last hidden state, then an lm_head.

Shapes: N positions, K heads, H hidden size, V vocabulary, D draft vocabulary (D = V without a token_map),
S what the heads see of a position: H, and H more for each tap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Conditioning = Literal["none", "root"]


class MedusaHeads(torch.nn.Module):
    """K heads whose parameters are stacked, so that all heads run as one batched matrix multiplication.

    Head k (0-based) at position t predicts token t+2+k; the decoder's own lm_head predicts t+1. Each head is
    `layers` ResBlocks x + SiLU(W x + b) and an lm_head: p = softmax(W2 (SiLU(W1 h) + h)), Medusa paper
    (arXiv 2401.10774) section 2.1.1. With conditioning "root" the first ResBlock's linear takes [h ; E], where E
    is the embedding of token t+1, while its residual adds h alone.

    Two options go beyond the paper. With taps the heads see the normalised inputs of some decoder layers after h. A
    trunk is one gated block before all heads' ResBlocks, x + W3 (SiLU(W1 v) * W2 v) (SwiGLU, arXiv 2002.05202), where v
    is everything that is seen: [h ; taps ; E]; the ResBlocks then see its output alone.

    All parameters but the trunk's W1 and W2 start at zero; with a shared lm_head each head thus starts with the
    decoder's own distribution.

    Args:
        hidden_size: Hidden size of the decoder, H.
        heads: Number of heads, K.
        layers: ResBlocks per head, at least 1.
        conditioning: "root" if the heads see the embedding of token t+1, else "none".
        own_lm_head_size: D if each head has its own lm_head, `None` if the decoder's is shared.
        token_map: (D,) int64, the token that each row of the lm_head scores, distinct and in any order; `None` if row
            and token are the same.
        taps: Decoder layers whose normalised input the heads see.
        trunk: Width of the gated block, 0 for none.
        dropout: Dropout probability in training mode, applied to the inner units of the gated block and to what each
            ResBlock adds.

    Raises:
        ValueError: A size is below one, taps repeat, the conditioning is unknown, the token_map is invalid, or
            own_lm_head_size differs from its length.
    """

    token_map: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        layers: int,
        conditioning: Conditioning = "none",
        own_lm_head_size: int | None = None,
        token_map: Tensor | None = None,
        *,
        taps: tuple[int, ...] = (),
        trunk: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(hidden_size, heads, layers) < 1:
            raise ValueError(f"hidden_size, heads and layers must be at least 1; got {hidden_size}, {heads}, {layers}")
        if conditioning not in ("none", "root"):
            raise ValueError(f"conditioning must be 'none' or 'root'; got {conditioning!r}")
        if trunk < 0 or len(set(taps)) != len(taps):
            raise ValueError(f"trunk must not be negative and taps not repeat; got {trunk} and {taps}")
        if token_map is not None:
            _check_token_map(token_map, own_lm_head_size)
        self.hidden_size, self.heads, self.layers = hidden_size, heads, layers
        self.conditioning: Conditioning = conditioning
        self.own_lm_head_size = own_lm_head_size
        self.taps, self.trunk, self.dropout = taps, trunk, dropout
        self.input_size = hidden_size * (1 + len(taps))  # S
        seen = self.input_size + (hidden_size if conditioning == "root" else 0)
        inputs = [hidden_size if trunk else seen] + [hidden_size] * (layers - 1)
        # (in, out), so that x @ weight needs no transpose
        self.weights = torch.nn.ParameterList([torch.zeros(heads, size, hidden_size) for size in inputs])
        self.biases = torch.nn.ParameterList([torch.zeros(heads, 1, hidden_size) for _ in inputs])
        if trunk:
            self.gate = torch.nn.Parameter(torch.randn(seen, trunk) / seen**0.5)
            self.up = torch.nn.Parameter(torch.randn(seen, trunk) / seen**0.5)
            self.down = torch.nn.Parameter(torch.zeros(trunk, hidden_size))
        self.own_lm_head = (
            torch.nn.Parameter(torch.zeros(heads, hidden_size, own_lm_head_size)) if own_lm_head_size else None
        )  # (K, H, D)
        self.register_buffer("token_map", token_map)

    @property
    def draft_vocabulary(self) -> int | None:
        """Return how many tokens the heads score (D), `None` for all."""
        return None if self.token_map is None else self.token_map.numel()

    def features(self, hidden: Tensor, root_embedding: Tensor | None = None) -> Tensor:
        """Run trunk and ResBlocks.

        Args:
            hidden: (N, S), the hidden state after the final norm, followed by the taps.
            root_embedding: (N, H), the embedding of token t+1 as the decoder's first layer receives it; needed with
                conditioning "root", otherwise ignored.

        Returns:
            Features of each head (K, N, H).
        """
        rows, seen = hidden[:, : self.hidden_size], hidden
        if self.conditioning == "root":
            if root_embedding is None:
                raise ValueError("these heads are conditioned on the root: pass root_embedding (N, H)")
            seen = torch.cat([hidden, root_embedding], dim=-1)
        if self.trunk:
            rows = seen = rows + self._drop(F.silu(seen @ self.gate) * (seen @ self.up)) @ self.down
        rows, inner = rows.unsqueeze(0), seen.unsqueeze(0)  # (1, N, ·), broadcast over the heads
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            rows = rows + self._drop(F.silu((rows if index else inner) @ weight + bias))  # (K, N, H)
        return rows

    def _drop(self, units: Tensor) -> Tensor:
        return F.dropout(units, self.dropout) if self.training and self.dropout else units

    def logits(self, features: Tensor, lm_head: Callable[[Tensor], Tensor]) -> Tensor:
        """Turn features into logits; if the lm_head is shared, features of the first heads alone are accepted.

        Args:
            features: (K, N, H).
            lm_head: The decoder's lm_head, (rows, H) -> (rows, D), used if the heads have none of their own. With a
                token_map it returns one column for each of its tokens, in its order.

        Returns:
            Logits (K, N, D).
        """
        if self.own_lm_head is not None:
            return features @ self.own_lm_head
        flat = lm_head(features.reshape(-1, self.hidden_size))  # (K·N, D)
        return flat.reshape(features.shape[0], -1, flat.shape[-1])

    def propose(
        self,
        hidden: Tensor,
        root_embedding: Tensor | None,
        lm_head: Callable[[Tensor], Tensor],
        top_k: int,
        used: int | None = None,
    ) -> Tensor:
        """Return the most likely tokens of each head.

        Args:
            hidden: As for `features`.
            root_embedding: As for `features`.
            lm_head: As for `logits`.
            top_k: How many tokens per head, at most D.
            used: Only the first `used` heads are needed; if they share an lm_head, only these are computed.

        Returns:
            Token ids of the decoder (N, K, top_k) int64, the most likely one first.
        """
        features = self.features(hidden, root_embedding)
        if used is not None and self.own_lm_head is None:
            features = features.narrow(0, 0, used)
        logits = self.logits(features, lm_head)
        rows = torch.topk(logits, top_k, dim=-1).indices.permute(1, 0, 2)
        return rows if self.token_map is None else self.token_map[rows]


def _check_token_map(token_map: Tensor, own_lm_head_size: int | None) -> None:
    shape, size = tuple(token_map.shape), token_map.numel()
    if len(shape) != 1 or not size or token_map.dtype != torch.int64:
        raise ValueError(f"token_map must be (D,) int64 with D of at least 1; got {shape} {token_map.dtype}")
    if int(token_map.min()) < 0 or len(torch.unique(token_map)) != size:
        raise ValueError("token_map must hold distinct token ids of at least 0; it repeats some or has negative ones")
    if own_lm_head_size not in (None, size):
        raise ValueError(f"an lm_head of {own_lm_head_size} rows under a token_map of {size} tokens; give one row each")
