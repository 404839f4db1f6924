"""Tiny transformers, and what they are made of: attention in every spelling, gated blocks, adapters, linear pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from cases.zoo import (
    AGAIN,
    EPSILON,
    IMAGE,
    NORM_KINDS,
    TOKENS,
    ZOO,
    Apply,
    Joined,
    Total,
    afterwards,
    dense,
    entry,
    layer_norm,
    no_norm,
    rms_norm,
    variants,
)  # fmt: skip

F = nn.functional

_OTHERS = frozenset(ZOO)

SEQUENCE = (4, 3)
"""Positions and features of one row of input."""

# Parts ----------------------------------------------------------------------------------------------------------------


def reader(*body: nn.Module, width: int = 4) -> nn.Sequential:
    """A net from features to scores at each position, classes on axis 1."""
    return nn.Sequential(nn.Linear(3, width), *body, nn.Linear(width, 3), Apply(lambda x: x.mT))


def residual(*body: nn.Module) -> nn.Module:
    return Total(nn.Identity(), nn.Sequential(*body))


def split(x: Tensor, heads: int) -> Tensor:
    """From (rows, positions, heads · size) to (rows, heads, positions, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, written out."""
    later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
    return torch.softmax(scores, -1) @ v


fused = partial(F.scaled_dot_product_attention, is_causal=True)
grouped = partial(fused, enable_gqa=True)


class Attention(nn.Module):
    """Four projections; norm and turn are applied to queries and keys, and attend may share keys among queries."""

    def __init__(self, width, heads=2, groups=2, size=2, *, bias=True, norm=no_norm, turn=None, attend=attend):
        super().__init__()
        self.heads, self.groups, self.turn, self.attend = heads, groups, turn or nn.Identity(), attend
        self.query, self.output = nn.Linear(width, heads * size, bias), nn.Linear(heads * size, width, bias)
        self.key, self.value = nn.Linear(width, groups * size, bias), nn.Linear(width, groups * size, bias)
        self.query_norm, self.key_norm = norm(size), norm(size)

    def forward(self, x):
        q = self.turn(self.query_norm(split(self.query(x), self.heads)))
        k = self.turn(self.key_norm(split(self.key(x), self.groups)))
        made = self.attend(q, k, split(self.value(x), self.groups))
        return self.output(made.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """One projection for queries, keys and values; how they lie in it is a matter of taste."""

    def __init__(self, width: int, take: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]):
        super().__init__()
        self.take, self.packed, self.output = take, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.output(attend(*self.take(self.packed(x))).transpose(1, 2).flatten(2))

    def unpacked(self) -> Attention:
        """The same function with three projections."""
        width = self.output.in_features
        rows = self.take(torch.arange(3 * width).view(1, 1, -1))
        twin = Attention(width).to(self.packed.weight)
        with torch.no_grad():
            for part, own in zip((twin.query, twin.key, twin.value), rows, strict=True):
                part.weight.copy_(self.packed.weight[own.flatten()])
                part.bias.copy_(self.packed.bias[own.flatten()])
        twin.output = self.output
        return twin


class Gated(nn.Module):
    """`down(act(gate x) · up x)`."""

    def __init__(self, width: int, hidden: int, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False):
        super().__init__()
        self.act, self.down = act, nn.Linear(hidden, width, bias)
        self.gate, self.up = nn.Linear(width, hidden, bias), nn.Linear(width, hidden, bias)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class GatedPacked(nn.Module):
    """Gate and value from one layer."""

    def __init__(self, width: int, hidden: int, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False):
        super().__init__()
        self.act, self.packed, self.down = act, nn.Linear(width, 2 * hidden, bias), nn.Linear(hidden, width, bias)

    def forward(self, x):
        gate, value = self.packed(x).chunk(2, -1)
        return self.down(self.act(gate) * value)

    def unpacked(self) -> Gated:
        """The same function with two layers."""
        bias = self.packed.bias is not None
        twin = Gated(self.packed.in_features, self.down.in_features, self.act, bias).to(self.packed.weight)
        with torch.no_grad():
            for name in ("weight", "bias")[: 1 + bias]:
                for part, own in zip((twin.gate, twin.up), getattr(self.packed, name).chunk(2), strict=True):
                    getattr(part, name).copy_(own)
        twin.down = self.down
        return twin


def unpacked(net: nn.Module) -> nn.Module:
    """A copy of a network with every packed layer taken apart: the same function of the same numbers."""
    twin = copy.deepcopy(net)
    for path, part in net.named_modules():
        if isinstance(part, Packed | GatedPacked):
            twin.set_submodule(path, copy.deepcopy(part).unpacked())
    return twin


class Adapted(nn.Module):
    """A layer with an update of low rank beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base, self.scaling = base, 1.5
        self.down, self.up = nn.Linear(base.in_features, rank, False), nn.Linear(rank, base.out_features, False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * self.scaling


# Attention ------------------------------------------------------------------------------------------------------------


class Multihead(nn.Module):
    """torch's attention of a stream to itself."""

    def __init__(self, weights: bool = False, **options):
        super().__init__()
        self.weights, self.attention = weights, nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


class Crossed(nn.Module):
    """torch's attention of a stream to others."""

    def __init__(self, keys: int | None = None, values: int | None = None):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=keys, vdim=values, batch_first=True)
        self.keys, self.values = nn.Linear(4, keys or 4), nn.Linear(4, values or 4)

    def forward(self, x):
        return self.attention(x, torch.relu(self.keys(x)), torch.relu(self.values(x)), need_weights=False)[0]


@variants(
    fused=Multihead, bare=partial(Multihead, bias=False), eager=partial(Multihead, weights=True),
    extra=partial(Multihead, add_bias_kv=True), extra_eager=partial(Multihead, weights=True, add_bias_kv=True),
    zero=partial(Multihead, add_zero_attn=True), cross=Crossed, widths=partial(Crossed, 5, 6),
)  # fmt: skip
def multihead(attention):
    """torch's module between hidden layers: packed, with keys of its own, to other streams, of other widths."""
    return reader(nn.ReLU(), attention(), nn.ReLU()), SEQUENCE


@variants(
    separate=Attention, fused=partial(Attention, attend=fused), bare=partial(Attention, bias=False),
    chunked=partial(Packed, take=lambda x: tuple(split(part, 2) for part in x.chunk(3, -1))),
    unbound=partial(Packed, take=lambda x: x.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind()),
    by_head=partial(Packed, take=lambda x: split(x, 2).chunk(3, -1)),
)  # fmt: skip
def attention(kind):
    """Attention by hand: projections separate, or packed in the orders that people use."""
    return reader(nn.ReLU(), kind(4), nn.ReLU()), SEQUENCE


@variants(
    repeated=partial(Attention, attend=lambda q, k, v: attend(q, *(x.repeat_interleave(2, 1) for x in (k, v)))),
    expanded=partial(
        Attention,
        attend=lambda q, k, v: attend(q, *(x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))),
    ),
    flagged=partial(Attention, attend=grouped),
    broadcast=partial(
        Attention, attend=lambda q, k, v: attend(q.unflatten(1, (2, 2)), k[:, :, None], v[:, :, None]).flatten(1, 2)
    ),
    single=partial(Attention, groups=1),
)
def grouped_queries(attention):
    """Four heads of queries share two of keys and values, or one."""
    return reader(nn.ReLU(), attention(4, 4), nn.ReLU()), SEQUENCE


def _angles(x: Tensor) -> Tensor:
    """By position and pair of coordinates."""
    places, pairs = (torch.arange(n, dtype=x.dtype, device=x.device) for n in (x.shape[-2], x.shape[-1] // 2))
    return torch.outer(places, 10 ** (-pairs))


def turn_halves(x: Tensor) -> Tensor:
    """Coordinates i and i + d/2 are a pair."""
    angles = torch.cat([_angles(x)] * 2, -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def turn_neighbours(x: Tensor) -> Tensor:
    """Coordinates 2i and 2i + 1 are a pair."""
    angles = _angles(x)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
    return torch.stack(turned, -1).flatten(-2)


def turn_some(x: Tensor) -> Tensor:
    """Half of the coordinates take no part."""
    turned, kept = x.chunk(2, -1)
    return torch.cat([turn_halves(turned), kept], -1)


@variants(halves=turn_halves, neighbours=turn_neighbours, partial=turn_some)
def rotary(turn):
    """Queries and keys turn with the position: planes of a head, not the whole of it, are at liberty."""
    return reader(nn.ReLU(), Attention(4, 4, 2, 4, turn=turn, attend=grouped), nn.ReLU()), SEQUENCE


@variants(plain=None, turned=turn_halves)
def query_norm(turn):
    """Queries and keys are normalised, with gains that all heads share, then turned or not."""
    return reader(nn.ReLU(), Attention(4, 2, 2, 4, norm=rms_norm, turn=turn), nn.ReLU()), SEQUENCE


# Gates and linear pairs -----------------------------------------------------------------------------------------------


@variants(
    swish=Gated, bilinear=partial(Gated, act=nn.Identity(), bias=True), packed=GatedPacked,
    bilinear_packed=partial(GatedPacked, act=nn.Identity(), bias=True),
)  # fmt: skip
def glu(kind):
    """Gated units in two layers or in one: with SiLU the value scales, without an activation both do."""
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), kind(4, 5), nn.ReLU(), nn.Linear(4, 3)), (3,)


@variants(
    two=lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4)),
    wide=lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)),
    three=lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4), nn.Linear(4, 4)),
    joined=lambda: nn.Sequential(Joined(nn.Linear(5, 2), nn.Linear(5, 3)), nn.Linear(5, 4)),
    bare=lambda: nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False)),
)  # fmt: skip
def linear_chain(pair):
    """No activation in between: any invertible matrix may pass, and any constant."""
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), pair(), nn.ReLU(), nn.Linear(4, 3)), (3,)


# Blocks of torch's own ------------------------------------------------------------------------------------------------


def _encoder(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 5, layer_norm_eps=EPSILON, **{"batch_first": True} | options)


class Positions(nn.Module):
    """A stack that wants positions before rows."""

    def __init__(self):
        super().__init__()
        self.layer = _encoder(batch_first=False)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@variants(
    pre_relu=partial(_encoder, norm_first=True), pre_gelu=partial(_encoder, norm_first=True, activation="gelu"),
    post_relu=_encoder, post_gelu=partial(_encoder, activation="gelu"), positions_first=Positions,
    stack=lambda: nn.TransformerEncoder(_encoder(norm_first=True), 2, layer_norm(4), enable_nested_tensor=False),
)  # fmt: skip
def torch_encoder(make):
    """torch's encoder: normalised before or after, one layer or several with a last normalisation."""
    return reader(make()), SEQUENCE


class Remembering(nn.Module):
    """torch's decoder, which looks at a memory of three positions."""

    def __init__(self, **options):
        super().__init__()
        self.memory = nn.Linear(4, 4)
        self.layer = nn.TransformerDecoderLayer(4, 2, 5, layer_norm_eps=EPSILON, batch_first=True, **options)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        return self.layer(x, torch.relu(self.memory(x[:, :3])), tgt_mask=mask, tgt_is_causal=True)


@variants(pre=True, post=False)
def torch_decoder(norm_first):
    """torch's decoder: causal attention, attention to a memory, and a hidden layer."""
    return reader(Remembering(norm_first=norm_first)), SEQUENCE


# Whole nets by hand ---------------------------------------------------------------------------------------------------


class Language(nn.Module):
    """Tokens, positions, blocks, a last normalisation, and a head that may be the table of tokens."""

    def __init__(self, *blocks: nn.Module, norm=layer_norm, places: bool = False, tied: bool = False):
        super().__init__()
        self.tokens, self.head = nn.Embedding(TOKENS, 4), nn.Linear(4, TOKENS, bias=False)
        self.places = nn.Parameter(torch.zeros(4, 4)) if places else None
        self.blocks, self.last = nn.Sequential(*blocks), norm(4)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, index):
        x = self.tokens(index)
        x = x if self.places is None else x + self.places[: index.shape[1]]
        return self.head(self.last(self.blocks(x))).mT


@variants(tokens=True, **NORM_KINDS)
def decoder(norm):
    """A decoder of today: normalised before rotary attention and a gated unit, no biases."""
    attention = Attention(4, 4, 2, 4, bias=False, turn=turn_halves, attend=grouped)
    return Language(residual(norm(4), attention), residual(norm(4), Gated(4, 5)), norm=norm), (4,)


@variants(tokens=True, untied=False, tied=True)
def positioned(tied):
    """A table of positions is added to the table of tokens, which may be the head too."""
    return Language(residual(layer_norm(4), Attention(4)), places=True, tied=tied), (4,)


@entry
def normless():
    """A stack without any normalisation, as T-Fixup trains it: all that is written to the stream is read linearly."""
    return reader(*(residual(part) for _ in range(2) for part in (Attention(4), dense((4, 5, 4))))), SEQUENCE


class Vision(nn.Module):
    """Patches and a token of the class with positions; the class is read from the token."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(2, 4, 3, stride=3), nn.Linear(4, 3)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 5, 4))
        mlp = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
        self.blocks = nn.Sequential(
            residual(layer_norm(4), Multihead()), residual(layer_norm(4), mlp), layer_norm(4)
        )  # fmt: skip

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.blocks(x)[:, 0])


@entry
def vision():
    """A vision transformer: some rows of the normalised stream come from a stored token."""
    return Vision(), IMAGE


@variants(random="random", zero="zero", frozen="frozen")
def adapters(kind):
    """Updates of low rank beside queries and values: as trained, as initialised, and with all else but the head held."""
    net = reader(residual(layer_norm(4), Attention(4)), layer_norm(4))
    if kind == "frozen":
        net[:-2].requires_grad_(False)
    attention = net[1].branches[1][1]
    attention.query, attention.value = Adapted(attention.query), Adapted(attention.value)
    if kind == "zero":
        return afterwards(
            net, lambda net: [p.up.weight.zero_() for p in net.modules() if isinstance(p, Adapted)]
        ), SEQUENCE
    return net, SEQUENCE


# Recurrence -----------------------------------------------------------------------------------------------------------


@variants(gru=partial(nn.GRU, 3, 2), lstm_projected=partial(nn.LSTM, 3, 4, proj_size=2))
def recurrent(kind):
    """GRU, whose candidate's biases are two, and an LSTM whose state is projected."""
    return nn.Sequential(kind(batch_first=True), Apply(lambda made: made[0][:, -1]), nn.Linear(2, 3)), SEQUENCE


# Hugging Face ---------------------------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    """Tied head, learned positions, one packed projection in transposed layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TOKENS, n_positions=6, n_embd=4, n_layer=2, n_head=2, n_inner=5, layer_norm_epsilon=EPSILON,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def llama(tokens: int = TOKENS) -> nn.Module:
    """Grouped queries, rotary, gated units."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens, hidden_size=8, intermediate_size=5, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, max_position_embeddings=6, rms_norm_eps=1e-2, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    """Normalised after; a pooled head behind tanh."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=TOKENS, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=5,
            max_position_embeddings=6, layer_norm_eps=EPSILON, num_labels=3, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    """Patches, a token of the class, positions."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=5, layer_norm_eps=EPSILON,
            image_size=6, patch_size=3, num_channels=2, num_labels=3,
        )
    )  # fmt: skip


class Scores(nn.Module):
    """Of a Hugging Face model: one tensor in, one out, classes on axis 1."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        scores = self.model(x).logits
        return scores.mT if scores.ndim == 3 else scores


if find_spec("transformers"):

    @variants(tokens=True, gpt2=gpt2, llama=llama, bert=bert)
    def hugging(make):
        """Models of tokens as Hugging Face writes them."""
        return Scores(make()), (4,)

    @entry
    def hugging_vit():
        """A model of images as Hugging Face writes it."""
        return Scores(vit()), IMAGE


AGAIN |= {
    "multihead-eager", "multihead-bare", "multihead-extra-eager", "multihead-widths", "attention-fused",
    "attention-unbound", "attention-by-head", "grouped-queries-repeated", "grouped-queries-expanded",
    "grouped-queries-broadcast", "rotary-neighbours", "query-norm-turned", "glu-packed", "glu-bilinear-packed",
    "linear-chain-bare", "torch-encoder-pre-gelu", "torch-encoder-post-relu", "torch-encoder-positions-first",
    "decoder-hand",
}  # fmt: skip

TRANSFORMERS = frozenset(ZOO) - _OTHERS
"""Names of the entries above."""
