"""A run's model card: what its LoRA is, how ComfyUI and stock diffusers draw with it, and how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...flash_core.grid import NUM_MODES, trailing_timesteps
from ...flash_core.lora import FlashMetadata, LoraModule, nearest_stochasticity
from ...flash_core.lora.metadata import PAPER_STOCHASTICITY
from ..config import Recipe
from ..evaluate.tuning.stored import Tuned, read_tuned
from ..health.lines import read_lines
from ..health.monitor import HealthMonitor
from .base_facts import BaseFacts
from .card_usage import BEST_STEPS, Usage, is_on_disk, usage
from .training_state import TrainingState

# The Hub's tasks: inpainting, super-resolution and the like are kinds of its image-to-image.
PIPELINE_TAGS = {"inpainting": "image-to-image", "super-resolution": "image-to-image", "face-swap": "image-to-image"}
NODES = {
    "text-to-image": "Flash LoRA Loader, then Flash Sampler; or core's LoRA loader with cfg 1.",
    "inpainting": "Flash LoRA Loader, Flash Inpaint Prepare, Flash Sampler, Flash Inpaint Stitch.",
    "super-resolution": "Flash LoRA Loader, then Flash Upscale, which samples tile by tile.",
    "face-swap": "Flash LoRA Loader, Flash Face Swap Prepare, Flash Sampler, Flash Inpaint Stitch.",
    "control": "Flash LoRA Loader, Flash Adapter Apply, then Flash Sampler.",
}
# Face-swap whose identity an IP-Adapter reads, by its option: ComfyUI's core has no IP-Adapters.
NODES_BY_IDENTITY = {
    "tokens": "Flash LoRA Loader, the IP-Adapter in a node pack that has them, Flash Inpaint Prepare, Flash Sampler, "
    "Flash Inpaint Stitch.",
    "both": "Flash LoRA Loader, the IP-Adapter in a node pack that has them, Flash Face Swap Prepare, Flash Sampler, "
    "Flash Inpaint Stitch.",
}
RIGHTS = "Change only pictures that you have the right to change: your own, or with the consent of the people in them."


def model_card(
    run: Path,
    recipe: Recipe,
    modules: Mapping[str, LoraModule],
    metadata: FlashMetadata,
    facts: BaseFacts,
    state: TrainingState,
) -> str:
    """Return the run's README.md, with the YAML head of a Hub page."""
    grids = {steps: ", ".join(f"{t:g}" for t in trailing_timesteps(facts.process, steps)) for steps in (1, 2, 4)}
    previews = sorted((run / "previews").glob("*.webp")) if (run / "previews").is_dir() else []
    picture = f"![teacher beside student](previews/{previews[-1].name})\n" if previews else ""
    first = next(iter(modules.values()))
    share, _ = nearest_stochasticity(metadata.stochasticity, BEST_STEPS)
    tuned = read_tuned(run)
    rows = []
    for phase in recipe.phases:
        modes = ", ".join(f"{beta:g}" for beta in phase.modes)
        factors = f"{phase.distillation:g} | {phase.adversarial:g} | {phase.dmd:g}"
        rows.append(f"| {phase.name} | {phase.updates / recipe.updates:.0%} | {modes} | {factors} |")
    low, high = recipe.method.guidance
    nodes = NODES_BY_IDENTITY.get(recipe.task.options.get("identity", ""), NODES[metadata.task])
    kind = "" if metadata.task == "text-to-image" else f" Its task is {metadata.task}."
    return f"""---
{yaml.safe_dump(_head(recipe, metadata), sort_keys=False).strip()}
---
# {metadata.title}

A LoRA with which **{metadata.teacher}** makes pictures in 1 to 4 steps without guidance, distilled by Flash Diffusion
(arXiv 2406.02347).{kind} Rank {first.rank}, alpha {first.scale * first.rank:g}, {len(modules)} layers.

{picture}
## Use

{_together(recipe, metadata)}ComfyUI: {nodes}{_stochasticity(metadata, tuned)}

{_diffusers(usage(recipe, run.name, first.rank, facts.process, facts.control, share), recipe, metadata)}

| steps | timesteps |
|---|---|
{chr(10).join(f"| {steps} | {grid} |" for steps, grid in grids.items())}

## Training

{state.update} updates in {state.elapsed / 60:.1f} minutes, {state.position} samples drawn. The teacher solved
{recipe.method.teacher_steps} steps ({recipe.method.solver}) at guidance {low:g}..{high:g}. `config.yaml` holds every
setting, `log.jsonl` the losses.{_terms(recipe, metadata)}

| phase | share of the run | modes at {grids[NUM_MODES]} | distillation | adversarial | dmd |
|---|---|---|---|---|---|
{chr(10).join(rows)}
{_health(run, recipe, state)}"""


def _terms(recipe: Recipe, metadata: FlashMetadata) -> str:
    """Return the sentences on the LoRA that training began with, and on the kind of each loss."""
    method = recipe.method
    words = [f"It began as the LoRA {start}."] if (start := metadata.training.get("start")) else []
    words.append(f"Distillation loss: {method.distillation}.")
    where = {"all": "on all samples", "first_step": "on samples that start at pure noise"}
    if any(phase.adversarial > 0 for phase in recipe.phases):
        words.append(f"Adversarial loss: {method.adversarial}, {where[method.adversarial_rows]}.")
    if any(phase.dmd > 0 for phase in recipe.phases):
        words.append(f"DMD: {method.dmd.form}, {where[method.dmd.rows]}, fake score of the {method.fake_score}.")
    return "".join(f"\n{word}" for word in words)


def _health(run: Path, recipe: Recipe, state: TrainingState) -> str:
    """Return the section on what the run's log says of its health; empty where the log says too little."""
    entries = [entry for _, entry in read_lines(run / "log.jsonl") if entry is not None]
    summary = HealthMonitor(recipe, [entry for entry in entries if entry["update"] <= state.update]).summary()
    return f"\n## Health\n\n{summary}\n" if summary else ""


def _stochasticity(metadata: FlashMetadata, tuned: Tuned | None) -> str:
    """Return the sentences on a sampler with less fresh noise than the paper's, and on what was measured.

    Empty for a LoRA that has the paper's sampler and was not measured.
    """
    if not metadata.stochasticity:
        return ""
    shares = {steps: nearest_stochasticity(metadata.stochasticity, steps)[0] for steps in (2, 4, 8)}
    listed = ", ".join(f"{share:g} at {steps} steps" for steps, share in shares.items())
    if len(set(shares.values())) == 1:
        listed = f"{shares[2]:g}"
    text = (
        f"\n\nStochasticity (share of fresh noise between steps, 1 in the paper): {listed}. "
        "Flash Sampler's `auto` takes it."
    )
    return text if tuned is None else f"{text} {_measured(tuned)}"


def _measured(tuned: Tuned) -> str:
    """Return how the stochasticity was chosen: the distances at the taken value and at the paper's."""
    parts = []
    for steps, share in tuned.stochasticity.items():
        row, unit = tuned.distances[steps], tuned.floor or 1.0
        part = f"{row[share] / unit:.3g} at {steps} steps"
        if share != PAPER_STOCHASTICITY and PAPER_STOCHASTICITY in row:
            part += f" ({row[PAPER_STOCHASTICITY] / unit:.3g} with the paper's)"
        parts.append(part)
    ratio = "" if tuned.floor is None else ", as a multiple of the distance between two sets of the teacher's own"
    sets = "" if tuned.seeds == 1 else f"{tuned.seeds} sets of "
    return (
        f"Measured on {sets}{tuned.samples} pictures in the features of {tuned.features}: Fr\u00e9chet distance to the "
        f"teacher's pictures{ratio}: {', '.join(parts)}."
    )


def _head(recipe: Recipe, metadata: FlashMetadata) -> dict[str, Any]:
    tag = PIPELINE_TAGS.get(metadata.task, "text-to-image")
    tags = ["lora", "flash-diffusion", "few-step", tag]
    if metadata.task == "control":
        tags.append("t2i-adapter" if "(T2I-adapter)" in metadata.training.get("control", "") else "controlnet")
    elif metadata.task != tag:
        tags.append(metadata.task)
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": tag, "tags": tags}
    if (base := hub_name(recipe)) is not None:
        head["base_model"] = base
    return head


def hub_name(recipe: Recipe) -> str | None:
    """Return the base's Hub name; None for the demo and for a base on a disk."""
    path = recipe.model.path
    return None if path is None or is_on_disk(path) else path


def _together(recipe: Recipe, metadata: FlashMetadata) -> str:
    """Return the lines on the task and on the networks that the LoRA needs."""
    words = []
    if recipe.model.style_lora:
        words.append(f"Use it together with its teacher's style LoRAs: {recipe.model.styles}.")
    if stored := metadata.training.get("base_weights"):
        words.append(
            f"It was trained on a base whose weights are kept as {stored} (`model.storage: {stored}`): use it with "
            "such a base."
        )
    if control := metadata.training.get("control"):
        words.append(f"Use it with a ControlNet or T2I-adapter and a hint; it was trained with {control}.")
    if adapter := metadata.training.get("image_adapter"):
        words.append(f"Use it together with its teacher's IP-Adapter: {adapter}.")
    if metadata.task == "face-swap":
        words.append(RIGHTS)
    return "".join(f"{line}\n\n" for line in words)


def _diffusers(found: Usage, recipe: Recipe, metadata: FlashMetadata) -> str:
    if not found.code:
        return f"diffusers: no code, since {found.words}. Use the ComfyUI nodes."
    base = hub_name(recipe)
    pipe = (
        f"the stock pipeline of {metadata.teacher}"
        if base is None
        else f'`DiffusionPipeline.from_pretrained("{base}")`'
    )
    return f"diffusers, given `pipe`, which is {pipe}, and {found.words}:\n\n```python\n{found.code}\n```"
