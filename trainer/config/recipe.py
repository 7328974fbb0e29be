"""The sections of a recipe: meaning, unit, range and default of each field."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from .data import DATA_FIELDS_OF_0_1, DATA_FIELDS_WITHOUT_EFFECT, DataSection
from .method import METHOD_FIELDS_OF_0_1, MethodSection
from .resources import MemorySection, SpeedSection
from .section import Count, FilePath, Location, Section, Weight

if TYPE_CHECKING:  # flash_core brings torch, too heavy for a help text
    from ...flash_core.distiller import Phase


class StyleLora(Section):
    """A style LoRA merged into the teacher."""

    path: FilePath = Field(description="the LoRA's .safetensors file")
    strength: float = Field(1.0, description="factor of the LoRA's update; 0 is off")


class ControlSection(Section):
    """A frozen network that reads a hint, such as edges, and steers teacher, student and critic."""

    path: Location = Field(
        description="a ControlNet, Control-LoRA or T2I-adapter: a diffusers folder, a Hub name such as owner/model, a "
        ".safetensors file, or the name of one of the demo's"
    )
    scale: float | None = Field(
        None, description="factor of its residuals (default: 1 for ControlNets, 0.8 for T2I-adapters, as in the paper)"
    )


class ImageAdapterSection(Section):
    """An IP-Adapter: a UNet reads a picture by cross-attention, as it reads text (arXiv 2308.06721)."""

    path: Location = Field(
        description="the IP-Adapter's .safetensors file; with `weight_name`, a folder or a Hub name such as owner/name"
    )
    weight_name: str | None = Field(
        None, description="the .safetensors file inside the folder or Hub repository that `path` names"
    )
    image_encoder: Location = Field(
        description="the CLIP vision encoder that the IP-Adapter was trained with: a folder, a Hub name, or a "
        "folder inside a Hub repository, such as owner/name/folder"
    )
    scale: float = Field(1.0, ge=0, description="factor of its attention, in teacher and student")

    @property
    def title(self) -> str:
        """The adapter's name and scale."""
        return f"{Path(self.weight_name or self.path).stem} (IP-Adapter) x {self.scale:g}"


class ModelSection(Section):
    """The teacher: the frozen base of teacher, student and critic."""

    family: str = Field(description="model family; `flash-diffusion distill --help` lists the names")
    path: Location | None = Field(
        None,
        description="a diffusers folder, a Hub name such as owner/model, or a .safetensors checkpoint; for the "
        "family demo not needed, or glyphs, the second embedded teacher",
    )
    config: Location | None = Field(
        None,
        description="for a .safetensors checkpoint: a diffusers folder or Hub name with the model's "
        "configuration, and with the weights that the checkpoint lacks (default: the family's own on the Hub)",
    )
    variant: str | None = Field(
        None,
        description="variant of a folder's weights, such as fp16 (default: no variant, or else the only one present)",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="dtype of the frozen base in memory; LoRA and heads are always float32; float16 is not for "
        "training",
    )
    task_adapter: Location | None = Field(
        None,
        description="a task adapter, with which a text-to-image UNet reads a task's channels: a .safetensors file, or "
        "the name of one of the demo's tasks",
    )
    control: ControlSection | None = Field(
        None, description="a ControlNet or T2I-adapter for a UNet, for the task control"
    )
    image_adapter: ImageAdapterSection | None = Field(
        None,
        description="an IP-Adapter for a UNet, for tasks that condition on a picture (face-swap with identity: tokens)",
    )
    storage: Literal["float8", "int8", "nf4"] | None = Field(
        None,
        description="keep the weights of the base's blocks in few bits, and cast each layer's to dtype when it is "
        "asked: float8 (e4m3fn, as ComfyUI's fp8_e4m3fn), int8 (a factor for each output channel; closer to the "
        "weights), or nf4 (4 bits, a factor for each 64 values; half the bytes, farther from the weights); the LoRA is "
        "then for such a base (default: all weights in dtype)",
    )
    t5: bool = Field(True, description="SD3 only: encode prompts with T5 too; false saves memory")
    style_lora: list[StyleLora] = Field(
        default_factory=list,
        description="style LoRAs merged into the frozen base, so that the student learns the style in few steps; use "
        "the exported LoRA together with the style LoRAs",
    )

    @property
    def styles(self) -> str:
        """The merged style LoRAs, each with its strength; empty without style LoRAs."""
        return ", ".join(f"{style.path.name} x {style.strength:g}" for style in self.style_lora)


class TaskSection(Section):
    """The task: the conditions that the model gets beside text."""

    name: str = Field("text-to-image", description="the task; `flash-diffusion distill --help` lists the names")
    variants: Count = Field(
        1, description="random conditions (masks, degradations) of each picture; drawn once before training"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="settings of the task, such as masks or scale")


class LoraSection(Section):
    """The LoRA that trains."""

    rank: Count = Field(64, description="rank r of the student's LoRA, and of the critic's")
    alpha: float | None = Field(
        None, gt=0, description="the LoRA's update is scaled by alpha / rank (default: rank, a factor of 1)"
    )
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="ends of the names of the layers that get a LoRA (default: all attention layers of the family)",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the exported file; training is always in float32"
    )
    start: Location | None = Field(
        None,
        description="a LoRA of this model to train on: its .safetensors file, or the name of one of the demo's; its "
        "layers must be among the targets, and its rank at most `rank` (default: a new LoRA, which changes nothing)",
    )


class PhaseSection(Section):
    """One phase of training."""

    name: str = Field(description="name in the log")
    updates: Count = Field(description="optimiser updates; with limits.max_minutes, the phase's share of the run")
    modes: tuple[Weight, Weight, Weight, Weight] = Field(
        description="weights beta of the four modes: timesteps around 999, 749, 499, 249"
    )
    adversarial: Weight = Field(0.0, description="factor of the adversarial loss; 0 is off, and costs nothing")
    dmd: Weight = Field(0.0, description="factor of the distribution matching loss (DMD); 0 is off, and costs nothing")
    distillation: Weight = Field(1.0, description="factor of the distillation loss; 0 is off, and costs nothing")
    feature_matching: Weight = Field(
        0.0,
        description="factor of feature matching, the distance of student and teacher as the teacher's hidden states; 0 "
        "is off, and costs nothing",
    )
    intra_segment: Weight = Field(
        0.0,
        description="factor of intra-segment guidance, the distance of the student's step and its step by way of the "
        "teacher's first part of it (ISG, arXiv 2506.00523; published: 0.2); 0 is off, and costs nothing",
    )
    first_step_distillation: Weight = Field(
        1.0,
        description="factor of the distillation loss of the samples that start at pure noise (t from 900 on); below 1, "
        "the student may draw another picture from a noise than the teacher draws",
    )

    learning_rate: float = Field(
        1.0,
        gt=0,
        description="factor of optimizer.lr in this phase; heads and critic keep their rates. A term that refines a "
        "trained student wants less, such as 0.25",
    )

    @model_validator(mode="after")
    def _something_counts(self) -> PhaseSection:
        if not sum(self.modes) > 0:
            raise ValueError("all four modes are 0; give at least one mode a weight above 0")
        if not self.adversarial + self.dmd + self.distillation + self.feature_matching + self.intra_segment > 0:
            raise ValueError(
                "adversarial, dmd, distillation, feature_matching and intra_segment are all 0; give at least one a "
                "factor above 0"
            )
        return self

    def phase(self) -> Phase:
        """Return the phase as flash_core takes it."""
        from ...flash_core.distiller import Phase

        return Phase(**self.model_dump(exclude={"name", "updates", "learning_rate"}))


PHASE_FIELDS_OF_0_1 = {"name", "updates", "modes", "adversarial", "dmd", "distillation"}


class OptimizerSection(Section):
    """AdamW, for student, discriminator heads and critic."""

    lr: float = Field(1e-5, gt=0, description="the student's learning rate")
    discriminator_lr: float = Field(1e-5, gt=0, description="the discriminator heads' learning rate")
    critic_lr: float = Field(1e-5, gt=0, description="the critic LoRA's learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="beta1, beta2 of student and critic")
    discriminator_betas: tuple[float, float] = Field(
        (0.5, 0.999), description="beta1, beta2 of the discriminator heads"
    )
    weight_decay: Weight = Field(0.01, description="decoupled weight decay")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="course of the learning rates; cosine falls to 0 at the end of the run"
    )
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="updates over which the learning rates rise from 0")
    decay_from: float = Field(
        0.0, ge=0, lt=1, description="share of the run, 0 to 1, at which cosine starts to fall; flat before"
    )
    bits: Literal[8, 32] = Field(
        32, description="of AdamW's two moments; 8 saves 6 of 8 bytes a parameter, and needs bitsandbytes"
    )


class TrajectorySection(Section):
    """Teacher trajectories recorded and replayed, instead of a rollout for every batch."""

    count: Annotated[int, Field(ge=0)] = Field(
        0,
        description="trajectories to record before training, or with `reuse` to hold at once; 0 makes a new rollout "
        "for every batch (the paper)",
    )
    reuse: float | None = Field(
        None,
        ge=1,
        description="uses of each trajectory, before a new one replaces it: training begins after count / reuse "
        "trajectories, and the teacher solves new ones while it goes on (default: all are recorded first, and none is "
        "replaced)",
    )
    memory: float = Field(
        1.0,
        ge=0,
        description="with `reuse`: GiB of trajectories that a process keeps in memory; the others are read from disk",
    )
    batch: Count = Field(32, description="trajectories recorded at once")
    max_minutes: float | None = Field(
        None, gt=0, description="stop recording after so many minutes, with at least one batch (default: no limit)"
    )
    split: bool = Field(
        False,
        description="each phase replays trajectories of its own, as many as its share of the updates; a later phase "
        "then trains on new noise",
    )

    @model_validator(mode="after")
    def _a_refreshed_bank_records_while_training(self) -> TrajectorySection:
        if self.reuse is None:
            return self
        if self.reuse > self.count:
            raise ValueError(
                f"reuse {self.reuse:g} with count {self.count}: a bank of count trajectories gets count / reuse "
                "new ones a round, which must be at least 1; set count to at least reuse times batch_size"
            )
        if self.max_minutes is not None:
            raise ValueError(
                "max_minutes ends the recording before training, and with reuse the teacher records while training; "
                "leave out max_minutes, or reuse"
            )
        if self.split:
            raise ValueError(
                "split divides trajectories that are recorded before training, and with reuse new ones come all the "
                "time; leave out split, or reuse"
            )
        return self


class SamplerSection(Section):
    """How the student is sampled: in previews and evaluations, and told by the LoRA's metadata."""

    stochasticity: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of fresh noise between steps: 1 is the paper's; students of recorded trajectories want less",
    )


class PreviewSection(Section):
    """Sample grids during training: the teacher beside the student."""

    every: Annotated[int, Field(ge=0)] = Field(
        500, description="updates between sample grids; 0 draws one only at the end"
    )
    prompts: list[str] = Field(
        default_factory=list, description="prompts, one row each (default: the first captions of the data)"
    )
    steps: list[Count] = Field([1, 2, 4], min_length=1, description="the student's step counts, one column each")
    guidance: float | None = Field(
        None, ge=1, description="the teacher's guidance scale (default: the middle of method.guidance)"
    )


class CheckpointSection(Section):
    """Checkpoints, from which a killed run continues."""

    every: Annotated[int, Field(ge=0)] = Field(
        500, description="updates between checkpoints; 0 saves one only at the end"
    )
    keep: Count = Field(2, description="checkpoints that are kept, the last ones")


class LimitsSection(Section):
    """Limits of time."""

    max_minutes: float | None = Field(
        None,
        gt=0,
        description="minutes of the whole run, recording included (default: no limit); phases and learning "
        "rates follow the clock where the clock is ahead of the updates; such a run is not reproducible",
    )


class Recipe(Section):
    """All settings of a distillation."""

    model: ModelSection
    data: DataSection
    task: TaskSection = TaskSection()
    lora: LoraSection = LoraSection()
    method: MethodSection = MethodSection()
    phases: list[PhaseSection] = Field(min_length=1, description="phases of training, in order")
    optimizer: OptimizerSection = OptimizerSection()
    batch_size: Count = Field(4, description="samples that a process takes at once")
    gradient_accumulation: Count = Field(1, description="batches that one update averages")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations: less memory, about 1.3 times the time"
    )
    sharding: Literal["none", "base"] = Field(
        "none",
        description="for several processes: `base` shares the frozen base's weights among them (FSDP2), so that each "
        "device holds a part; slower, for bases that leave no room on a card",
    )
    gradient_clip: float = Field(
        1.0, gt=0, description="largest gradient norm of student, discriminator and critic, each"
    )
    ema: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="decay of the moving average of the student's LoRA; the average is exported; 0 is off",
    )
    trajectories: TrajectorySection = TrajectorySection()
    sampler: SamplerSection = SamplerSection()
    preview: PreviewSection = PreviewSection()
    checkpoint: CheckpointSection = CheckpointSection()
    precision: Literal["no", "bf16"] = Field(
        "no", description="autocast of the networks: no or bf16 (fp16 would lose small gradients)"
    )
    log_every: Count = Field(10, description="updates between lines of the log")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="seed of initial weights, order of samples, and noise"
    )
    limits: LimitsSection = LimitsSection()
    speed: SpeedSection = SpeedSection()
    memory: MemorySection = MemorySection()

    @model_validator(mode="after")
    def _half_precision_keeps_gradients(self) -> Recipe:
        if self.model.dtype == "float16":
            raise ValueError(
                "model.dtype float16 cannot train: it loses small gradients; set model.dtype to bfloat16 or float32 "
                "(both read float16 files too)"
            )
        return self

    @model_validator(mode="after")
    def _trajectories_need_cached_data(self) -> Recipe:
        if self.data.stream and self.trajectories.count:
            raise ValueError(
                "recorded trajectories need cached data; set trajectories.count to 0, or leave out data.stream"
            )
        return self

    @model_validator(mode="after")
    def _processes_that_share_weights_stay_together(self) -> Recipe:
        if self.sharding != "none" and self.trajectories.count:
            raise ValueError(
                "sharding: processes that share the base's weights must call it together, but each records "
                "trajectories of its own; set trajectories.count to 0, or sharding to none"
            )
        if self.sharding != "none" and (self.model.storage or self.memory.offload or self.memory.base == "cpu"):
            raise ValueError(
                "sharding: weights that processes share are neither stored in few bits nor moved off the device; leave "
                "out model.storage, memory.offload and memory.base, or set sharding to none"
            )
        if self.sharding != "none" and self.speed.compile is not None:
            raise ValueError(
                "sharding: a block's weights are gathered by hooks that torch.compile does not see here; leave out "
                "speed.compile, or set sharding to none"
            )
        return self

    @model_validator(mode="after")
    def _what_waits_elsewhere_is_not_asked(self) -> Recipe:
        if self.memory.base == "cpu" and self.speed.compile is not None:
            raise ValueError(
                "memory.base cpu: torch.compile does not see a weight being fetched; leave out speed.compile"
            )
        if self.memory.offload and self.asks_vae:
            raise ValueError(
                f"memory.offload moves the VAE off the device, and {self.asks_vae}; set memory.offload to false"
            )
        return self

    @model_validator(mode="after")
    def _recorded_trajectories_are_the_teachers_path(self) -> Recipe:
        if self.trajectories.count and self.method.states.trajectory:
            raise ValueError(
                "method.states.trajectory: recorded trajectories start on the teacher's path already; leave the share "
                "out, or set trajectories.count to 0"
            )
        return self

    @model_validator(mode="after")
    def _gradient_norms_can_be_compared(self) -> Recipe:
        for phase in self.phases:
            if self.method.adversarial_weighting == "gradient_norm" and phase.adversarial and not phase.distillation:
                raise ValueError(
                    f"method.adversarial_weighting gradient_norm compares with the distillation loss, which is off in "
                    f"phase {phase.name!r}; give distillation a factor above 0, or set the weighting to fixed"
                )
        return self

    @property
    def reads_pictures(self) -> bool:
        """True where training reads data latents, and not only the teacher's solutions."""
        recorded = self.trajectories.count > 0
        return self.method.real == "data" or (not recorded and self.method.states.read_data)

    @property
    def asks_vae(self) -> str:
        """Why an update asks the VAE, in words; empty if it does not."""
        if self.data.stream:
            return "data.stream encodes every batch"
        return "method.distillation lpips decodes every batch" if self.method.distillation == "lpips" else ""

    @property
    def encodes_in_stages(self) -> bool:
        """True where text encoders, VAE and network are on the device one after the other before training."""
        return not self.data.stream and self.sharding == "none"

    @property
    def updates(self) -> int:
        """The updates of all phases."""
        return sum(phase.updates for phase in self.phases)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, with every field."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)

    def digest(self) -> str:
        """Return a hash of all fields.

        Fields of later versions are left out at their defaults, so that recipes of version 0.1 keep their hash. Fields
        that do not change the result (where the cache is, threads, sharding, memory) are left out.
        """
        content = self.model_dump(mode="json", exclude={"sharding", "memory"})
        if self.speed == SpeedSection():
            del content["speed"]
        elif self.speed.compile is None:
            del content["speed"]["compile"]
        if self.model.storage is None:
            del content["model"]["storage"]
        if self.optimizer.bits == OptimizerSection.model_fields["bits"].default:
            del content["optimizer"]["bits"]
        if self.sampler == SamplerSection():
            del content["sampler"]
        for phase in content["phases"]:
            for name in set(phase) - PHASE_FIELDS_OF_0_1:
                if phase[name] == PhaseSection.model_fields[name].default:
                    del phase[name]
        del content["trajectories"]["memory"]
        for name in ("split", "reuse"):
            if not content["trajectories"][name]:
                del content["trajectories"][name]
        if self.lora.start is None:
            del content["lora"]["start"]
        changed = self.method.model_dump(mode="json", exclude_defaults=True)
        for name in set(content["method"]) - METHOD_FIELDS_OF_0_1:
            if changed.get(name):
                content["method"][name] = changed[name]
            else:
                del content["method"][name]
        data = content["data"]
        for name in set(data) - DATA_FIELDS_OF_0_1:
            if name in DATA_FIELDS_WITHOUT_EFFECT or data[name] == DataSection.model_fields[name].default:
                del data[name]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
