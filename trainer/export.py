"""What a run hands over: the LoRA, which explains itself in its header, and a model card."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from rich.console import Console
from torch import Tensor

from .. import __version__
from ..flash_core.grid import MAX_FEW_STEPS, NUM_MODES, trailing_fractions, trailing_timesteps
from ..flash_core.lora import FlashMetadata, LoraModule, write_lora
from ..flash_core.process import FlowProcess, Process
from .checkpoint import TrainingState, checkpoint_path, checkpoints, read_average, read_facts
from .config import Recipe, parse_recipe
from .errors import UserError
from .teachers import family, outline_teacher

LORA = "lora.safetensors"
BEST_STEPS = 4


def export_checkpoint(run: Path, update: int | None = None) -> Path:
    """Write the LoRA and the card of a run from one of its checkpoints.

    Args:
        update: which; the last where it is None.

    Raises:
        UserError: no run there, or no such checkpoint.
    """
    config = run / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run} is not the folder of a run: it has no config.yaml")
    recipe = parse_recipe(yaml.safe_load(config.read_text(encoding="utf-8")), str(config))
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoint yet")
    chosen = found[-1] if update is None else checkpoint_path(run, update)
    if chosen not in found:
        kept = ", ".join(str(int(path.name)) for path in found)
        raise UserError(f"{run} has no checkpoint of update {update}; it keeps those of {kept}")
    state, _ = read_facts(chosen)
    return export_run(run, recipe, read_average(chosen), state)


def export_run(run: Path, recipe: Recipe, average: Mapping[str, Tensor], state: TrainingState) -> Path:
    """Write the LoRA and the card.

    Args:
        average: the student's averaged parameters by their names in the network.
        state: where the run is.
    """
    teacher = family(recipe.model.family)
    outline = outline_teacher(recipe.model, recipe.data.resolution)
    process = outline.denoiser.process
    modules = lora_modules(average, recipe.lora.alpha)
    metadata = FlashMetadata(
        base=teacher.base,
        prediction=process.prediction,
        process="flow" if isinstance(process, FlowProcess) else "vp",
        task=recipe.task.name,
        timesteps={steps: tuple(trailing_timesteps(process, steps)) for steps in range(1, MAX_FEW_STEPS + 1)},
        steps=BEST_STEPS,
        title=f"Flash LoRA of {outline.name}",
        teacher=outline.name,
        teacher_hash=state.teacher_hash,
        recipe_hash=recipe.digest(),
        training={
            "updates": str(state.update),
            "samples": str(state.position),
            "trainer": f"flash-diffusion {__version__}",
        }
        | ({"style_lora": recipe.model.styles} if recipe.model.style_lora else {})
        | ({"control": outline.control.title} if outline.control is not None else {}),
    )
    path = run / LORA
    write_lora(path, modules, metadata, transformer=teacher.transformer, dtype=getattr(torch, recipe.lora.dtype))
    (run / "README.md").write_text(model_card(run, recipe, modules, metadata, process, state), encoding="utf-8")
    return path


def lora_modules(parameters: Mapping[str, Tensor], alpha: float | None) -> dict[str, LoraModule]:
    """Pair up an adapter's parameters, ``<path>.lora_A.<role>.weight`` and its ``lora_B``, by path."""
    modules: dict[str, LoraModule] = {}
    for name, down in parameters.items():
        path, marker, rest = name.partition(".lora_A.")
        if marker:
            up = parameters[f"{path}.lora_B.{rest}"]
            modules[path] = LoraModule(path, down, up, float(down.shape[0]) if alpha is None else alpha)
    return modules


def model_card(
    run: Path,
    recipe: Recipe,
    modules: Mapping[str, LoraModule],
    metadata: FlashMetadata,
    process: Process,
    state: TrainingState,
) -> str:
    """The run's README.md, with what a Hub page wants in its head."""
    head = {"library_name": "diffusers", "tags": ["lora", "flash-diffusion", "few-step", "text-to-image"]}
    if recipe.model.path and not Path(recipe.model.path).exists():
        head["base_model"] = recipe.model.path
    grids = {steps: ", ".join(f"{t:g}" for t in trailing_timesteps(process, steps)) for steps in (1, 2, 4)}
    previews = sorted((run / "previews").glob("*.webp")) if (run / "previews").is_dir() else []
    picture = f"![teacher beside student](previews/{previews[-1].name})\n" if previews else ""
    first = next(iter(modules.values()))
    rows = []
    for phase in recipe.phases:
        modes = ", ".join(f"{beta:g}" for beta in phase.modes)
        factors = f"{phase.distillation:g} | {phase.adversarial:g} | {phase.dmd:g}"
        rows.append(f"| {phase.name} | {phase.updates / recipe.updates:.0%} | {modes} | {factors} |")
    low, high = recipe.method.guidance
    worn = (
        f"Together with the style LoRAs that its teacher wore: {recipe.model.styles}.\n\n"
        if recipe.model.style_lora
        else ""
    )
    if control := metadata.training.get("control"):
        worn += f"For hints that a ControlNet or T2I-adapter reads; it was trained with {control}.\n\n"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---
# {metadata.title}

A LoRA that makes **{metadata.teacher}** draw in 1 to 4 steps without guidance, distilled by Flash Diffusion
(arXiv 2406.02347). Rank {first.rank}, alpha {first.scale * first.rank:g}, {len(modules)} layers.

{picture}
## Use

{worn}ComfyUI: Flash LoRA Loader, then Flash Sampler; or core's LoRA loader with cfg 1. diffusers:

```python
{usage(recipe, run.name, first.rank, process)}
```

| steps | timesteps |
|---|---|
{chr(10).join(f"| {steps} | {grid} |" for steps, grid in grids.items())}

## Training

{state.update} updates in {state.elapsed / 60:.1f} minutes, {state.position} samples drawn. The teacher solved
{recipe.method.teacher_steps} steps ({recipe.method.solver}) at guidance {low:g}..{high:g}. `config.yaml` holds every
setting, `log.jsonl` the course.

| phase | share of the run | modes at {grids[NUM_MODES]} | distillation | adversarial | dmd |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def usage(recipe: Recipe, folder: str, rank: int, process: Process) -> str:
    """Python that draws a picture with stock diffusers, given ``pipe`` and ``prompt``.

    Args:
        folder: where the LoRA is.
        rank: of the LoRA; its alpha is the same as it is written for transformers.
    """
    teacher = family(recipe.model.family)
    options = [f"{name}={value!r}" for name, value in teacher.call_options.items()]
    if recipe.data.resolution is not None:
        options += [f"height={recipe.data.resolution}", f"width={recipe.data.resolution}"]
    if isinstance(process, FlowProcess):
        scheduler, settings = "FlowMatchEulerDiscreteScheduler", ", stochastic_sampling=True"
        # The scheduler shifts uniform time itself.
        options.append(f"sigmas={trailing_fractions(BEST_STEPS)}")
    else:
        # Of its 100 timesteps the trained ones are some; of its usual 50 they are not, and it would warn.
        scheduler, settings = "LCMScheduler", ", original_inference_steps=100"
        if process.prediction != "epsilon":  # a pipeline from a single file may not know
            settings += f', prediction_type="{process.prediction}"'
        if float(process.alpha_sigma(torch.tensor([process.timestep(1)]))[0]) == 0:
            settings += ", rescale_betas_zero_snr=True"
        grid = ", ".join(f"{t:g}" for t in trailing_timesteps(process, BEST_STEPS))
        options.append(f"timesteps=[{grid}]")
    loading = teacher.loading_code.format(folder=folder, file=LORA, rank=rank)
    return f"""from diffusers import {scheduler}

{loading}
pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{settings})
image = pipe(prompt, {", ".join(options)}, guidance_scale=1.0).images[0]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion export``."""
    parser.add_argument("run", type=Path, help="the folder that `distill` wrote")
    parser.add_argument("--checkpoint", type=int, metavar="UPDATE", help="which checkpoint (default: the last)")


def run(args: argparse.Namespace) -> int:
    """Export."""
    path = export_checkpoint(args.run, args.checkpoint)
    Console().print(f"the LoRA is at {path}", highlight=False, soft_wrap=True)
    return 0
