"""The losses of Sec. 3.6, one function an equation. B images, S seen classes, G merged groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def classification(logits: Tensor, targets: Tensor) -> Tensor:
    """Eq. 12, one pass: cross-entropy of logits [B, S] with the seen classes' indices [B]."""
    return F.cross_entropy(logits, targets)


def consistency(source: Tensor, contextualized: Tensor, kind: str, mean: str = "images") -> Tensor:
    """Eq. 13: divergence of both passes' class distributions from their logits [B, S], mean over the batch, in nats.

    jeffreys is the equation as printed, half the sum of both KL divergences (unbounded); jsd is the Jensen-Shannon
    divergence that the text names, at most ln 2; kl is KL(contextualized || source). ``mean`` over elements divides
    by S too.
    """
    p, q = source.log_softmax(-1), contextualized.log_softmax(-1)
    if kind == "jeffreys":
        parts = (p.exp() - q.exp()) * (p - q) / 2
    elif kind == "jsd":
        middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        parts = (p.exp() * (p - middle) + q.exp() * (q - middle)) / 2
    elif kind == "kl":
        parts = q.exp() * (q - p)
    else:
        raise ValueError(f"consistency {kind!r}: expected jeffreys, jsd or kl")
    return parts.mean() if mean == "elements" else parts.sum(-1).mean()


def group_decorrelation(attributes: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """The published code's penalty: the norm of the predictions [B, A] within each attribute group, mean over groups.

    ``groups``: attribute numbers of each group, int64 [n].
    """
    return torch.stack([attributes[:, group].norm(dim=1).mean() for group in groups]).mean()


def patch(logits: Tensor, targets: Tensor) -> Tensor:
    """Eq. 6: binary cross-entropy of the patch classifier's logits with pseudo-labels in [0, 1], both [B, G]."""
    return F.binary_cross_entropy_with_logits(logits, targets)
