"""What each head is asked for: the token that came, or the decoder's own distribution there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.training.draft_vocabulary import tokens_to_rows
from medusa_exporter.training.hidden_states import IGNORED, Positions
from medusa_exporter.training.state_storage import gather_rows

# (features (n, H) of one head, lm_head (D, H), target, valid (n,) bool) -> the sum of the losses where valid
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# (head, positions (n,) int64) -> target, valid (n,) bool
Targets = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def token_loss(features: Tensor, lm_head: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy with one token a position: target (n,) int64, rows of the lm_head."""
    return F.cross_entropy(
        F.linear(features, lm_head), torch.where(valid, target, IGNORED), ignore_index=IGNORED, reduction="sum"
    )


def kl_loss(features: Tensor, lm_head: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy with the decoder's distribution (KL but for a constant): target (n, H), its own hidden states."""
    wanted = F.softmax(F.linear(target, lm_head).float(), dim=-1)
    each = -(wanted * F.log_softmax(F.linear(features, lm_head).float(), dim=-1)).sum(dim=-1)
    return torch.where(valid, each, 0.0).sum()


def token_targets(heads: MedusaHeads, found: Positions, vocab_size: int) -> Targets:
    """Targets for `token_loss`: tokens outside the draft vocabulary do not count."""
    rows = tokens_to_rows(heads, found.targets, vocab_size).to(torch.int32)

    def targets(head: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        target = rows[chosen, head].long()
        return target, target >= 0

    return targets


def kl_targets(heads: MedusaHeads, found: Positions) -> Targets:
    """Targets for `kl_loss`: the state 1 + head places on, where the same answer still goes on there."""

    def targets(head: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        ahead = (chosen + 1 + head).clamp(max=len(found) - 1)
        valid = found.place[ahead] == found.place[chosen] + 1 + head
        return gather_rows(found.hidden, ahead)[:, : heads.hidden_size], valid

    return targets


def step_gradients(
    heads: MedusaHeads,
    inputs: tuple[Tensor, Tensor],
    lm_head: Tensor,
    targets: list[tuple[Tensor, Tensor]],
    loss: Loss,
    decay: float,
) -> Tensor:
    """Add the gradients of one batch to the heads' parameters; return each head's mean loss (K,).

    inputs: hidden (n, S) and the root's embedding (n, H). targets: one pair a head. Head k weighs decay ** k. Head by
    head, so that one head's logits (n, D) are in memory at a time.
    """
    hidden, root = inputs
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
        features = heads.features(hidden, root)  # (K, n, H)
    leaves = features.detach().to(hidden.dtype)
    gradients, losses = torch.empty_like(features), []
    for k, (target, valid) in enumerate(targets):
        leaf = leaves[k].requires_grad_()
        total = loss(leaf, lm_head, target, valid)
        (gradient,) = torch.autograd.grad(total, leaf)
        count = valid.sum().clamp(min=1)
        gradients[k] = gradient * (decay**k / count)
        losses.append(total.detach().float() / count)
    torch.autograd.backward(features, gradients)
    return torch.stack(losses)
