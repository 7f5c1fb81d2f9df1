"""The Hugging Face Trainer with checkpoints that are written while it trains.

python trainer_run.py runs/trainer
python trainer_run.py runs/trainer --steps 40 --resume
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from aiockpt.integrations.huggingface import CheckpointMixin


class BackgroundTrainer(CheckpointMixin, Trainer):
    """All that is special here."""


def main() -> None:
    """Trains a tiny model; the checkpoints are those of the stock Trainer."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("root")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--resume", action="store_true")
    options = arguments.parse_args()

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "n_positions": 32,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    tokens = torch.randint(2, 64, (64, 16))
    trainer = BackgroundTrainer(
        model,
        TrainingArguments(
            options.root,
            max_steps=options.steps,
            save_steps=10,
            save_total_limit=2,
            per_device_train_batch_size=8,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    )
    result = trainer.train(resume_from_checkpoint=options.resume)
    print(f"step {result.global_step}: loss {result.training_loss:.4f}")


if __name__ == "__main__":
    main()
