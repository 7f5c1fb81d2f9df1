"""Small models of every kind that DeepSpeed treats in its own way, and their data."""

import torch
from torch import nn

WIDTH = 192
VOCABULARY = 64


class Block(nn.Module):
    """What a checkpoint may hold: running statistics, frozen weights, plain buffers."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        # One small, one too large to be copied for its size alone.
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros(VOCABULARY, WIDTH * 4))

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0).to(self.mean.dtype), 0.1)
        self.seen.add_(1)
        return self.norm(x + torch.relu(self.linear(self.frozen(x))))


class Language(nn.Module):
    """Predicts tokens; the head is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).float(), targets)


class Experts(nn.Module):
    """A layer of experts between two linear ones."""

    def __init__(self, num_experts, ep_size):
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        expert = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.moe = MoE(
            hidden_size=WIDTH,
            expert=expert,
            num_experts=num_experts,
            ep_size=ep_size,
            k=1,
            use_rts=False,
        )
        self.block = Block()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens, targets):
        x, _, _ = self.moe(self.embedding(tokens))
        x = self.block(x)
        return nn.functional.cross_entropy(self.head(x).float(), targets)


class Last(nn.Module):
    """The last layer of a pipeline."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x):
        return self.head(x)


def pipeline(num_stages):
    """The language model as layers, without the tie."""
    from deepspeed.pipe import LayerSpec, PipelineModule

    layers = [
        LayerSpec(nn.Embedding, VOCABULARY, WIDTH),
        LayerSpec(Block),
        LayerSpec(Block),
        LayerSpec(Last),
    ]
    return PipelineModule(
        layers,
        num_stages=num_stages,
        loss_fn=lambda out, to: nn.functional.cross_entropy(out.float(), to),
        partition_method="uniform",
    )


def batch(step, rank, size=8):
    """Tokens and targets, the same whenever they are asked for."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(VOCABULARY, (2, size), generator=generator)
    return tokens[0], tokens[1]
