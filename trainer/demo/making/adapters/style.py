"""``flash-diffusion demo style``: train a style LoRA, with which the teacher draws another set of emoji.

It is an ordinary LoRA, trained by the diffusion loss for many steps. Put it on top of the Flash LoRA with ComfyUI's
Flash LoRA Stack.
"""

from __future__ import annotations

import argparse
import logging

import torch

from .....flash_core.lora import write_lora
from ....config import DataSection, TaskSection
from ....data.encoding.prepare import prepare_examples
from ....export.export import lora_modules
from ....tasks import build_task
from ...assets import LORAS
from ...shards import TEACHER_STYLE, shard_path
from ..emoji_packages import LICENSES
from .training import AdapterTraining, add_training_arguments, demo_teacher, train

logger = logging.getLogger(__name__)

STYLES = {style: licence for style, licence in LICENSES.items() if style != TEACHER_STYLE}  # of the pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion demo style``."""
    parser.add_argument(
        "style", nargs="?", choices=STYLES, default="flat", help="the style to learn (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=6, help="rank of the LoRA (default: %(default)s)")
    add_training_arguments(parser, updates=2000, batch_size=16, learning_rate=1e-3)
    parser.add_argument("--limit", type=int, help="use only this many pictures, the first ones")


def run(args: argparse.Namespace) -> int:
    """Train and write the LoRA."""
    teacher = demo_teacher(args.device)
    data = DataSection(source="webdataset", path=shard_path(args.style), limit=args.limit)
    task = build_task(TaskSection())
    examples = prepare_examples(data, teacher, task)
    logger.info("%d pictures of the style %s; the teacher draws %s", len(examples), args.style, TEACHER_STYLE)
    teacher_hash = teacher.weights_hash()
    training = AdapterTraining(teacher, examples, task, args.rank, args.batch_size, args.learning_rate, args.seed)
    teacher.release_encoders()
    train(training, args.updates)
    path = args.output or LORAS / f"flash_demo_style_{args.style}.safetensors"
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{teacher.base}/lora",
        "modelspec.title": f"The style {args.style} for the Flash demo",
        "modelspec.license": STYLES[args.style],
        "style.teacher_hash": teacher_hash,
        "style.updates": str(training.step),
        "style.batch_size": str(args.batch_size),
    }
    modules = lora_modules(training.average.tensors, None)
    write_lora(path, modules, None, transformer=teacher.transformer, dtype=torch.float16, header=header)
    logger.info("%d updates; the LoRA is at %s (%.2f MB)", training.step, path, path.stat().st_size / 1e6)
    return 0
