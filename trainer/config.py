"""What a recipe may say: every field with its meaning, unit, range and default, and errors that name the field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError

if TYPE_CHECKING:  # flash_core brings torch, too heavy for a help text
    from ..flash_core.distiller import DistillerSettings, Phase

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe: unknown fields are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StyleLora(Section):
    """A LoRA that the teacher wears."""

    path: Path = Field(description="the LoRA's .safetensors file")
    strength: float = Field(1.0, description="factor of its update")


class ControlSection(Section):
    """The frozen network that reads a hint, such as edges, and steers every role."""

    path: str = Field(
        description="a diffusers folder or Hub name of a ControlNet or T2I-adapter, a single .safetensors file of one "
        "(a Control-LoRA too), or the name of one of the demo's"
    )
    scale: float | None = Field(
        None, description="factor of what it adds (default: 1 for ControlNets, 0.8 for T2I-adapters, the paper's)"
    )


class ImageAdapterSection(Section):
    """An IP-Adapter: what lets a UNet read a picture as it reads text (arXiv 2308.06721)."""

    path: str = Field(
        description="the adapter's .safetensors file, or with `weight_name` a folder or Hub name such as owner/name"
    )
    weight_name: str | None = Field(
        None, description="the .safetensors file inside the folder or Hub repository that `path` names"
    )
    image_encoder: str = Field(
        description="the CLIP vision encoder it was trained with: a folder, a Hub name, or a folder inside a Hub "
        "repository, such as owner/name/folder"
    )
    scale: float = Field(1.0, ge=0, description="factor of what it adds to attention, the student's too")

    @property
    def title(self) -> str:
        """Which adapter it is and how strong."""
        return f"{Path(self.weight_name or self.path).stem} (IP-Adapter) x {self.scale:g}"


class ModelSection(Section):
    """The teacher."""

    family: str = Field(description="model family: one of the names `flash-diffusion distill --help` lists")
    path: str | None = Field(
        None,
        description="a diffusers folder, a Hub name such as owner/model, or a single .safetensors checkpoint; not "
        "needed for `demo`",
    )
    config: str | None = Field(
        None,
        description="for a single file: the diffusers folder or Hub name with the configuration of its parts, and with "
        "the weights of parts that the file lacks (default: the family's own on the Hub)",
    )
    variant: str | None = Field(
        None,
        description="which weights of a folder, such as fp16 (default: the plain ones, else the only ones there are)",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="storage of the frozen base, whatever its file has; what trains is float32 always, and float16 is "
        "not for training",
    )
    task_adapter: str | None = Field(
        None,
        description="what makes a text-to-image UNet read a task's channels: a task adapter's .safetensors file, or "
        "the name of one of the demo's tasks",
    )
    control: ControlSection | None = Field(
        None, description="a ControlNet or T2I-adapter on top of a UNet, for the task control"
    )
    image_adapter: ImageAdapterSection | None = Field(
        None, description="an IP-Adapter in a UNet, for tasks that show it a picture (face-swap by tokens)"
    )
    t5: bool = Field(True, description="SD3 alone: whether T5 reads the prompts too; without it memory is saved")
    style_lora: list[StyleLora] = Field(
        default_factory=list,
        description="LoRAs merged into the frozen base, so that the student learns their style in few steps; the "
        "exported LoRA is then used together with them",
    )

    @property
    def styles(self) -> str:
        """The style LoRAs that the teacher wears, each with its strength; empty where there are none."""
        return ", ".join(f"{style.path.name} x {style.strength:g}" for style in self.style_lora)


class DataSection(Section):
    """Pictures and their captions."""

    source: Literal["folder", "webdataset", "demo", "demo-swaps"] = Field(
        description="folder: images with .txt captions beside them; webdataset: .tar shards; demo: the embedded ones; "
        "demo-swaps: their faces on one another's heads, for face-swap"
    )
    path: Path | None = Field(None, description="the folder, or a shard, or a folder of shards; not for the demo")
    resolution: int | None = Field(
        None, ge=8, description="width and height in pixels (default: the model's own); a multiple of 8"
    )
    limit: Count | None = Field(None, description="use the first so many samples only")
    encode_batch: Count = Field(8, description="images encoded at once while the latents are computed")

    @model_validator(mode="after")
    def _path_is_given(self) -> DataSection:
        if not self.source.startswith("demo") and self.path is None:
            raise ValueError(f"source {self.source!r} needs a path")
        if self.resolution is not None and self.resolution % 8:
            raise ValueError(f"resolution must be a multiple of 8 pixels, not {self.resolution}")
        return self


class TaskSection(Section):
    """What the model is conditioned on beside text."""

    name: str = Field("text-to-image", description="one of the names `flash-diffusion distill --help` lists")
    variants: Count = Field(
        1, description="different conditions (masks, degradations) that each picture gets; drawn once, then kept"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="the task's own settings")


class LoraSection(Section):
    """The adapters that train."""

    rank: Count = Field(64, description="r of the student's LoRA (and the critic's)")
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank (default: rank, so by 1)")
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="names that the adapted layers' paths end in (default: the family's own, all of its attention)",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="storage of the exported file; what trains is float32 always"
    )


class MethodSection(Section):
    """The constants of the method; defaults are the paper's for SD 1.5 (arXiv 2406.02347)."""

    teacher_steps: Count = Field(32, description="K, evaluations of the teacher's grid; a multiple of 4")
    solver: Literal["dpmpp_2m", "ddim", "euler"] = Field("dpmpp_2m", description="the teacher's ODE solver")
    guidance: tuple[float, float] = Field(
        (3.0, 13.0), description="low and high of the teacher's guidance scale w in uncond + w (cond - uncond)"
    )
    distillation: Literal["mse", "l1", "pseudo_huber", "lpips"] = Field("mse", description="the distillation distance")
    perceptual_crop: Count = Field(32, description="window of `lpips` in latent pixels, placed at random")
    adversarial: Literal["lsgan", "hinge", "non_saturating", "wgan", "vanilla"] = Field(
        "lsgan", description="the adversarial loss"
    )
    real: Literal["data", "teacher"] = Field(
        "teacher", description="what the discriminator calls real: the data or the teacher's solutions"
    )
    r1: Weight = Field(0.0, description="weight of the gradient penalty on the discriminator; 0 is off")
    fake_score: Literal["student", "critic"] = Field(
        "student", description="who stands for the student's distribution: itself (paper) or a critic LoRA (DMD2)"
    )

    @model_validator(mode="after")
    def _values_agree(self) -> MethodSection:
        low, high = self.guidance
        if not 1 <= low <= high:
            raise ValueError(f"guidance must be [low, high] with 1 <= low <= high, not {list(self.guidance)}")
        if self.teacher_steps % 4:
            raise ValueError(f"teacher_steps must be a multiple of the 4 modes, not {self.teacher_steps}")
        return self

    def settings(self) -> DistillerSettings:
        """The same constants as the core takes them."""
        from ..flash_core.distiller import DistillerSettings

        return DistillerSettings(**self.model_dump())


class PhaseSection(Section):
    """One stretch of training."""

    name: str = Field(description="shown in the log")
    updates: Count = Field(description="optimiser updates; under `limits.max_minutes` the phase's share of the run")
    modes: tuple[Weight, Weight, Weight, Weight] = Field(
        description="weights beta of the timesteps around 999, 749, 499, 249"
    )
    adversarial: Weight = Field(0.0, description="factor of the adversarial term; 0 does not compute it")
    dmd: Weight = Field(0.0, description="factor of the distribution matching term; 0 does not compute it")
    distillation: Weight = Field(1.0, description="factor of the distillation term; 0 does not compute it")

    @model_validator(mode="after")
    def _something_counts(self) -> PhaseSection:
        if not sum(self.modes) > 0:
            raise ValueError("at least one of the modes needs a weight above 0")
        if not self.adversarial + self.dmd + self.distillation > 0:
            raise ValueError("all three factors are 0: there is nothing to learn")
        return self

    def phase(self) -> Phase:
        """The same phase as the core takes it."""
        from ..flash_core.distiller import Phase

        return Phase(self.modes, self.adversarial, self.dmd, self.distillation)


class OptimizerSection(Section):
    """AdamW for everything that trains."""

    lr: float = Field(1e-5, gt=0, description="the student's learning rate")
    discriminator_lr: float = Field(1e-5, gt=0, description="the discriminator heads' learning rate")
    critic_lr: float = Field(1e-5, gt=0, description="the critic LoRA's learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's beta1, beta2 of student and critic")
    discriminator_betas: tuple[float, float] = Field((0.5, 0.999), description="AdamW's betas of the discriminator")
    weight_decay: Weight = Field(0.01, description="AdamW's decoupled weight decay")
    schedule: Literal["constant", "cosine"] = Field("constant", description="the learning rates' course over the run")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="updates over which the learning rates rise from 0")
    decay_from: float = Field(
        0.0, ge=0, lt=1, description="share of the run after which `cosine` starts to fall, flat before"
    )


class TrajectorySection(Section):
    """For small budgets: teacher trajectories computed once and replayed, instead of a rollout for every batch."""

    count: Annotated[int, Field(ge=0)] = Field(0, description="teacher trajectories; 0 is a fresh rollout (the paper)")
    batch: Count = Field(32, description="trajectories computed at once")
    max_minutes: float | None = Field(
        None, gt=0, description="stop earlier, with at least one batch, once so much time has passed"
    )


class PreviewSection(Section):
    """Sample grids while it trains: the teacher beside the student."""

    every: Annotated[int, Field(ge=0)] = Field(500, description="updates between grids; 0 is only at the end")
    prompts: list[str] = Field(
        default_factory=list, description="one row each (default: the first captions of the data)"
    )
    steps: list[Count] = Field([1, 2, 4], min_length=1, description="the student's step counts, one column each")
    guidance: float | None = Field(None, ge=1, description="the teacher's scale (default: the middle of the method's)")


class CheckpointSection(Section):
    """What a killed run continues from."""

    every: Annotated[int, Field(ge=0)] = Field(500, description="updates between checkpoints; 0 is only at the end")
    keep: Count = Field(2, description="how many of the last are kept")


class LimitsSection(Section):
    """Budgets."""

    max_minutes: float | None = Field(
        None,
        gt=0,
        description="wall time of the whole run, trajectories included: phases and learning rate follow the clock "
        "where it is faster than the updates, so that the run ends as planned (such a run is not reproducible)",
    )


class Recipe(Section):
    """A whole distillation."""

    model: ModelSection
    data: DataSection
    task: TaskSection = TaskSection()
    lora: LoraSection = LoraSection()
    method: MethodSection = MethodSection()
    phases: list[PhaseSection] = Field(min_length=1, description="in order")
    optimizer: OptimizerSection = OptimizerSection()
    batch_size: Count = Field(4, description="samples a process takes at once")
    gradient_accumulation: Count = Field(1, description="batches an update averages over")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 1.3 x the time")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of each adapter's gradient")
    ema: float = Field(
        0.999, ge=0, lt=1, description="decay of the average of the student's LoRA, which is what is exported; 0 is off"
    )
    trajectories: TrajectorySection = TrajectorySection()
    preview: PreviewSection = PreviewSection()
    checkpoint: CheckpointSection = CheckpointSection()
    precision: Literal["no", "bf16"] = Field(
        "no", description="autocast of the networks; fp16 is not offered: its range loses small gradients"
    )
    log_every: Count = Field(10, description="updates between lines of the log; each waits for the device once")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of weights, order, noise")
    limits: LimitsSection = LimitsSection()

    @model_validator(mode="after")
    def _half_precision_keeps_gradients(self) -> Recipe:
        if self.model.dtype == "float16":
            raise ValueError(
                "model.dtype float16 is for drawing: in training its range loses small gradients, and autocast to "
                "bfloat16 does not take it; set model.dtype: bfloat16 or float32, which read float16 files as well"
            )
        return self

    @property
    def updates(self) -> int:
        """Optimiser updates of all phases."""
        return sum(phase.updates for phase in self.phases)

    def to_yaml(self) -> str:
        """The resolved recipe, every field written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)

    def digest(self) -> str:
        """A hash of everything it says."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def parse_recipe(content: dict[str, Any], where: str = "the recipe") -> Recipe:
    """Check a recipe's content.

    Raises:
        UserError: lists every field that does not fit.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = explain(error)
        raise UserError(f"{where} has {len(lines)} problem{'s'[: len(lines) > 1]}:\n" + "\n".join(lines)) from error


def explain(error: ValidationError, within: Sequence[str] = ()) -> list[str]:
    """One line per problem: the field, what it wants, what it got.

    Args:
        within: the fields of a recipe that the checked part is in.
    """
    problems = error.errors(include_url=False)
    return [_explain({**problem, "loc": (*within, *problem["loc"])}) for problem in problems]


def _explain(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "the recipe"
    if problem["type"] == "missing":
        return f"  {field}: is missing; expected {_description(problem['loc'])}"
    if problem["type"] == "extra_forbidden":
        siblings = _fields(problem["loc"][:-1])
        return f"  {field}: there is no such field; expected one of {', '.join(siblings)}"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = "" if isinstance(given, dict) else f", got {given!r}"
    meaning = _description(problem["loc"])
    return f"  {field}: {message[:1].lower()}{message[1:]}{shown}" + (f" ({meaning})" if meaning else "")


def _section(loc: Sequence[Any]) -> type[Section] | None:
    """The model that the path ``loc`` of fields and list indices ends in."""
    model: type[Section] = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if get_origin(annotation) in (list, Union, UnionType):
            annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return None
        model = annotation
    return model


def _fields(loc: Sequence[Any]) -> list[str]:
    section = _section(loc)
    return list(section.model_fields) if section else []


def _description(loc: Sequence[Any]) -> str:
    names = [part for part in loc if not isinstance(part, int)]
    section = _section(names[:-1]) if names else None
    field = section.model_fields.get(names[-1]) if section else None
    if field is None:
        return ""
    if field.description:
        return field.description
    nested = _section(names)
    return (nested.__doc__ or "").strip().rstrip(".") if nested else ""
