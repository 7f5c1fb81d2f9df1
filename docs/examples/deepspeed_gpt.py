"""A small GPT under DeepSpeed, ZeRO-2 on two ranks: saved lazily, and resumed.

python deepspeed_gpt.py runs/gpt           # starts itself on two ranks
python deepspeed_gpt.py runs/gpt           # goes on from the latest checkpoint
"""

import argparse
import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "steps_per_print": 1 << 30,
    # All that aiockpt needs: host memory for each rank in GiB, and threads that write.
    "aiockpt": {"host_cache_size": 0.25, "parser_threads": 2},
}
NUM_TOKENS, CONTEXT = 96, 64


class GPT(torch.nn.Module):
    """Predicts the next byte; the head is tied to the embedding."""

    def __init__(self, width: int = 128, num_layers: int = 2) -> None:
        """Weights are drawn from torch's generator."""
        super().__init__()
        self.tokens = torch.nn.Embedding(NUM_TOKENS, width)
        self.places = torch.nn.Embedding(CONTEXT, width)
        layer = torch.nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, num_layers)
        self.head = torch.nn.Linear(width, NUM_TOKENS, bias=False)
        self.head.weight = self.tokens.weight
        mask = torch.nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """The loss of predicting each token from those before it."""
        seen, following = text[:, :-1], text[:, 1:]
        x = self.tokens(seen) + self.places.weight
        scores = self.head(self.layers(x, mask=self.mask)).float()
        return torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), following.flatten()
        )


def batch(step: int, rank: int) -> torch.Tensor:
    """Counting in threes from random numbers; the same for a step, however reached."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    start = torch.randint(NUM_TOKENS, (4, 1), generator=generator)
    return (start + 3 * torch.arange(CONTEXT + 1)) % NUM_TOKENS


def train(root: str, steps: int) -> None:
    """Trains up to a step, with a checkpoint after every fifth."""
    # After the accelerator was chosen; and it takes seconds.
    import deepspeed

    from aiockpt.integrations.deepspeed import install

    install()
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    model = GPT()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=CONFIG
    )
    _, state = engine.load_checkpoint(root)
    done = state["step"] if state else 0
    rank = torch.distributed.get_rank()
    if rank == 0:
        print(f"starts after step {done}", flush=True)
    for step in range(done + 1, steps + 1):
        loss = engine(batch(step, rank).to(engine.device))
        engine.backward(loss)
        engine.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
        if step % 5 == 0:
            # Returns when the state has been captured; the next steps go on meanwhile.
            engine.save_checkpoint(root, client_state={"step": step})
    # Waits for the last checkpoint. Without it, the end of the program does.
    engine.destroy()
    torch.distributed.destroy_process_group()


def main() -> None:
    """Starts two ranks, or is one of them."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("root")
    arguments.add_argument("--steps", type=int, default=20)
    options = arguments.parse_args()
    if "RANK" in os.environ:
        train(options.root, options.steps)
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])  # noqa: S606


if __name__ == "__main__":
    main()
