"""Small causal transformers over characters."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream


@final
class DecoderBlock(nn.Module):
    """A block of a transformer: attention, then two layers with ReLU, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """Add the block's output to the residual stream of shape `(rows, places, width)`."""
        rows, places, width = stream.shape
        packed = self.qkv(self.attention_norm(stream)).view(rows, places, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.out(seen.transpose(1, 2).reshape(rows, places, width))
        return stream + self.down(F.relu(self.up(self.mlp_norm(stream))))


@final
class Decoder(nn.Module):
    """A causal transformer that scores the next character at every place; `build` says what its sizes mean.

    Tokens and places are embedded, and a LayerNorm and a linear head follow the blocks.
    """

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Scores of shape `(rows, vocabulary, places)`: classes before places, as `CrossEntropyLoss` wants them."""
        stream = self.tokens(characters) + self.places(torch.arange(characters.shape[1], device=characters.device))
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream)).transpose(1, 2)


def build(
    vocabulary: int, context: int = 32, width: int = 32, heads: int = 4, layers: int = 2, seed: int = 0
) -> Decoder:
    """A decoder with PyTorch's default initialisation; the global random state is left as it was.

    Args:
        vocabulary: number of characters.
        context: number of places in a row.
        width: width of the residual stream.
        heads: number of heads of each attention.
        layers: number of blocks.
        seed: seed of the initial weights.

    Raises:
        UsageError: the heads do not share the width evenly.

    >>> tuple(build(11, context=8, width=8, heads=2, layers=1)(torch.zeros(3, 8, dtype=torch.int64)).shape)
    (3, 11, 8)
    """
    if width % heads:
        raise UsageError(f"{heads} heads cannot share a width of {width}: give a multiple of the number of heads")
    sizes = (vocabulary, context, width, heads, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "decoder", *sizes).initial_seed())
        return Decoder(*sizes)
