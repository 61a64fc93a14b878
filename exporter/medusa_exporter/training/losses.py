"""Losses of the heads: cross-entropy with the token that followed, or with the decoder's own distribution."""

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
    """Cross-entropy with one token per position: target (n,) int64, rows of the lm_head."""
    return F.cross_entropy(
        F.linear(features, lm_head), torch.where(valid, target, IGNORED), ignore_index=IGNORED, reduction="sum"
    )


def kl_loss(features: Tensor, lm_head: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy with the decoder's distribution, the KL divergence plus a constant: target (n, H) hidden states."""
    wanted = F.softmax(F.linear(target, lm_head).float(), dim=-1)
    each = -(wanted * F.log_softmax(F.linear(features, lm_head).float(), dim=-1)).sum(dim=-1)
    return torch.where(valid, each, 0.0).sum()


def token_targets(heads: MedusaHeads, found: Positions, vocab_size: int) -> Targets:
    """Return the targets for `token_loss`; tokens outside the draft vocabulary do not count."""
    rows = tokens_to_rows(heads, found.targets, vocab_size).to(torch.int32)

    def targets(head: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        target = rows[chosen, head].long()
        return target, target >= 0

    return targets


def kl_targets(heads: MedusaHeads, found: Positions) -> Targets:
    """Return the targets for `kl_loss`: the hidden state 1 + head places ahead, if it belongs to the same answer."""

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
    """Add the gradients of one batch to the heads' parameters.

    Heads are processed one after another, so that the logits (n, D) of only one head are in memory.

    Args:
        heads: The heads.
        inputs: Hidden states (n, S), and the embeddings of the roots (n, H).
        lm_head: The rows (D, H) that score tokens.
        targets: The targets of each head and whether they count.
        loss: The loss.
        decay: The loss of head k is weighted with `decay ** k`.

    Returns:
        The mean loss of each head (K,).
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
