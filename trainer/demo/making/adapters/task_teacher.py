"""Teachers of the demo's further tasks: the embedded teacher learns to read a task's channels.

The base stays frozen. What trains is the input layer's weights for the extra channels, from zero, and a LoRA on the
network, by the ordinary diffusion loss on the teacher's own pictures under the task's conditions. The result is a task
adapter (``flash_core/task_adapter.py``), a file of about a megabyte in ``tasks/``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .....flash_core.denoiser import Conditioning, Role
from .....flash_core.task_adapter import TaskAdapter, write_task_adapter
from ....config import DataSection, ModelSection, TaskSection
from ....data.encode import Examples, encode_examples
from ....distill.schedule import Average
from ....errors import UserError
from ....export.export import lora_modules
from ....seeds import stream
from ....tasks import TASKS, build_task
from ....tasks.base import Task
from ....tasks.face_swap import FaceSwap
from ....teachers import load_teacher
from ....teachers.base import Teacher
from ...assets import TASK_ADAPTERS

logger = logging.getLogger(__name__)

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
TARGETS += ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
WITH_CHANNELS = [name for name in TASKS if name not in ("text-to-image", "control")]
NULL_SHARE = 0.1  # of the samples: unconditional, for guidance
BETAS = (0.9, 0.99)
EMA_DECAY = 0.995
WARM_UP = 50  # updates
FLAT_SHARE = 0.3  # of the run at the full rate, then a cosine
GRADIENT_CLIP = 1.0
LOG_EVERY = 50


class WideInput(nn.Module):
    """An input convolution that reads further channels, whose weights are the only ones that train."""

    def __init__(self, base: nn.Conv2d, extra: int) -> None:
        super().__init__()
        self.base = base
        self.extra = nn.Conv2d(extra, base.out_channels, base.kernel_size, padding=base.padding, bias=False)
        nn.init.zeros_(self.extra.weight)

    def forward(self, z: Tensor) -> Tensor:
        """``z`` (B, C + E, h, w)."""
        own = self.base.in_channels
        return self.base(z[:, :own]) + self.extra(z[:, own:])


class DiffusionTraining(ABC):
    """Something small on the frozen teacher, its average and its batches, trained by the ordinary diffusion loss.

    Args:
        examples: what it learns from.
        task: says what the unconditional branch of guidance sees, which a share of the samples learn.
    """

    role: ClassVar[Role]  # the denoiser's while it trains

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
        self.average = Average(self.parameters, EMA_DECAY)
        self.generator = stream(seed, "task teacher")
        self.step = 0

    @abstractmethod
    def trained_parameters(self, seed: int) -> dict[str, nn.Parameter]:
        """What trains, put in its place and given its first values."""

    def update(self, progress: float) -> Tensor:
        """One update; its loss, detached.

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
        fallen = max(0.0, progress - FLAT_SHARE) / (1 - FLAT_SHARE)
        rate = min(1.0, (self.step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * fallen))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
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
        """The LoRA, and what else there is."""
        self.denoiser.add_adapter(self.role, self.rank, self.rank, TARGETS, seed)
        return {**self.denoiser.adapter_parameters(self.role), **self.further_parameters()}

    def further_parameters(self) -> dict[str, nn.Parameter]:
        """What trains beside the LoRA."""
        return {}


class TaskTraining(AdapterTraining):
    """The LoRA of a task's teacher, and the input layer's weights for the task's channels.

    Args:
        examples: with the task's conditions, several variants of each picture.
    """

    def further_parameters(self) -> dict[str, nn.Parameter]:
        """The weights for the further channels."""
        concat = self.examples.task.concat
        if concat is None:
            raise UserError("this task adds no channels to the network, so there is no teacher of it to train")
        network = self.denoiser.network
        network.conv_in = WideInput(network.conv_in, concat.shape[1]).to(self.device)
        self.channels: nn.Parameter = network.conv_in.extra.weight
        return {"channels": self.channels}

    def adapter(self, task: TaskSection, facts: dict[str, str]) -> TaskAdapter:
        """What was learnt, averaged."""
        tensors = dict(self.average.tensors)
        channels = tensors.pop("channels")
        return TaskAdapter(task.name, channels, lora_modules(tensors, None), task.options, facts)


def train(training: DiffusionTraining, minutes: float) -> None:
    """Update for ``minutes``."""
    start, losses = time.monotonic(), []
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        losses.append(training.update(progress))
        if training.step % LOG_EVERY == 0:
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                raise UserError(f"the loss is {mean} at update {training.step}; use a lower --learning-rate")
            speed = training.step * training.batch_size / (time.monotonic() - start)
            logger.info("update %d  loss %.4f  %.1f images/s  %3.0f %%", training.step, mean, speed, 100 * progress)
            losses.clear()


def add_training_arguments(
    parser: argparse.ArgumentParser, *, minutes: float, batch_size: int, learning_rate: float
) -> None:
    """The options that all trainings of the demo's small files share, with their defaults."""
    shown = "(default: %(default)s)"
    parser.add_argument("--minutes", type=float, default=minutes, help=f"length of the training {shown}")
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"pictures an update {shown}")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help=f"at its height {shown}")
    parser.add_argument("--seed", type=int, default=0, help=f"of weights, conditions and noise {shown}")
    parser.add_argument("--device", default="cpu", help=f"a torch device {shown}")
    parser.add_argument("--output", type=Path, help="the file (default: the one that ships with the demo)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion demo-task-teacher``."""
    parser.add_argument("task", choices=WITH_CHANNELS, help="what to learn; of ControlNets, see demo-control")
    parser.add_argument(
        "--data",
        choices=("demo", "demo-swaps"),
        help="the pictures, as a recipe's data.source calls them (default: demo-swaps for face-swap, else demo)",
    )
    parser.add_argument("--limit", type=int, help="use the first so many pictures only")
    parser.add_argument("--options", type=json.loads, default={}, help="the task's settings, as JSON")
    parser.add_argument("--variants", type=int, default=16, help="conditions of each picture (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=12, help="of the LoRA (default: %(default)s)")
    add_training_arguments(parser, minutes=12.0, batch_size=32, learning_rate=2e-3)


def run(args: argparse.Namespace) -> int:
    """Train and write the adapter."""
    torch.set_flush_denormal(True)  # moments that fade to denormal numbers slow a CPU down tenfold
    section = TaskSection(name=args.task, variants=args.variants, options=args.options)
    task = build_task(section)
    teacher = load_teacher(ModelSection(family="demo"), args.device)
    source = args.data or ("demo-swaps" if args.task == FaceSwap.name else "demo")
    examples = encode_examples(DataSection(source=source, limit=args.limit), teacher, task, args.variants, args.seed)
    logger.info("%d samples of the task %s", len(examples), task.name)
    teacher_hash = teacher.weights_hash()  # of the base, before the training changes its layers
    training = TaskTraining(teacher, examples, task, args.rank, args.batch_size, args.learning_rate, args.seed)
    teacher.release_encoders()
    train(training, args.minutes)
    facts: dict[str, Any] = {"updates": training.step, "batch_size": args.batch_size, "teacher_hash": teacher_hash}
    path = args.output or TASK_ADAPTERS / f"{args.task}.safetensors"
    adapter = training.adapter(section, {f"flash.training.{name}": str(value) for name, value in facts.items()})
    write_task_adapter(path, adapter)
    logger.info("%d updates; the adapter is at %s (%.2f MB)", training.step, path, path.stat().st_size / 1e6)
    return 0
