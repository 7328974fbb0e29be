"""The teacher's training: batches, loop, learning rate, and checkpoints that continue exactly."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .....flash_core.runs.schedule import WeightAverage, warmup_cosine
from ....errors import UserError
from ....files import write_whole
from ..patch_pca import PatchPCA
from .architecture import build_scheduler, tokenize

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from ...shards import Pictures

logger = logging.getLogger(__name__)

NULL_SHARE, GENERAL_SHARE = 0.1, 0.2  # of the captions: empty (for guidance), general; the others are names
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01
EMA_DECAY = 0.998
WARM_UP = 100  # updates
FLAT_SHARE = 0.3  # of the run at the full learning rate; then a cosine down to FINAL_SHARE of it
FINAL_SHARE = 0.02
CHECKPOINT_EVERY = 180.0  # seconds
TRAINING_FILE = "training.json"  # beside the exported weights: how long they were trained


@dataclass(frozen=True)
class TrainingSet:
    """Latents (N, C, H, W), token ids (N, L) of names and general captions, and token ids (1, L) of the empty text."""

    latents: Tensor
    names: Tensor
    general: Tensor
    null: Tensor

    @classmethod
    def of(cls, pictures: Pictures, tokenizer: CLIPTokenizer, device: str = "cpu") -> TrainingSet:
        """Encode pictures by the exact patch-PCA, and captions as token ids."""
        return cls(
            PatchPCA.load().encode(pictures.images / 255).to(device),
            tokenize(tokenizer, [caption.name for caption in pictures.captions]).to(device),
            tokenize(tokenizer, [caption.general for caption in pictures.captions]).to(device),
            tokenize(tokenizer, [""]).to(device),
        )


class Trainer:
    """Weights, their moving average, optimiser and random state: the contents of a checkpoint."""

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        data: TrainingSet,
        *,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        bf16: bool = False,
        seed: int = 0,
    ) -> None:
        """Prepare to train `unet` and `text_encoder` on `data`, which is on the same device."""
        self.model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).train()
        # torch's overloads of Module.to lack memory_format.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.data = data
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.device = data.latents.device
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.parameters = dict(self.model.named_parameters())
        self.average = WeightAverage(self.parameters, EMA_DECAY)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        # Drawn on the CPU, so that a run gives the same batches on every device.
        self.generator = torch.Generator().manual_seed(seed)
        self.alphas_cumprod = build_scheduler().alphas_cumprod.to(self.device)
        self.step = 0  # updates of this optimiser
        self.earlier_steps = 0  # updates before it, of the exported weights it started from
        self.seconds = 0.0

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return latents, noise, timesteps (one in each of B equal parts of 0..999, for a calm loss) and token ids."""
        size, generator = self.batch_size, self.generator
        index = torch.randint(len(self.data.latents), (size,), generator=generator)
        caption = torch.rand(size, 1, generator=generator).to(self.device)
        offset = torch.rand(1, generator=generator)
        noise = torch.randn(size, *self.data.latents.shape[1:], generator=generator).to(self.device)
        timesteps = ((offset + torch.arange(size) / size) % 1 * 1000).long().to(self.device)
        index = index.to(self.device)
        tokens = torch.where(caption < NULL_SHARE + GENERAL_SHARE, self.data.general[index], self.data.names[index])
        tokens = torch.where(caption < NULL_SHARE, self.data.null, tokens)
        return self.data.latents[index], noise, timesteps, tokens

    def update(self, progress: float) -> float:
        """Make one update at `progress` in [0, 1] of the schedule, and return its loss."""
        latents, noise, timesteps, tokens = self.batch()
        alpha_squared = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        noisy = (alpha * latents + sigma * noise).contiguous(memory_format=torch.channels_last)
        target = self.target(latents, noise, alpha, sigma)
        with self.autocast:
            hidden = self.model["text_encoder"](tokens).last_hidden_state
            prediction = self.model["unet"](noisy, timesteps, hidden).sample
        loss = F.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * schedule(self.step, progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)
        return loss.item()

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return what the UNet learns to predict: the velocity."""
        return alpha * noise - sigma * latents

    def save(self, path: Path) -> None:
        """Write a checkpoint; after a crash the previous one is still complete."""
        tensors = {f"model.{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.tensors.items()}
        for name, value in self.parameters.items():
            for key, state in self.optimizer.state[value].items():
                tensors[f"optimizer.{key}.{name}"] = state
        tensors["generator"] = self.generator.get_state()
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        facts = {"step": str(self.step), "earlier_steps": str(self.earlier_steps), "seconds": str(self.seconds)}
        write_whole(path, lambda partial: save_file(tensors, partial, facts))

    def load(self, path: Path) -> None:
        """Read a checkpoint and continue exactly."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            with torch.no_grad():
                for name, value in self.parameters.items():
                    value.copy_(file.get_tensor(f"model.{name}"))
                    self.average.tensors[name].copy_(file.get_tensor(f"average.{name}"))
                    self.optimizer.state[value] = {
                        "step": file.get_tensor(f"optimizer.step.{name}").to(self.device),
                        **{
                            key: torch.empty_like(value).copy_(file.get_tensor(f"optimizer.{key}.{name}"))
                            for key in ("exp_avg", "exp_avg_sq")
                        },
                    }
            self.generator.set_state(file.get_tensor("generator"))
        self.step, self.earlier_steps = int(metadata["step"]), int(metadata["earlier_steps"])
        self.seconds = float(metadata["seconds"])

    def count_from(self, folder: Path) -> None:
        """Count the updates and seconds of an exported teacher; the optimiser still warms up again."""
        training = json.loads((folder / TRAINING_FILE).read_text())
        self.earlier_steps, self.seconds = training["updates"], float(training["seconds"])


def schedule(step: int, progress: float) -> float:
    """Return the learning rate as a share of its full value."""
    return warmup_cosine(step, progress, warmup=WARM_UP, flat=FLAT_SHARE, final=FINAL_SHARE)


def train(trainer: Trainer, checkpoint: Path, updates: int) -> None:
    """Make updates until there are `updates` in all, those of the checkpoint that it goes on from included."""
    start, first_step, earlier = time.monotonic(), trainer.step, trainer.seconds
    saved, loss_average = start, math.nan
    while trainer.step < updates:
        loss = trainer.update(trainer.step / updates)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at update {trainer.step}; the last good checkpoint is {checkpoint}: "
                "continue it with --resume and a lower --learning-rate"
            )
        trainer.seconds = earlier + time.monotonic() - start
        loss_average = loss if math.isnan(loss_average) else 0.99 * loss_average + 0.01 * loss
        if trainer.step % 200 == 0:
            speed = (trainer.step - first_step) * trainer.batch_size / (time.monotonic() - start)
            epochs = (trainer.earlier_steps + trainer.step) * trainer.batch_size / len(trainer.data.latents)
            logger.info(
                "update %d of %d  epoch %.0f  loss %.4f  %.1f images/s",
                trainer.step, updates, epochs, loss_average, speed,
            )  # fmt: skip
        if time.monotonic() - saved > CHECKPOINT_EVERY:
            trainer.save(checkpoint)
            saved = time.monotonic()


def v_loss(unet: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer, pictures: Pictures) -> list[float]:
    """Return the v-prediction loss on all pictures with their names, per quarter of the timesteps, low noise first."""
    data = TrainingSet.of(pictures, tokenizer)
    generator = torch.Generator().manual_seed(0)
    alphas_cumprod = build_scheduler().alphas_cumprod
    losses = []
    for quarter in range(4):
        total = 0.0
        for latents, tokens in zip(data.latents.split(32), data.names.split(32), strict=True):
            timesteps = torch.randint(250 * quarter, 250 * (quarter + 1), (len(latents),), generator=generator)
            noise = torch.randn(latents.shape, generator=generator)
            alpha_squared = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
            with torch.no_grad():
                hidden = text_encoder(tokens).last_hidden_state
                velocity = unet(alpha * latents + sigma * noise, timesteps, hidden).sample
            total += F.mse_loss(velocity, alpha * noise - sigma * latents).item() * len(latents)
        losses.append(total / len(data.latents))
    return losses
