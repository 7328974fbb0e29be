"""``flash-diffusion demo task-teacher``: train a task adapter, with which the embedded teacher reads a task's channels.

The base stays frozen. Two parts train: the input layer's weights for the extra channels, from zero, and a LoRA on the
network. The loss is the diffusion loss on the teacher's own pictures with the task's conditions. The result is a file
of about a megabyte (``flash_core/task_adapter.py``) in ``tasks/``.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

import torch
from torch import Tensor, nn

from .....flash_core.task_adapter import TaskAdapter, write_task_adapter
from ....config import DataSection, TaskSection
from ....data.encoding.prepare import prepare_examples
from ....errors import UserError
from ....export.export import lora_modules
from ....tasks import TASKS, build_task
from ....tasks.face_swap import FaceSwap
from ...assets import TASK_ADAPTERS
from .training import AdapterTraining, add_training_arguments, demo_teacher, train

logger = logging.getLogger(__name__)

WITH_CHANNELS = [name for name in TASKS if name not in ("text-to-image", "control")]


class WideInput(nn.Module):
    """An input convolution with further channels. Only the weights of the further channels train."""

    def __init__(self, base: nn.Conv2d, extra: int) -> None:
        super().__init__()
        self.base = base
        kernel, padding = base.kernel_size, base.padding
        # torch says that a convolution's own kernel_size and padding have any length.
        self.extra = nn.Conv2d(extra, base.out_channels, kernel, padding=padding, bias=False)  # type: ignore[arg-type]
        nn.init.zeros_(self.extra.weight)

    def forward(self, z: Tensor) -> Tensor:
        """Convolve ``z`` (B, C + E, h, w): C channels of the base and E further ones."""
        own = self.base.in_channels
        output: Tensor = self.base(z[:, :own]) + self.extra(z[:, own:])
        return output


class TaskTraining(AdapterTraining):
    """The training of a task adapter: a LoRA, and the input layer's weights for the task's channels.

    Args:
        examples: with the task's conditions, several variants of each picture.
    """

    def further_parameters(self) -> dict[str, nn.Parameter]:
        """Widen the input layer and return its new weights."""
        _, conditioning = self.examples.batch(torch.zeros(1, dtype=torch.long), self.device)
        concat = conditioning.concat
        if concat is None:
            raise UserError(
                "this task adds no channels to the network, so it needs no task adapter; choose another task"
            )
        network = self.denoiser.network
        wide = WideInput(network.conv_in, concat.shape[1]).to(self.device)
        network.conv_in = wide
        self.channels: nn.Parameter = wide.extra.get_parameter("weight")
        return {"channels": self.channels}

    def adapter(self, task: TaskSection, facts: dict[str, str]) -> TaskAdapter:
        """Return the task adapter with the averaged weights."""
        tensors = dict(self.average.tensors)
        channels = tensors.pop("channels")
        return TaskAdapter(task.name, channels, lora_modules(tensors, None), task.options, facts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion demo task-teacher``."""
    parser.add_argument("task", choices=WITH_CHANNELS, help="the task to learn (for ControlNets: `demo control`)")
    parser.add_argument(
        "--data",
        choices=("demo", "demo-swaps"),
        help="the pictures, as data.source in a recipe (default: demo-swaps for face-swap, demo for the others)",
    )
    parser.add_argument("--limit", type=int, help="use only this many pictures, the first ones")
    parser.add_argument("--options", type=json.loads, default={}, help="settings of the task, as JSON")
    parser.add_argument(
        "--variants", type=int, default=16, help="random conditions of each picture (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=12, help="rank of the LoRA (default: %(default)s)")
    add_training_arguments(parser, updates=1000, batch_size=32, learning_rate=2e-3)


def run(args: argparse.Namespace) -> int:
    """Train and write the task adapter."""
    section = TaskSection(name=args.task, variants=args.variants, options=args.options)
    task = build_task(section)
    teacher = demo_teacher(args.device)
    source = args.data or ("demo-swaps" if args.task == FaceSwap.name else "demo")
    examples = prepare_examples(DataSection(source=source, limit=args.limit), teacher, task, args.variants)
    logger.info("%d samples of the task %s", len(examples), task.name)
    teacher_hash = teacher.weights_hash()  # of the base, before the training changes its layers
    training = TaskTraining(teacher, examples, task, args.rank, args.batch_size, args.learning_rate, args.seed)
    teacher.release_encoders()
    train(training, args.updates)
    facts: dict[str, Any] = {"updates": training.step, "batch_size": args.batch_size, "teacher_hash": teacher_hash}
    path = args.output or TASK_ADAPTERS / f"{args.task}.safetensors"
    adapter = training.adapter(section, {f"flash.training.{name}": str(value) for name, value in facts.items()})
    write_task_adapter(path, adapter)
    logger.info("%d updates; the task adapter is at %s (%.2f MB)", training.step, path, path.stat().st_size / 1e6)
    return 0
