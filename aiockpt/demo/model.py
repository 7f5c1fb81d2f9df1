"""A small decoder-only transformer over bytes, in plain PyTorch."""

__all__ = ["VOCABULARY", "Shape", "Transformer"]

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

VOCABULARY = 256  # Tokens are bytes.


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How large the model is; the default has 1.9 million parameters.

    Attributes:
        num_layers: Transformer blocks.
        num_heads: Attention heads; divides `dim`.
        dim: Width of the residual stream.
        context: Tokens that the model looks back on, at most.
        dropout: Probability of dropping; it makes a run depend on the state of
            the random number generator, as real runs do.
    """

    num_layers: int = 4
    num_heads: int = 4
    dim: int = 192
    context: int = 128
    dropout: float = 0.1


class Transformer(nn.Module):
    """Predicts the next byte at every position."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, shape.dim)
        self.position = nn.Embedding(shape.context, shape.dim)
        self.drop = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, VOCABULARY, bias=False)
        self.apply(_initialise)
        # Tied, as in most language models: a checkpoint holds the bytes once.
        self.head.weight = self.token.weight

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, length, 256)` for `tokens` `(batch, length)`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden: Tensor = self.drop(self.token(tokens) + self.position(positions))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of predicting `tokens[:, 1:]`, in nats per byte."""
        logits = self(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.dim)
        self.attention = _Attention(shape)
        self.mlp_norm = nn.LayerNorm(shape.dim)
        self.mlp = nn.Sequential(
            nn.Linear(shape.dim, 4 * shape.dim),
            nn.GELU(),
            nn.Linear(4 * shape.dim, shape.dim),
            nn.Dropout(shape.dropout),
        )

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        mixed: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return mixed


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.dropout = shape.dropout
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim)
        self.out = nn.Linear(shape.dim, shape.dim)

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, dim = hidden.shape
        # (3, batch, head, length, dim of a head)
        heads = self.qkv(hidden).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True
        )
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
