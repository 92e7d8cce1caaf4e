"""The losses of Sec. 3.6, one function an equation. B images, S seen classes, G merged groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def classification(logits: Tensor, targets: Tensor) -> Tensor:
    """Eq. 12, one pass: cross-entropy of logits [B, S] with the seen classes' indices [B]."""
    return F.cross_entropy(logits, targets)


def consistency(source: Tensor, contextualized: Tensor, kind: str) -> Tensor:
    """Eq. 13: divergence of both passes' class distributions from their logits [B, S], mean over the batch, in nats.

    jeffreys is the equation as printed, half the sum of both KL divergences (unbounded); jsd is the Jensen-Shannon
    divergence that the text names, at most ln 2; kl is KL(contextualized || source).
    """
    p, q = source.log_softmax(-1), contextualized.log_softmax(-1)
    if kind == "jeffreys":
        return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    if kind == "jsd":
        middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)).mean() / 2
    if kind == "kl":
        return (q.exp() * (q - p)).sum(-1).mean()
    raise ValueError(f"consistency {kind!r}: expected jeffreys, jsd or kl")


def patch(logits: Tensor, targets: Tensor) -> Tensor:
    """Eq. 6: binary cross-entropy of the patch classifier's logits with pseudo-labels in [0, 1], both [B, G]."""
    return F.binary_cross_entropy_with_logits(logits, targets)
