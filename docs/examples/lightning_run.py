"""Lightning with checkpoints that are written while it trains.

python lightning_run.py runs/lightning
python lightning_run.py runs/lightning --resume
"""

import argparse

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from aiockpt.integrations.lightning import AiockptCheckpointIO


class Regression(lightning.LightningModule):
    """Learns to reverse a row of numbers."""

    def __init__(self) -> None:
        """Small enough for any machine."""
        super().__init__()
        self.net = torch.nn.Linear(32, 32)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The loss of one batch."""
        [rows] = batch
        loss = (self.net(rows) - rows.flip(1)).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Its `step` waits until a checkpoint's tensors have been copied."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    """Trains; with `--resume`, for twice as long, from the last checkpoint."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("root")
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--resume", action="store_true")
    options = arguments.parse_args()

    lightning.seed_everything(0)
    rows = torch.utils.data.TensorDataset(torch.randn(256, 32))
    saving = ModelCheckpoint(options.root, save_top_k=1, save_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs * (2 if options.resume else 1),
        plugins=[AiockptCheckpointIO()],  # all that is special here
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        default_root_dir=options.root,
    )
    last = f"{options.root}/last.ckpt" if options.resume else None
    loader = torch.utils.data.DataLoader(rows, batch_size=16)
    trainer.fit(Regression(), loader, ckpt_path=last)
    loss = trainer.callback_metrics["loss"]
    print(
        f"step {trainer.global_step}: loss {loss:.4f}, saved {saving.last_model_path}"
    )


if __name__ == "__main__":
    main()
