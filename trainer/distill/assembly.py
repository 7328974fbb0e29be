"""Build the parts of a run from a recipe: teacher, adapters, discriminator, optimisers, encoded data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...flash_core.denoiser import Conditioning
from ...flash_core.discriminator import Discriminator
from ...flash_core.distiller import Distiller
from ...flash_core.passes.counting import CountedDenoiser
from ...flash_core.runs.schedule import WeightAverage
from ..config import OptimizerSection, Recipe
from ..data.encoding.examples import CachedExamples
from ..data.encoding.prepare import prepare_examples
from ..data.streaming.examples import StreamExamples
from ..demo.assets import LORAS
from ..errors import UserError
from ..export.export import stochasticity_of
from ..interrupts import StopRequest
from ..metrics.lpips import lpips
from ..tasks import build_task
from ..tasks.base import Task
from ..tasks.requirements import check_channels, check_control
from ..teachers import load_teacher
from ..teachers.base import Teacher
from ..teachers.denoiser import DiffusersDenoiser
from ..teachers.in_memory.compiled_blocks import CompileClock, compile_blocks
from ..teachers.in_memory.courier import Courier
from ..teachers.in_memory.layout import order_channels_last
from ..teachers.in_memory.stages import NETWORK
from ..teachers.in_memory.waiting import keep_off_device
from ..teachers.lora_layers import start_adapter
from .checkpoint import Trained
from .several.sharding import shard_base

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembly:
    """The parts of a run.

    Attributes:
        task: makes the conditions beside text, such as masks.
        trained: the parts that train, as a checkpoint holds them: ``student``, and where the recipe has them
            ``discriminator`` and ``critic``.
        counted: the teacher's denoiser as the distiller asks it, with the passes it was asked for.
        compiling: what torch.compile takes; None where nothing is compiled.
    """

    teacher: Teacher
    task: Task
    examples: CachedExamples | StreamExamples
    distiller: Distiller
    trained: Trained
    average: WeightAverage
    counted: CountedDenoiser
    compiling: CompileClock | None = None


def needs_discriminator(recipe: Recipe) -> bool:
    """Return True where a phase has an adversarial loss."""
    return any(phase.adversarial > 0 for phase in recipe.phases)


def needs_critic(recipe: Recipe) -> bool:
    """Return True where a phase has a DMD loss whose fake score comes from a critic adapter."""
    return recipe.method.fake_score == "critic" and any(phase.dmd > 0 for phase in recipe.phases)


def add_adapters(denoiser: DiffusersDenoiser, recipe: Recipe, default_targets: tuple[str, ...]) -> None:
    """Add the adapters that a recipe trains to the denoiser."""
    lora = recipe.lora
    targets = lora.targets or list(default_targets)
    alpha = lora.rank if lora.alpha is None else lora.alpha
    denoiser.add_adapter("student", lora.rank, alpha, targets, recipe.seed)
    if needs_critic(recipe):
        # Two LoRAs are mixed by their halves, which is a mixture of their products where they begin with the same half.
        seed = recipe.seed if recipe.method.critic.ida else recipe.seed + 1
        denoiser.add_adapter("critic", lora.rank, alpha, targets, seed)


def start_file(recipe: Recipe) -> Path | None:
    """Return the file of ``lora.start``, if the recipe names one: a path, or a LoRA of the demo's by name.

    Raises:
        UserError: there is no such file.
    """
    if (given := recipe.lora.start) is None:
        return None
    if Path(given).exists():
        return Path(given)
    shipped = {path.stem: path for path in LORAS.glob("*.safetensors")} if recipe.model.family == "demo" else {}
    if given not in shipped:
        names = f", or one of the demo's: {', '.join(sorted(shipped))}" if shipped else ""
        raise UserError(f"lora.start: there is no LoRA at {given}; give a .safetensors file or a PEFT folder{names}")
    return shipped[given]


def start_student(file: Path, teacher: Teacher) -> None:
    """Let the student begin as a LoRA file.

    Raises:
        UserError: the file does not fit the model or the recipe.
    """
    metadata = start_adapter(teacher.denoiser.adapter("student"), teacher.denoiser.network, file)
    if metadata is not None and metadata.teacher_hash not in ("", teacher.weights_hash()):
        logger.warning(
            "lora.start: %s was made for another teacher, %s. Training goes on from its weights; if they do not fit, a "
            "new LoRA learns faster",
            *(file, metadata.teacher or "which it does not name"),
        )
    logger.info("the student begins as %s", file)


def assemble(
    recipe: Recipe, accelerator: Accelerator, stop: StopRequest | None = None, *, resumed: bool = False
) -> Assembly:
    """Load the teacher, encode the data that the cache lacks, and add adapters, discriminator and optimisers.

    Args:
        stop: asked while data are encoded.
        resumed: a checkpoint will bring the weights, so that ``lora.start`` is not read.

    Raises:
        UserError: the recipe does not fit the model or the data.
        Interrupted: ``stop`` was asked; what is encoded stays in the cache.
    """
    start = None if resumed else start_file(recipe)
    task = build_task(recipe.task)
    check_control(task, recipe.model)
    teacher = load_teacher(
        recipe.model, str(accelerator.device), recipe.data.resolution, staged=recipe.encodes_in_stages
    )
    _check_solver(recipe, teacher)
    check_channels(task, teacher)
    if recipe.speed.channels_last:
        order_channels_last(teacher.denoiser.network)
    if recipe.memory.base == "cpu":
        keep_off_device(teacher.denoiser.network, Courier(accelerator.device))
    examples = _examples(recipe, teacher, task, accelerator, stop)
    teacher.stages.enter(NETWORK)
    denoiser = teacher.denoiser
    teacher.stochasticity = stochasticity_of(recipe)
    add_adapters(denoiser, recipe, teacher.default_targets)
    if start is not None:
        start_student(start, teacher)
    if recipe.gradient_checkpointing:
        denoiser.recompute_activations()
    if recipe.sharding == "base":
        teacher.weights_hash()
        shard_base(denoiser.network, accelerator)
        denoiser.sharded = True
    compiling = compile_blocks(denoiser.network, accelerator.device) if recipe.speed.compile else None
    discriminator = None
    if needs_discriminator(recipe):
        _, conditioning = examples.batch(torch.zeros(1, dtype=torch.long), accelerator.device)
        discriminator = discriminator_of(teacher, conditioning, recipe, accelerator)
    perceptual = lpips(accelerator.device) if recipe.method.distillation == "lpips" else None
    return replace(join(recipe, teacher, task, examples, discriminator, perceptual), compiling=compiling)


def adamw(
    parameters: Mapping[str, nn.Parameter], lr: float, betas: tuple[float, float], section: OptimizerSection
) -> torch.optim.Optimizer:
    """Return AdamW with ``section``'s weight decay and bits.

    Raises:
        UserError: 8 bits, and bitsandbytes is not installed.
    """
    if section.bits == 8:
        return _eight_bits(parameters, lr, betas, section)
    fused = not any(value.is_meta for value in parameters.values())  # a rehearsal's device has no kernels
    return torch.optim.AdamW(parameters.values(), lr, betas, weight_decay=section.weight_decay, fused=fused)


def _eight_bits(
    parameters: Mapping[str, nn.Parameter], lr: float, betas: tuple[float, float], section: OptimizerSection
) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.bits: 8 needs bitsandbytes, which can't be imported here ({error}); install it with "
            '`pip install "bitsandbytes>=0.45,<1"`, or set optimizer.bits to 32'
        ) from error

    class Resumable(AdamW8bit):  # type: ignore[misc]  # without types
        """Gives a checkpoint flat tensors, where the library nests them; counts steps in integers again."""

        def state_dict(self) -> dict[str, Any]:
            return torch.optim.Optimizer.state_dict(self)

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            super().load_state_dict(state_dict, move_to_device)
            for state in self.state.values():
                state["step"] = int(state["step"])

    made: torch.optim.Optimizer = Resumable(parameters.values(), lr, betas, weight_decay=section.weight_decay)
    return made


def join(
    recipe: Recipe,
    teacher: Teacher,
    task: Task,
    examples: Any,
    discriminator: Discriminator | None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    distiller_class: type[Distiller] = Distiller,
    make_optimizer: Callable[..., torch.optim.Optimizer] = adamw,
) -> Assembly:
    """Return the parts of a run around a teacher whose adapters are added: distiller, optimisers, moving average."""
    denoiser = teacher.denoiser
    counted = CountedDenoiser(denoiser)
    distiller = distiller_class(
        counted,
        recipe.method.settings(recipe.sampler.stochasticity),
        discriminator=discriminator,
        decode=teacher.decode,
        perceptual=perceptual,
    )
    section = recipe.optimizer
    parameters: dict[str, Mapping[str, nn.Parameter]] = {"student": denoiser.adapter_parameters("student")}
    optimizers = {"student": make_optimizer(parameters["student"], section.lr, section.betas, section)}
    if discriminator is not None:
        parameters["discriminator"] = dict(discriminator.named_parameters())
        optimizers["discriminator"] = make_optimizer(
            parameters["discriminator"], section.discriminator_lr, section.discriminator_betas, section
        )
    if needs_critic(recipe):
        parameters["critic"] = denoiser.adapter_parameters("critic")
        optimizers["critic"] = make_optimizer(parameters["critic"], section.critic_lr, section.betas, section)
    average = WeightAverage(parameters["student"], recipe.ema)
    return Assembly(
        teacher, task, examples, distiller, Trained(parameters, optimizers, average.tensors), average, counted
    )


def _examples(
    recipe: Recipe, teacher: Teacher, task: Task, accelerator: Accelerator, stop: StopRequest | None
) -> CachedExamples | StreamExamples:
    """Return the run's samples: encoded in the cache now, or as they come."""
    if recipe.data.stream:
        return StreamExamples(recipe.data, teacher, task, recipe.seed)
    return prepare_examples(
        recipe.data,
        teacher,
        task,
        recipe.task.variants,
        method=recipe.method,
        solves=not recipe.trajectories.count and recipe.reads_pictures,
        accelerator=accelerator,
        stop=stop,
    )


def _check_solver(recipe: Recipe, teacher: Teacher) -> None:
    flow = teacher.denoiser.process.prediction == "flow"
    if flow != (recipe.method.solver == "euler"):
        wanted = "euler" if flow else "dpmpp_2m, dpmpp_3m, unipc or ddim"
        kind = "a flow" if flow else "not a flow"
        raise UserError(f"method.solver: {teacher.name} is {kind} model; expected {wanted}, got {recipe.method.solver}")


@torch.no_grad()
def discriminator_of(
    teacher: Teacher, conditioning: Conditioning, recipe: Recipe, accelerator: Accelerator
) -> Discriminator:
    """Return heads for the teacher's feature maps, whose channels one call of the teacher tells, and for latents."""
    z = torch.zeros(1, *teacher.latent_shape, device=accelerator.device)
    t = torch.full((1,), teacher.denoiser.process.timestep(0.5), device=accelerator.device)
    with accelerator.autocast():
        features = teacher.denoiser.features(z, t, conditioning)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        latents = teacher.latent_shape[0] if recipe.method.discriminator.latents else 0
        discriminator = Discriminator([feature.shape[1] for feature in features], latents=latents)
    return discriminator.to(accelerator.device)
