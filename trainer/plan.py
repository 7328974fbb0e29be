"""``--dry-run``: what a recipe would do and need, from configuration files alone."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..flash_core.grid import timestep_mixture
from .assembly import add_adapters, needs_critic, needs_discriminator
from .config import Recipe
from .teachers import family, outline_teacher

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of each trained parameter: itself, its gradient and AdamW's two moments, all float32.
TRAINED_BYTES = 16
AVERAGE_BYTES = 4


def expected_passes(teacher_steps: int, modes: tuple[float, ...]) -> float:
    """Forward passes of the teacher for one sample's solution, expected over pi(k); guidance asks it twice a step."""
    probability = timestep_mixture(teacher_steps, modes)
    steps = sum(float(value) * (teacher_steps - index) for index, value in enumerate(probability))
    return 2 * steps


def print_plan(recipe: Recipe, console: Console) -> None:
    """Print the phases, the teacher's work, what trains, memory and what is not known before it is measured.

    Raises:
        UserError: the recipe does not fit the model.
    """
    outline = outline_teacher(recipe.model, recipe.data.resolution)
    add_adapters(outline.denoiser, recipe, family(recipe.model.family).default_targets)
    student = sum(value.numel() for value in outline.denoiser.adapter_parameters("student").values())
    adapters = student * (2 if needs_critic(recipe) else 1)
    base = outline.parameters * BYTES[recipe.model.dtype]
    mega = 1e6
    table = Table(title=f"{outline.name} ({recipe.model.family}): {recipe.updates} updates", title_justify="left")
    for heading in (
        "phase",
        "updates",
        "modes 999/749/499/249",
        "distillation",
        "adversarial",
        "dmd",
        "teacher passes",
    ):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    recorded = recipe.trajectories.count
    for phase in recipe.phases:
        passes = expected_passes(recipe.method.teacher_steps, phase.modes) * recipe.batch_size
        table.add_row(
            phase.name,
            str(phase.updates),
            " / ".join(f"{weight:g}" for weight in phase.modes),
            f"{phase.distillation:g}",
            f"{phase.adversarial:g}" if phase.adversarial else "off",
            f"{phase.dmd:g}" if phase.dmd else "off",
            "0 (replayed)" if recorded else f"{passes:.0f} a batch",
        )
    console.print(table)
    effective = recipe.batch_size * recipe.gradient_accumulation
    console.print(f"batch: {recipe.batch_size} x {recipe.gradient_accumulation} accumulated = {effective} a process")
    if recorded:
        console.print(f"before: {recorded} teacher trajectories, {recorded * 2 * recipe.method.teacher_steps} passes")
    heads = " and discriminator heads" if needs_discriminator(recipe) else ""
    critic = " and a critic LoRA of the same size" if needs_critic(recipe) else ""
    console.print(
        f"trains: {student / mega:.2f} M parameters, LoRA rank {recipe.lora.rank}{critic}{heads}, "
        f"on a frozen base of {outline.parameters / mega:.0f} M"
    )
    memory = base + adapters * TRAINED_BYTES + student * AVERAGE_BYTES
    console.print(
        f"memory: {memory / 2**30:.2f} GiB for base ({recipe.model.dtype}), adapters, gradients, optimiser and average; "
        f"activations come on top{', recomputed to save memory' if recipe.gradient_checkpointing else ''}"
    )
    channels, height, width = outline.latent_shape
    console.print(f"latents: {channels} x {height} x {width} a sample, float32")
    if recipe.limits.max_minutes is not None:
        console.print(f"time: at most {recipe.limits.max_minutes:g} minutes; phases follow the clock")
    else:
        console.print("time: known once the first updates are measured; the progress bar shows it")
