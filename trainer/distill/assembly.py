"""Everything a run trains with, built from a recipe: teacher, adapters, discriminator, optimisers, encoded data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from ...flash_core.denoiser import Conditioning
from ...flash_core.discriminator import Discriminator
from ...flash_core.distiller import Distiller
from ..config import ModelSection, OptimizerSection, Recipe
from ..data.encode import Examples, encode_examples
from ..errors import UserError
from ..metrics.lpips import lpips
from ..tasks import build_task
from ..tasks.base import Task
from ..teachers import load_teacher
from ..teachers.base import Outline, Teacher
from ..teachers.denoiser import DiffusersDenoiser
from .checkpoint import Trained


class Average:
    """The exponential moving average of parameters; young averages forget faster, so that the start fades.

    Args:
        parameters: what is averaged, by name.
        decay: of one update, in the long run; 0 follows the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the parameters after ``updates`` updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.tensors.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold their average inside the block."""
        kept = {name: value.data for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            value.data = self.tensors[name]
        try:
            yield
        finally:
            for name, value in self.parameters.items():
                value.data = kept[name]


@dataclass(frozen=True)
class Assembly:
    """A run's parts.

    Attributes:
        task: makes the examples' conditions beside text.
        trained: what a checkpoint holds; its parts are ``student``, and ``discriminator`` and ``critic`` where the
            recipe has them.
    """

    teacher: Teacher
    task: Task
    examples: Examples
    distiller: Distiller
    trained: Trained
    average: Average


def needs_discriminator(recipe: Recipe) -> bool:
    """Whether any phase weighs the adversarial term."""
    return any(phase.adversarial > 0 for phase in recipe.phases)


def needs_critic(recipe: Recipe) -> bool:
    """Whether any phase asks a critic adapter for the fake score."""
    return recipe.method.fake_score == "critic" and any(phase.dmd > 0 for phase in recipe.phases)


def add_adapters(denoiser: DiffusersDenoiser, recipe: Recipe, default_targets: tuple[str, ...]) -> None:
    """Give the denoiser the adapters that a recipe trains."""
    lora = recipe.lora
    targets = lora.targets or list(default_targets)
    alpha = lora.rank if lora.alpha is None else lora.alpha
    denoiser.add_adapter("student", lora.rank, alpha, targets, recipe.seed)
    if needs_critic(recipe):
        denoiser.add_adapter("critic", lora.rank, alpha, targets, recipe.seed + 1)


def assemble(recipe: Recipe, accelerator: Accelerator) -> Assembly:
    """Load the teacher, encode the data, add what trains.

    Raises:
        UserError: the recipe does not fit the model or the data.
    """
    task = build_task(recipe.task)
    check_control(task, recipe.model)
    teacher = load_teacher(recipe.model, str(accelerator.device), recipe.data.resolution)
    _check_solver(recipe, teacher)
    check_channels(task, teacher)
    with accelerator.autocast():
        examples = encode_examples(recipe.data, teacher, task, recipe.task.variants, recipe.seed)
    denoiser = teacher.denoiser
    add_adapters(denoiser, recipe, teacher.default_targets)
    if recipe.gradient_checkpointing:
        denoiser.network.enable_gradient_checkpointing()
    discriminator = None
    if needs_discriminator(recipe):
        _, conditioning = examples.batch(torch.zeros(1, dtype=torch.long), accelerator.device)
        discriminator = _discriminator(teacher, conditioning, recipe.seed, accelerator)
    perceptual = lpips(accelerator.device) if recipe.method.distillation == "lpips" else None
    distiller = Distiller(
        denoiser,
        recipe.method.settings(),
        discriminator=discriminator,
        decode=teacher.decode,
        perceptual=perceptual,
    )
    section = recipe.optimizer
    parameters: dict[str, Mapping[str, nn.Parameter]] = {"student": denoiser.adapter_parameters("student")}
    optimizers = {"student": _adamw(parameters["student"], section.lr, section.betas, section)}
    if discriminator is not None:
        parameters["discriminator"] = dict(discriminator.named_parameters())
        optimizers["discriminator"] = _adamw(
            parameters["discriminator"], section.discriminator_lr, section.discriminator_betas, section
        )
    if needs_critic(recipe):
        parameters["critic"] = denoiser.adapter_parameters("critic")
        optimizers["critic"] = _adamw(parameters["critic"], section.critic_lr, section.betas, section)
    average = Average(parameters["student"], recipe.ema)
    return Assembly(teacher, task, examples, distiller, Trained(parameters, optimizers, average.tensors), average)


def learning_rate_factor(section: OptimizerSection, update: int, progress: float) -> float:
    """The learning rates as a share of their full value, before the update numbered ``update`` from 0.

    Args:
        progress: of the whole run, in 0..1.
    """
    factor = min(1.0, (update + 1) / section.warmup) if section.warmup else 1.0
    if section.schedule == "cosine":
        fallen = max(0.0, progress - section.decay_from) / (1 - section.decay_from)
        factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, fallen)))
    return factor


def _adamw(
    parameters: Mapping[str, nn.Parameter], lr: float, betas: tuple[float, float], section: OptimizerSection
) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters.values(), lr, betas, weight_decay=section.weight_decay, fused=True)


def check_control(task: Task, model: ModelSection) -> None:
    """Look whether a task that gives hints or tokens has a network that reads them, and no other task has one.

    Raises:
        UserError: one is there without the other.
    """
    if task.gives_hint and model.control is None:
        raise UserError(
            f"model.control: is missing; the task {task.name} gives hints, which a ControlNet or T2I-adapter reads, so "
            "set model.control.path to one"
        )
    if model.control is not None and not task.gives_hint:
        raise UserError(
            f"model.control: {model.control.path} reads hints, but the task {task.name} gives none; set task.name: "
            "control, or leave model.control out"
        )
    if task.gives_image_tokens and model.image_adapter is None:
        raise UserError(
            f"model.image_adapter: is missing; the task {task.name} shows the model a picture as tokens, which an "
            "IP-Adapter reads, so set model.image_adapter.path to one"
        )
    if model.image_adapter is not None and not task.gives_image_tokens:
        raise UserError(
            f"model.image_adapter: {model.image_adapter.path} reads a picture's tokens, but the task {task.name}, as "
            "its options are, gives none; set task.name: face-swap and task.options.identity: tokens, or leave "
            "model.image_adapter out"
        )


def _check_solver(recipe: Recipe, teacher: Teacher) -> None:
    flow = teacher.denoiser.process.prediction == "flow"
    if flow != (recipe.method.solver == "euler"):
        wanted = "euler" if flow else "dpmpp_2m or ddim"
        kind = "a flow" if flow else "not a flow"
        raise UserError(f"method.solver: {teacher.name} is {kind} model; expected {wanted}, got {recipe.method.solver}")


def check_channels(task: Task, teacher: Teacher | Outline) -> None:
    """Look whether the network reads the channels that the task gives it.

    Raises:
        UserError: it reads more or fewer.
    """
    latent = teacher.latent_shape[0]
    wanted, found = latent + task.extra_channels(latent), teacher.denoiser.network.config["in_channels"]
    if found != wanted:
        raise UserError(
            f"task.name: {task.name} wants a model that reads {wanted} channels (latents of {latent} and "
            f"{wanted - latent} of the task's), but {teacher.name} reads {found}; choose the model or the task that "
            "belongs to the other"
        )


@torch.no_grad()
def _discriminator(teacher: Teacher, conditioning: Conditioning, seed: int, accelerator: Accelerator) -> Discriminator:
    """Heads for the feature maps that this teacher has, counted by asking it once."""
    z = torch.zeros(1, *teacher.latent_shape, device=accelerator.device)
    t = torch.full((1,), teacher.denoiser.process.timestep(0.5), device=accelerator.device)
    with accelerator.autocast():
        features = teacher.denoiser.features(z, t, conditioning)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        discriminator = Discriminator([feature.shape[1] for feature in features])
    return discriminator.to(accelerator.device)
