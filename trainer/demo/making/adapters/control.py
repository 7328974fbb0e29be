"""``flash-diffusion demo control``: train a T2I-adapter or a ControlNet that steers the teacher along Canny edges.

The teacher stays frozen. The network learns by the diffusion loss on the teacher's own pictures. They are so few that
the network would learn their edges and names by heart. So each picture is moved, turned, mirrored and scaled at random
many times, with its own edges, and mostly has its general caption. The agreement with edges is measured on another set
of emoji, which the teacher has never seen.
"""

from __future__ import annotations

import argparse
import logging
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, T2IAdapter
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from .....flash_core.denoiser import Conditioning
from .....flash_core.distiller import Distiller, DistillerSettings
from ....config import ModelSection, TaskSection
from ....data.encoding.examples import MemoryExamples, joined, packed
from ....export.export import lora_modules
from ....files import write_whole
from ....seeds import stream
from ....tasks import build_task
from ....tasks.base import Task
from ....tasks.control import canny_edges
from ....tasks.scores import edge_agreement
from ....teachers import load_teacher
from ....teachers.base import Teacher
from ....teachers.conditions.control import Control
from ....teachers.conditions.control_lora import write_control_lora
from ...assets import CONTROLS
from ...shards import TEACHER_STYLE, Pictures, load_pictures
from .training import TARGETS, DiffusionTraining, add_training_arguments, demo_teacher, train

logger = logging.getLogger(__name__)

UNSEEN_STYLE = "noto"  # the pictures whose edges are measured
NAME_SHARE = 0.25  # of the samples have the picture's own name as caption
SCALES = (0.75, 1.1)  # of a moved picture
TURN = 0.2  # radians at most
SHIFT = 0.12  # in units of half the picture, at most
ENCODE_BATCH = 50
FIRST_GAIN = 0.1  # of a new T2I-adapter's input layer, so that its first residuals are small
MEASURE_STEPS, MEASURE_GUIDANCE = 16, 3.0


class ControlTraining(DiffusionTraining):
    """The training of a network that reads hints. The teacher's layers do not change."""

    role = "teacher"
    file: ClassVar[str]  # name of the demo's own file

    def trained_parameters(self, seed: int) -> dict[str, nn.Parameter]:
        """Attach the network and return its trained parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network, parameters = self.new_network()
        self.denoiser.control = Control(nn.Module.to(network, self.device), scale=1.0)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return parameters

    @abstractmethod
    def new_network(self) -> tuple[ControlNetModel | T2IAdapter, dict[str, nn.Parameter]]:
        """Return the network, and name -> parameter of those that train."""

    @abstractmethod
    def write(self, path: Path, header: dict[str, str]) -> None:
        """Write the averaged weights in half precision."""


class AdapterOfHints(ControlTraining):
    """A T2I-adapter (arXiv 2302.08453) of SDXL's kind, since the first level of the demo's UNet has no attention."""

    file = "canny_t2i_adapter"

    def new_network(self) -> tuple[ControlNetModel | T2IAdapter, dict[str, nn.Parameter]]:
        """Return an adapter with one input channel, as edges have, and one residual block per level."""
        levels = list(self.denoiser.network.config["block_out_channels"])
        network = T2IAdapter(
            in_channels=1,
            channels=[*levels, levels[-1]],
            num_res_blocks=1,
            downscale_factor=16,
            adapter_type="full_adapter_xl",
        )
        with torch.no_grad():
            network.adapter.conv_in.weight.mul_(FIRST_GAIN)
            for name, value in network.named_parameters():
                if name.endswith(".bias"):
                    value.zero_()
        return network, dict(network.named_parameters())

    def write(self, path: Path, header: dict[str, str]) -> None:
        """Write the averaged weights in diffusers' layout."""
        tensors = {name: value.cpu().half().contiguous() for name, value in self.average.tensors.items()}
        write_whole(path, lambda partial: save_file(tensors, partial, metadata=header))


class ControlLora(ControlTraining):
    """A ControlNet (arXiv 2302.05543) as a Control-LoRA: its encoder is the teacher's with a LoRA."""

    file = "canny_control_lora"
    rank = 8

    def new_network(self) -> tuple[ControlNetModel | T2IAdapter, dict[str, nn.Parameter]]:
        """Return a ControlNet whose output layers start at zero; the hint's input layer does not, to train faster."""
        network = ControlNetModel.from_unet(self.denoiser.network)
        network.controlnet_cond_embedding.conv_out.reset_parameters()
        inject_adapter_in_model(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(TARGETS)), network)
        trained = {
            name: value
            for name, value in network.named_parameters()
            if ".lora_" in name or name.startswith("controlnet_")
        }
        return network, trained

    def write(self, path: Path, header: dict[str, str]) -> None:
        """Write the averaged weights in the layout of Stability AI's Control-LoRAs."""
        tensors = self.average.tensors
        whole = {name: value for name, value in tensors.items() if ".lora_" not in name}
        layers = self.denoiser.network.config["layers_per_block"]
        write_control_lora(path, lora_modules(tensors, None), whole, layers, header)


KINDS: dict[str, type[ControlTraining]] = {"t2i-adapter": AdapterOfHints, "controlnet": ControlLora}


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures (B, 3, H, W) in [-1, 1] on white, each scaled, turned, shifted and half of them mirrored."""
    batch = len(images)

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    size, turn = draw(*SCALES), draw(-TURN, TURN)
    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    cosine, sine = turn.cos() / size, turn.sin() / size
    rows = torch.stack([cosine * mirror, -sine, draw(-SHIFT, SHIFT), sine * mirror, cosine, draw(-SHIFT, SHIFT)], 1)
    grid = F.affine_grid(rows.view(batch, 2, 3), list(images.shape), align_corners=False)
    # Outside of the picture is zero, and so is white here.
    ink = F.grid_sample(1 - images, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (1 - ink).clamp(-1, 1)


@torch.no_grad()
def moved_examples(teacher: Teacher, task: Task, pictures: Pictures, variants: int, seed: int) -> MemoryExamples:
    """Return every picture ``variants`` times, each moved and captioned anew, with its own latents and edges."""
    generator = stream(seed, "moved pictures")
    latents, conditions, captions = [], [], []
    originals = pictures.images.float() / 127.5 - 1
    for variant in range(variants):
        for first in range(0, len(pictures), ENCODE_BATCH):
            images = originals[first : first + ENCODE_BATCH]
            images = images if variant == 0 else moved(images, generator)
            latents.append(teacher.encode(images.to(teacher.device)).cpu())
            conditions.append(packed(task.conditions(images, teacher, generator)))
            for caption in pictures.captions[first : first + ENCODE_BATCH]:
                named = float(torch.rand((), generator=generator)) < NAME_SHARE
                captions.append(caption.name if named else caption.general)
    distinct = list(dict.fromkeys(captions))
    position = {caption: index for index, caption in enumerate(distinct)}
    return MemoryExamples(
        torch.cat(latents),
        teacher.encode_prompts(distinct).to("cpu"),
        torch.tensor([position[caption] for caption in captions]),
        joined(conditions),
    )


@torch.no_grad()
def measure(teacher: Teacher, count: int, seed: int) -> tuple[float, float]:
    """Measure how well the teacher follows unseen edges: the agreement of hint and drawn edges.

    Args:
        count: pictures of another style, with their general captions.

    Returns:
        The mean F1 with the hint, and the mean F1 without the hint.
    """
    unseen = load_pictures(UNSEEN_STYLE)
    chosen = torch.randperm(len(unseen), generator=stream(seed, "unseen"))[:count].tolist()
    hint = canny_edges(unseen.images[chosen].float() / 127.5 - 1)
    text = teacher.encode_prompts([unseen.captions[index].general for index in chosen])
    empty = teacher.unconditional(count)
    noise = torch.randn(count, *teacher.latent_shape, generator=stream(seed, "noise of the measure"))
    distiller = Distiller(teacher.denoiser, DistillerSettings(teacher_steps=MEASURE_STEPS))
    guidance = torch.full((count,), MEASURE_GUIDANCE, device=teacher.device)
    agreements = []
    for steered in (Conditioning(hint=hint.to(teacher.device)), Conditioning()):
        z0 = distiller.teacher_solution(noise.to(teacher.device), text.joined(steered), empty.joined(steered), guidance)
        edges = canny_edges(teacher.decode(z0).cpu().clamp(-1, 1))
        agreements.append(float(edge_agreement(edges[:, :1], hint[:, :1])["f1"].mean()))
    return agreements[0], agreements[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion demo control``."""
    parser.add_argument("kind", choices=KINDS, help="the network to train")
    add_training_arguments(parser, updates=1000, batch_size=32, learning_rate=1e-3)
    parser.add_argument("--variants", type=int, default=12, help="moved copies of each picture (default: %(default)s)")
    parser.add_argument("--measure", type=int, default=32, help="unseen pictures to measure on (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train, write the network, load it again and measure it."""
    teacher = demo_teacher(args.device)
    task = build_task(TaskSection(name="control"))
    examples = moved_examples(teacher, task, load_pictures(TEACHER_STYLE), args.variants, args.seed)
    logger.info("%d moved pictures with their edges", len(examples))
    training = KINDS[args.kind](teacher, examples, task, args.batch_size, args.learning_rate, args.seed)
    train(training, args.updates)
    path = args.output or CONTROLS / f"{training.file}.safetensors"
    facts = {
        "kind": args.kind,
        "hint": "canny",
        "updates": str(training.step),
        "batch_size": str(args.batch_size),
        "teacher_hash": teacher.weights_hash(),
    }
    training.write(path, {f"flash.training.{name}": value for name, value in facts.items()})
    logger.info("%d updates; the %s is at %s (%.2f MB)", training.step, args.kind, path, path.stat().st_size / 1e6)
    if args.measure:
        written = load_teacher(
            ModelSection.model_validate({"family": "demo", "control": {"path": str(path), "scale": 1.0}}), args.device
        )
        followed, unhinted = measure(written, args.measure, args.seed)
        logger.info(
            "edges of %d unseen pictures: agreement %.3f with the hint, %.3f without", args.measure, followed, unhinted
        )
    return 0
