"""The Python of a model card: code for diffusers that uses the LoRA, or the reason why diffusers can't."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...flash_core.process import Process
from ..config import Recipe
from ..recipes import LORA_FILE
from ..tasks import build_task
from ..teachers import family
from ..teachers.base import Teacher
from .base_facts import ControlFacts
from .card_scheduler import scheduler_code

BEST_STEPS = 4
# The default strength of SDXL's inpainting pipeline is 0.9999, which drops one step.
INPAINTING = ("prompt", "image=image", "mask_image=mask_image", "strength=1.0")
STOCK_NOISE_LEVEL = 20  # StableDiffusionUpscalePipeline's default
# What reads a hint: the argument of its pipeline, how that is called, and the argument of the scale.
NETWORKS = {
    "ControlNetModel": ("controlnet", "ControlNetPipeline", "controlnet_conditioning_scale"),
    "T2IAdapter": ("adapter", "AdapterPipeline", "adapter_conditioning_scale"),
}


@dataclass(frozen=True)
class Usage:
    """The code of a model card.

    Attributes:
        code: Python that expects ``pipe`` (the base's pipeline) and the inputs in ``words``; empty if diffusers can't.
        words: the other inputs of the code; without code the reason: "no stock pipeline ...".
    """

    code: str
    words: str


@dataclass(frozen=True)
class Drawing:
    """A task's diffusers pipeline and its arguments.

    Attributes:
        given: the inputs beside ``pipe``, in words.
        arguments: of the call, before the arguments that all tasks share.
        names: imports from ``diffusers``.
        imports: more import lines.
        loading: lines before loading the LoRA.
        switching: lines after loading the LoRA.
        sized: True if the call has height and width; else they follow from the picture.
        takes_timesteps: True if the call has a list of timesteps; else a number of steps.
    """

    given: str = "`prompt`"
    arguments: tuple[str, ...] = ("prompt",)
    names: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()
    switching: tuple[str, ...] = ()
    sized: bool = True
    takes_timesteps: bool = True


class NoStockPipeline(Exception):
    """Raised if diffusers has no pipeline for the task; the message is the end of a sentence."""


def usage(
    recipe: Recipe,
    folder: str,
    rank: int,
    process: Process,
    control: ControlFacts | None = None,
    stochasticity: float = 1.0,
) -> Usage:
    """Return Python that makes a picture with diffusers.

    Args:
        folder: the LoRA's folder.
        rank: of the LoRA; transformers' LoRAs have alpha = rank.
        control: the network that reads hints, for the task control.
        stochasticity: share of fresh noise between steps. Default: the paper's 1.
    """
    teacher = family(recipe.model.family)
    try:
        drawing = _drawing(recipe, teacher, control)
    except NoStockPipeline as reason:
        return Usage("", str(reason))
    options = [*drawing.arguments, *(f"{name}={value!r}" for name, value in teacher.call_options.items())]
    if drawing.sized and recipe.data.resolution is not None:
        options += [f"height={recipe.data.resolution}", f"width={recipe.data.resolution}"]
    scheduler = scheduler_code(process, BEST_STEPS, stochasticity, drawing.takes_timesteps)
    options.append(scheduler.option)
    lines = [f"from diffusers import {', '.join(sorted([scheduler.diffusers, *drawing.names]))}", *drawing.imports, ""]
    if scheduler.definition:
        lines += ["", scheduler.definition, ""]
    lines += drawing.loading
    lines.append(teacher.loading_code.format(folder=folder, file=LORA_FILE, rank=rank))
    lines += drawing.switching
    lines.append(scheduler.setting)
    lines.append(f"image = pipe({', '.join(options)}, guidance_scale=1.0).images[0]")
    return Usage("\n".join(lines), drawing.given)


def _drawing(recipe: Recipe, teacher: type[Teacher], control: ControlFacts | None) -> Drawing:
    """Return the pipeline and the arguments for the recipe's task.

    Raises:
        NoStockPipeline: no pipeline can do the task.
    """
    model, task = recipe.model, build_task(recipe.task)
    if model.task_adapter is not None:
        raise NoStockPipeline(
            f"no stock pipeline has its base: the task adapter {Path(model.task_adapter).stem} gives the model further "
            "input channels"
        )
    if task.name == "text-to-image":
        return Drawing()
    if task.name == "super-resolution":
        return _upscaling(recipe, teacher)
    stem = teacher.task_pipelines
    if not stem:
        raise NoStockPipeline(f"no stock pipeline of its base does {task.name}")
    if task.name == "inpainting":
        return Drawing(
            "`prompt`, `image` and `mask_image` (PIL pictures; white in the mask = the part to paint)",
            INPAINTING,
            names=(f"{stem}InpaintPipeline",),
            loading=(_switched(f"{stem}InpaintPipeline"),),
        )
    if task.name == "face-swap":
        return _face_swap(recipe, stem)
    assert control is not None  # a recipe without it does not train this task
    return _control(control, stem)


def _upscaling(recipe: Recipe, teacher: type[Teacher]) -> Drawing:
    if teacher.base != "sd_x4":
        raise NoStockPipeline("no stock pipeline gives a UNet the latents of an enlarged picture")
    low, high = recipe.task.options["noise_level"]
    level = min(max(STOCK_NOISE_LEVEL, low), high)
    return Drawing(
        "`prompt` and `image` (a PIL picture, a quarter of the result in width and height)",
        ("prompt", "image=image", f"noise_level={level}"),
        sized=False,
        takes_timesteps=False,
    )


def _face_swap(recipe: Recipe, stem: str) -> Drawing:
    section = recipe.model.image_adapter
    if section is None or recipe.task.options.get("identity") != "tokens":
        raise NoStockPipeline("no stock pipeline gives a UNet an identity picture as input channels")
    name = Path(section.weight_name or section.path)
    if section.weight_name is None:
        folder, inside = ".", ""
    else:
        folder, inside = shown(section.path), name.parent.as_posix().removeprefix(".")
    owner, _, rest = section.image_encoder.partition("/")
    repository, _, subfolder = rest.partition("/")
    encoder = _quoted(shown(section.image_encoder))
    if subfolder and not Path(section.image_encoder).is_dir():
        encoder = f"{_quoted(f'{owner}/{repository}')}, subfolder={_quoted(subfolder)}"
    return Drawing(
        "`image` and `mask_image` (PIL pictures: the target, and its face in white), `identity` (a PIL picture that "
        "the new face fills)",
        ('""', *INPAINTING[1:], "ip_adapter_image=identity"),
        names=(f"{stem}InpaintPipeline",),
        imports=("from transformers import CLIPVisionModelWithProjection",),
        loading=(
            f"encoder = CLIPVisionModelWithProjection.from_pretrained({encoder})",
            _switched(f"{stem}InpaintPipeline", "image_encoder=encoder"),
            f"file = {_quoted(name.name)}",
            f"pipe.load_ip_adapter({_quoted(folder)}, subfolder={_quoted(inside)}, weight_name=file, "
            "image_encoder_folder=None)",
            f"pipe.set_ip_adapter_scale({section.scale:g})",
        ),
    )


def _control(control: ControlFacts, stem: str) -> Drawing:
    if control.file:
        raise NoStockPipeline(f"stock pipelines read hints by networks in diffusers' folders, not by {control.file}")
    part, ending, argument = NETWORKS[control.kind]
    place = _quoted(shown(control.place))
    return Drawing(
        f"`prompt` and `image` (the hint, a PIL picture{' in mode L' if control.grey else ''})",
        ("prompt", "image=image", f"{argument}={control.scale:g}"),
        names=(control.kind, f"{stem}{ending}"),
        loading=(f"{part} = {control.kind}.from_pretrained({place}, torch_dtype=pipe.dtype)",),
        # SD 1.5's T2I-adapter pipeline loads no LoRAs.
        switching=(_switched(f"{stem}{ending}", f"{part}={part}"),),
    )


def _switched(pipeline: str, *parts: str) -> str:
    # Without the dtype all parts would be float32 from here on.
    return f"pipe = {pipeline}.from_pipe({', '.join(['pipe', *parts, 'torch_dtype=pipe.dtype'])})"


def shown(path: str) -> str:
    """Return a Hub name unchanged, and only the last name of a path on a disk, since paths are private."""
    return Path(path).name if is_on_disk(path) else path


def is_on_disk(path: str) -> bool:
    """Return True for a path of a file or folder, also on another machine; False for a Hub name."""
    return Path(path).exists() or path.startswith(("/", ".", "~")) or "\\" in path or path.endswith(".safetensors")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
