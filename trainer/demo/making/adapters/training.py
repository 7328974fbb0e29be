"""Train a small network beside the demo's frozen teacher by the diffusion loss: the part that all of them share."""

from __future__ import annotations

import argparse
import logging
import math
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .....flash_core.denoiser import Conditioning, Role
from .....flash_core.runs.schedule import WeightAverage, warmup_cosine
from ....config import ModelSection
from ....data.encoding.examples import Examples
from ....errors import UserError
from ....seeds import stream
from ....tasks.base import Task
from ....teachers import load_teacher
from ....teachers.base import Teacher

logger = logging.getLogger(__name__)

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
TARGETS = (*ATTENTION_TARGETS, "conv1", "conv2", "time_emb_proj", "conv_shortcut")
NULL_SHARE = 0.1  # of the samples are unconditional, for guidance
BETAS = (0.9, 0.99)
EMA_DECAY = 0.995
WARM_UP = 50  # updates
FLAT_SHARE = 0.3  # of the run at the full learning rate, then a cosine
GRADIENT_CLIP = 1.0
LOG_EVERY = 50


class DiffusionTraining(ABC):
    """The training of a small network on the frozen teacher, with its moving average and its batches.

    Args:
        examples: training examples.
        task: makes the conditions of guidance's unconditional branch, for a share of the samples.
    """

    role: ClassVar[Role]  # role of the denoiser during training

    def __init__(self, teacher: Teacher, examples: Examples, task: Task, batch_size: int, lr: float, seed: int) -> None:
        self.task = task
        self.denoiser = teacher.denoiser
        self.device = teacher.device
        self.examples = examples
        self.empty = teacher.unconditional(1)
        self.batch_size = batch_size
        self.lr = lr
        self.parameters = self.trained_parameters(seed)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr, BETAS, weight_decay=0.0, fused=True)
        self.average = WeightAverage(self.parameters, EMA_DECAY)
        self.generator = stream(seed, "task teacher")
        self.step = 0

    @abstractmethod
    def trained_parameters(self, seed: int) -> dict[str, nn.Parameter]:
        """Put the trained parameters in place, initialise them, and return them by name."""

    def update(self, progress: float) -> Tensor:
        """Make one update and return its loss, detached.

        Args:
            progress: of the run, in 0..1.
        """
        z0, conditioning = self._batch()
        process, batch = self.denoiser.process, len(z0)
        # One timestep in each of B equal parts of the schedule, which calms the loss.
        tau = (torch.arange(batch) + torch.rand(batch, generator=self.generator)) * 1000 / batch
        t = process.uniform_timestep(tau.long().to(self.device))
        noise = torch.randn(z0.shape, generator=self.generator).to(self.device)
        with self.denoiser.role(self.role):
            output = self.denoiser.predict(process.add_noise(z0, noise, t), t, conditioning)
            loss = F.mse_loss(output, process.target(z0, noise, t))
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), GRADIENT_CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * warmup_cosine(self.step, progress, warmup=WARM_UP, flat=FLAT_SHARE)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.step)
        self.step += 1
        return loss.detach()

    def _batch(self) -> tuple[Tensor, Conditioning]:
        index = torch.randint(len(self.examples), (self.batch_size,), generator=self.generator)
        z0, conditioning = self.examples.batch(index, self.device)
        empty = self.empty.map(lambda value: value.expand(self.batch_size, *value.shape[1:]))
        both = Conditioning.cat([conditioning, self.task.unconditional(conditioning, empty)])
        dropped = torch.rand(self.batch_size, generator=self.generator) < NULL_SHARE
        return z0, both.rows(torch.arange(self.batch_size) + self.batch_size * dropped)


class AdapterTraining(DiffusionTraining):
    """The training of a LoRA on the teacher."""

    role = "student"

    def __init__(
        self, teacher: Teacher, examples: Examples, task: Task, rank: int, batch_size: int, lr: float, seed: int
    ) -> None:
        self.rank = rank
        super().__init__(teacher, examples, task, batch_size, lr, seed)

    def trained_parameters(self, seed: int) -> dict[str, nn.Parameter]:
        """Add the LoRA and return its parameters, with the further parameters."""
        self.denoiser.add_adapter(self.role, self.rank, self.rank, TARGETS, seed)
        return {**self.denoiser.adapter_parameters(self.role), **self.further_parameters()}

    def further_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train beside the LoRA."""
        return {}


def demo_teacher(device: str) -> Teacher:
    """Load the embedded teacher, and prepare this process for training on a CPU.

    AdamW's moments fade to denormal numbers, which slow a CPU down tenfold; they are set to 0 instead.
    """
    torch.set_flush_denormal(True)
    return load_teacher(ModelSection(family="demo"), device)


def train(training: DiffusionTraining, updates: int) -> None:
    """Make ``updates`` updates."""
    start, losses = time.monotonic(), []
    while training.step < updates:
        losses.append(training.update(training.step / updates))
        if training.step % LOG_EVERY == 0:
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                raise UserError(f"the loss is {mean} at update {training.step}; use a lower --learning-rate")
            speed = training.step * training.batch_size / (time.monotonic() - start)
            logger.info("update %d of %d  loss %.4f  %.1f images/s", training.step, updates, mean, speed)
            losses.clear()


def add_training_arguments(
    parser: argparse.ArgumentParser, *, updates: int, batch_size: int, learning_rate: float
) -> None:
    """Add the options that these trainings share, with their defaults."""
    shown = "(default: %(default)s)"
    parser.add_argument("--updates", type=int, default=updates, help=f"updates of the weights {shown}")
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"pictures of an update {shown}")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help=f"largest learning rate {shown}")
    parser.add_argument("--seed", type=int, default=0, help=f"seed of weights, conditions and noise {shown}")
    parser.add_argument("--device", default="cpu", help=f"torch device: cpu, cuda, mps {shown}")
    parser.add_argument("--output", type=Path, help="file to write (default: the demo's own file)")
