"""The contextual embedding e that semantic-unrelated patches receive at the input (Sec. 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WordsToPatch(nn.Module):
    """Eq. 7: e = W2P(w_1 .. w_A): a linear map of each attribute's word vector, then one across the attributes.

    The word vectors [A, V] are a buffer, so a checkpoint carries those it was trained with.
    """

    def __init__(self, words: Tensor, width: int, layout: str = "subtoken") -> None:
        super().__init__()
        attributes, size = words.shape
        self.layout = layout
        self.words: Tensor
        self.register_buffer("words", words.float())
        self.to_width = nn.Linear(size, width)
        self.to_tokens = nn.Linear(attributes, 4)

    def forward(self) -> Tensor:
        """e for the four tokens of a group, [4, D]."""
        embedded: Tensor = self.to_tokens(self.to_width(self.words).T)  # [D, 4]
        # the published code reads the 4D numbers off [D, 4] as they lie there
        return embedded.reshape(4, -1) if self.layout == "interleaved" else embedded.T

    def zero(self) -> None:
        """Make e zero; the gradient of its last layer is not, so it learns at once."""
        nn.init.zeros_(self.to_tokens.weight)
        nn.init.zeros_(self.to_tokens.bias)


class FreeContext(nn.Module):
    """Table 2's "w/o W2P": e is a free parameter [4, D] that starts at random."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(4, width) * 0.02)

    def forward(self) -> Tensor:
        return self.embedding

    def zero(self) -> None:
        nn.init.zeros_(self.embedding)
