"""``--dry-run``: print the work and the memory that a recipe needs, from configuration files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ...flash_core.grid import NUM_MODES, trailing_timesteps
from ..config import ModelSection, Recipe
from ..data.encoding.buckets import bucket_sizes
from ..data.encoding.prepare import count_frames
from ..data.reading import check_source
from ..data.remote.patterns import title as title_of
from ..tasks import build_task
from ..tasks.requirements import check_channels, check_control
from ..teachers import family, outline_teacher
from ..teachers.base import Outline, count_parameters
from ..teachers.in_memory.compact import SCALE, block_layers
from .assembly import add_adapters, needs_critic, needs_discriminator, start_file
from .passes import recorded_trajectories, trajectory_passes, update_passes, warmup_passes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# A trained parameter and its gradient in float32, beside AdamW's two moments in 8 or 32 bits.
TRAINED_BYTES = {8: 10, 32: 16}
AVERAGE_BYTES = 4
MILLION = 1e6


def print_plan(recipe: Recipe, console: Console, reasons: Sequence[str] = ()) -> None:
    """Print the phases, the teacher's work, the trained parameters, memory and time.

    Args:
        reasons: what the recipe's preset chose, and why.

    Raises:
        UserError: the recipe does not fit the model, or the data or the LoRA to start from are not there.
    """
    check_source(recipe.data)
    start = start_file(recipe)
    task = build_task(recipe.task)
    check_control(task, recipe.model)
    outline = outline_teacher(recipe.model, recipe.data.resolution)
    waiting = _bytes_of_blocks(outline, recipe.model) if recipe.memory.base == "cpu" else 0
    add_adapters(outline.denoiser, recipe, family(recipe.model.family).default_targets)
    check_channels(task, outline)
    student = sum(value.numel() for value in outline.denoiser.adapter_parameters("student").values())

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    for reason in reasons:
        say(reason)
    say(f"{outline.name} ({recipe.model.family}): {recipe.updates} updates")
    variants = f", {recipe.task.variants} variants of each picture" if recipe.task.variants > 1 else ""
    where = recipe.data.source if recipe.data.path is None else title_of(recipe.data.path)
    say(f"task: {task.name}{variants}; data: {where}")
    if start is not None:
        say(f"student: begins as {start}")
    if recipe.model.style_lora:
        say(f"style LoRAs merged into the teacher: {recipe.model.styles}")
    beside = count_parameters(outline.control.network) if outline.control is not None else 0
    if outline.control is not None:
        say(f"control: {outline.control.title}, frozen, {beside / MILLION:.1f} M parameters")
    if recipe.model.image_adapter is not None:
        shown = sum(value.numel() for name, value in outline.denoiser.network.named_parameters() if _of_adapter(name))
        title = recipe.model.image_adapter.title
        say(f"image adapter: {title}, frozen, {shown / MILLION:.1f} M parameters of the base")
    modes = "/".join(f"{t:g}" for t in trailing_timesteps(outline.denoiser.process, NUM_MODES))
    say(f"modes: weights of the timesteps {modes}; passes: of an update")
    console.print(_phases(recipe))
    _say_passes(recipe, say)
    effective = recipe.batch_size * recipe.gradient_accumulation
    say(f"batch: {recipe.batch_size} x {recipe.gradient_accumulation} accumulated = {effective} samples per process")
    if recipe.trajectories.reuse is not None:
        _say_bank(recipe, say)
    elif recorded := recipe.trajectories.count:
        passes = recorded * trajectory_passes(recipe.method)
        say(f"first: record {recorded} teacher trajectories in {passes} passes; updates replay them")
    heads = " and discriminator heads" if needs_discriminator(recipe) else ""
    critic = " and a critic LoRA of the same size" if needs_critic(recipe) else ""
    say(
        f"trains: {student / MILLION:.2f} M parameters, LoRA rank {recipe.lora.rank}{critic}{heads}, "
        f"on a frozen base of {outline.parameters / MILLION:.1f} M"
    )
    adapters = student * (2 if critic else 1)
    frozen = (outline.parameters + beside) * BYTES[recipe.model.dtype]
    if recipe.model.storage is not None:  # its weights have their dtypes already
        named = outline.denoiser.network.named_parameters()
        stored = sum(value.nbytes for name, value in named if ".lora_" not in name)
        frozen = stored + beside * BYTES[recipe.model.dtype]
    memory = frozen - waiting + adapters * TRAINED_BYTES[recipe.optimizer.bits] + student * AVERAGE_BYTES
    base = "the base" if outline.control is None else "the base and its control"
    base = f"what stays of {base}" if waiting else base
    recomputed = " (recomputed to save memory)" if recipe.gradient_checkpointing else ""
    say(
        f"memory: {memory / 2**30:.2f} GiB for {base} in {recipe.model.storage or recipe.model.dtype}, the LoRA and "
        f"its optimiser; activations come on top{recomputed}"
    )
    if waiting:
        say(f"  {waiting / 2**30:.2f} GiB of the base wait in the computer's memory; each layer fetches its weights")
    channels, height, width = outline.latent_shape
    kilobytes = channels * height * width * BYTES[recipe.data.cache_dtype] / 1000
    kept = "not kept (data.stream)" if recipe.data.stream else f"{kilobytes:.3g} kB in the cache, beside its conditions"
    say(f"latents: {channels} x {height} x {width} per sample, {kept}")
    if recipe.data.buckets:
        _say_buckets(recipe, outline, say)
    if warning := outline.size_warning():
        console.print(f"[bold]WARNING: {warning}[/bold]", highlight=False, soft_wrap=True)
    if recipe.limits.max_minutes is None:
        say("time: the progress bar shows the time left after the first measured updates")
    else:
        say(f"time: at most {recipe.limits.max_minutes:g} minutes; phases and learning rates follow the clock")


def _say_buckets(recipe: Recipe, outline: Outline, say: Callable[[str], None]) -> None:
    """Print the buckets, and how many samples each gets; files that no run has read yet are read now."""
    scale = outline.sizes.scale
    frames = bucket_sizes(outline.latent_shape[1] * scale, outline.sizes.grain, outline.sizes.most)
    sizes = ", ".join(f"{width} x {height}" for height, width in frames)
    say(f"buckets: {len(frames)} sizes of about equal area (width x height): {sizes}")
    counts = count_frames(recipe.data, build_task(recipe.task).companions, frames)
    say("samples: " + ", ".join(f"{width} x {height}: {count}" for (height, width), count in counts.items()))
    if few := sum(count < recipe.batch_size for count in counts.values()):
        say(f"  {few} sizes have fewer samples than a batch: they get a batch in some epochs only")


def _bytes_of_blocks(outline: Outline, model: ModelSection) -> int:
    """Return the bytes of the weights that wait with ``memory.base: cpu``; no adapters are added yet."""
    size = 0
    for layer in block_layers(outline.denoiser.network):
        values = [value for value in (layer.weight, getattr(layer, SCALE, None)) if value is not None]
        size += sum(
            value.numel() * (BYTES[model.dtype] if model.storage is None else value.itemsize) for value in values
        )
    return size


def _of_adapter(name: str) -> bool:
    """Return True for a parameter of an IP-Adapter: its projection, or a key or value for pictures."""
    return name.startswith("encoder_hid_proj.") or ".to_k_ip." in name or ".to_v_ip." in name


def _say_passes(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Print what an update of each phase costs, term by term, and what the whole run costs."""
    say("passes of an update: forward passes of the network for one sample; a backward pass counts as two")
    total, learnt = 0.0, set[str]()
    for phase in recipe.phases:
        passes = update_passes(recipe, phase)
        replayed = " (solutions replayed)" if recipe.trajectories.count else ""
        say(f"  {phase.name}: " + ", ".join(f"{name} {value:.0f}" for name, value in passes.items()) + replayed)
        total += phase.updates * sum(passes[name] for name in passes if name != "trajectories")
        learners = {"critic"} & set(passes) | ({"discriminator"} if phase.adversarial else set())
        fresh = learners - learnt
        if fresh and (alone := warmup_passes(recipe, phase)):
            say(f"  before {phase.name}: {' and '.join(sorted(fresh))} alone, {alone:.0f} passes")
            total += alone
        learnt |= fresh
    recorded = recorded_trajectories(recipe) * trajectory_passes(recipe.method)
    say(f"  the whole run: {total + recorded:,.0f} passes" + (f", {recorded:,} of them recording" if recorded else ""))


def _say_bank(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Print how the bank of trajectories is filled and refreshed."""
    section, samples = recipe.trajectories, recipe.batch_size * recipe.gradient_accumulation
    assert section.reuse is not None
    first = int(section.count / section.reuse)
    say(
        f"trajectories: {recorded_trajectories(recipe)} in the whole run, each used {section.reuse:g} times; training "
        f"begins after {first}, and then {samples / section.reuse:.3g} new ones an update replace the oldest of "
        f"{section.count}; each leaves after about {section.count * section.reuse / samples:.0f} updates"
    )


def _phases(recipe: Recipe) -> Table:
    terms = {"distillation": "distil", "adversarial": "adversarial", "dmd": "dmd"}
    rarer = {"feature_matching": "features", "intra_segment": "ISG"}
    terms |= {name: title for name, title in rarer.items() if any(getattr(phase, name) for phase in recipe.phases)}
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("phase", "updates", "modes", *terms.values(), "passes"):
        table.add_column(heading, justify="left" if heading == "phase" else "right", no_wrap=True)
    for phase in recipe.phases:
        weights = [getattr(phase, name) for name in terms]
        table.add_row(
            phase.name,
            str(phase.updates),
            "/".join(f"{weight:g}" for weight in phase.modes),
            *(f"{weight:g}" if weight else "off" for weight in weights),
            f"{sum(update_passes(recipe, phase).values()):.0f}",
        )
    return table
