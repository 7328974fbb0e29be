"""The fields of ``method``: the constants of the method, and the options of each loss term."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .section import Count, Section, Weight

if TYPE_CHECKING:  # flash_core brings torch, too heavy for a help text
    from ...flash_core.distiller import DistillerSettings

Whole = Annotated[int, Field(ge=0)]
UniformTime = Annotated[int, Field(ge=0, le=999)]
RANGE = re.compile(r"\s*(\d+)\s*\.\.\s*(\d+)\s*")


def _levels(given: Any) -> Any:
    """Return the whole numbers of a range written as ``10..250``, and other values unchanged."""
    if isinstance(given, str) and (match := RANGE.fullmatch(given)):
        low, high = int(match[1]), int(match[2])
        if low > high:
            raise ValueError(f"the range must rise, such as {high}..{low}")
        return list(range(low, high + 1))
    return given


Levels = Annotated[tuple[UniformTime, ...], BeforeValidator(_levels), Field(min_length=1)]


Share = Annotated[float, Field(ge=0, le=1)]


class StatesSection(Section):
    """Where samples start that do not start at pure noise. What the shares leave starts at noised data (the paper)."""

    trajectory: Share = Field(
        0.0,
        description="share that starts on the teacher's own path from noise; recorded trajectories always do, without "
        "this share",
    )
    student: Share = Field(
        0.0,
        description="share that starts at the student's own state after its first steps from noise (backward "
        "simulation, arXiv 2405.14867), drawn with sampler.stochasticity; the teacher solves from there",
    )

    steps: tuple[Count, ...] = Field(
        (2, 4),
        min_length=1,
        description="step counts of the student's runs; the largest has the segments of DMD's form trajectory and of "
        "intra-segment guidance",
    )

    @model_validator(mode="after")
    def _shares_are_at_most_the_whole(self) -> StatesSection:
        if self.trajectory + self.student > 1:
            raise ValueError(f"trajectory and student are {self.trajectory:g} + {self.student:g}; expected at most 1")
        if min(self.steps) < 2:
            raise ValueError(f"steps must be 2 or more, since 1 step has no state but noise; not {list(self.steps)}")
        return self

    @property
    def read_data(self) -> bool:
        """True where some samples start at noised data."""
        return self.trajectory + self.student < 1


class DmdSection(Section):
    """Distribution matching (DMD)."""

    form: Literal["plain", "decoupled", "trajectory"] = Field(
        "plain",
        description="plain matches the guided real score; decoupled matches the unguided real score and adds guidance "
        "at a noise level of its own, cleaner than the sample's start (arXiv 2511.22677); trajectory matches "
        "distributions at the end of each step (TDM, arXiv 2503.06674)",
    )
    loss: Literal["mse", "pseudo_huber"] = Field(
        "mse", description="mse: the gradient is the difference of the scores; pseudo_huber: nearly its sign (TDM)"
    )
    rows: Literal["all", "first_step"] = Field(
        "all", description="samples on which DMD acts: all, or those that start at pure noise (t from 900 on)"
    )
    guidance: float | None = Field(
        None, ge=1, description="guidance scale of the real score; 1 is unguided (default: each sample's own)"
    )
    timesteps: tuple[UniformTime, UniformTime] | None = Field(
        None,
        description="lowest and highest noise level of re-noising, 0 to 999 (default: 0 and 999; for decoupled and "
        "trajectory 20 and 979)",
    )

    @model_validator(mode="after")
    def _values_agree(self) -> DmdSection:
        if self.timesteps is not None and self.timesteps[0] > self.timesteps[1]:
            raise ValueError(f"timesteps must be [low, high] with low <= high, not {list(self.timesteps)}")
        if self.form == "trajectory" and self.rows != "all":
            raise ValueError("form trajectory compares every step of a run; leave out rows")
        if self.form == "decoupled" and self.guidance == 1:
            raise ValueError("decoupled takes the guidance apart, and guidance 1 leaves none; set form to plain")
        return self


class CriticSection(Section):
    """How the critic learns the student's distribution (fake_score: critic)."""

    updates: Count = Field(1, description="updates of the critic after each update of the student")
    warmup: Whole = Field(0, description="updates of the critic alone before the first update with DMD")
    memory: Whole = Field(
        0,
        description="the student's last outputs from which the critic's batches are drawn, with their conditions (in "
        "every checkpoint, so that a resumed run is exact); 0 for the outputs of the present update",
    )
    ida: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share by which the critic's LoRA moves to the student's after each update of the student "
        "(implicit distribution alignment, arXiv 2506.00523); 0 is off",
    )


class DiscriminatorSection(Section):
    """What the discriminator's heads read, and how they learn."""

    latents: bool = Field(
        False, description="one more head, on the latents themselves: it tells a blur that the teacher's features hide"
    )
    updates: Count = Field(1, description="updates of the heads after each update of the student")
    warmup: Whole = Field(0, description="updates of the heads alone before the first update with the adversarial loss")


class MethodSection(Section):
    """The constants of the method; defaults are the paper's for SD 1.5 (arXiv 2406.02347)."""

    teacher_steps: Count = Field(32, description="K, steps of the teacher; a multiple of 4")
    solver: Literal["dpmpp_2m", "dpmpp_3m", "unipc", "ddim", "euler"] = Field(
        "dpmpp_2m", description="the teacher's ODE solver; euler for flow models, the others for all others"
    )
    guidance: tuple[float, float] = Field(
        (3.0, 13.0),
        description="lowest and highest guidance scale w of the teacher, in uncond + w (cond - uncond); drawn "
        "uniformly",
    )
    guidance_interval: tuple[UniformTime, UniformTime] | None = Field(
        None,
        description="lowest and highest noise level at which the teacher is guided, 0 to 999; elsewhere it has no "
        "unconditional pass (arXiv 2404.07724). For its solutions, the real score of DMD (but not form decoupled) and "
        "intra-segment guidance (default: all levels)",
    )
    states: StatesSection = StatesSection()
    distillation: Literal["mse", "l1", "pseudo_huber", "lpips"] = Field("mse", description="the distillation distance")
    distillation_weighting: Literal["uniform", "min_snr", "velocity"] = Field(
        "uniform",
        description="factor of a sample's distillation loss by its timestep: uniform; min_snr, min(SNR, 5) (arXiv "
        "2303.09556), which is near 0 at pure noise; velocity, 1 / sigma^2, the distance of velocities",
    )
    feature_timesteps: Levels = Field(
        (10, 100, 250), description="noise levels of feature matching, 0 to 999: a list, or a range such as 10..250"
    )
    feature_rows: Literal["all", "first_step"] = Field(
        "all",
        description="samples on which feature matching acts: all, or those that start at pure noise (t from 900 on)",
    )
    perceptual_crop: Count = Field(32, description="side of the random crop that lpips compares, in latent pixels")
    adversarial: Literal["lsgan", "hinge", "non_saturating", "wgan", "vanilla", "relativistic"] = Field(
        "lsgan", description="the adversarial loss; relativistic compares real and fake of the same condition"
    )
    adversarial_timesteps: Levels = Field(
        (10, 250, 500, 750),
        description="noise levels at which the discriminator looks, 0 to 999: a list, or a range such as 10..250",
    )
    adversarial_rows: Literal["all", "first_step"] = Field(
        "all",
        description="samples on which the adversarial loss acts: all, or those that start at pure noise (t from 900 "
        "on)",
    )
    adversarial_weighting: Literal["fixed", "gradient_norm"] = Field(
        "fixed",
        description="fixed: a phase's factor multiplies the loss; gradient_norm: the factor is the norm of the "
        "adversarial gradient over the norm of the distillation gradient, both in the student's output",
    )
    real: Literal["data", "teacher"] = Field(
        "teacher", description="real samples of the discriminator: the data or the teacher's solutions"
    )
    r1: Weight = Field(0.0, description="weight of the R1 gradient penalty on the discriminator; 0 is off")
    discriminator: DiscriminatorSection = DiscriminatorSection()
    fake_score: Literal["student", "critic"] = Field(
        "student",
        description="network that estimates the score of the student's samples: the student itself (paper) or a "
        "critic LoRA (DMD2)",
    )
    dmd: DmdSection = DmdSection()
    critic: CriticSection = CriticSection()

    @model_validator(mode="after")
    def _values_agree(self) -> MethodSection:
        low, high = self.guidance
        if not 1 <= low <= high:
            raise ValueError(f"guidance must be [low, high] with 1 <= low <= high, not {list(self.guidance)}")
        if self.guidance_interval is not None and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(
                f"guidance_interval must be [low, high] with low <= high, not {list(self.guidance_interval)}"
            )
        if self.guidance_interval is not None and self.guidance == (1, 1):
            raise ValueError(
                "guidance_interval: guidance [1, 1] is none at any noise level; leave out guidance_interval, or raise "
                "guidance"
            )
        if self.teacher_steps % 4:
            raise ValueError(f"teacher_steps must be a multiple of the 4 modes, not {self.teacher_steps}")
        if self.fake_score == "student" and self.critic != CriticSection():
            raise ValueError("critic: there is no critic to train; set fake_score to critic, or leave out critic")
        if self.dmd.form == "trajectory" and self.teacher_steps % max(self.states.steps):
            raise ValueError(
                f"form trajectory starts at the timesteps of a run of {max(self.states.steps)} steps, so teacher_steps "
                f"must be a multiple of them, not {self.teacher_steps}"
            )
        if self.dmd.form == "trajectory" and self.critic.memory:
            raise ValueError("critic.memory: form trajectory needs the present outputs; set the memory to 0")
        return self

    def settings(self, stochasticity: float = 1.0) -> DistillerSettings:
        """Return the constants as flash_core takes them.

        Args:
            stochasticity: share of fresh noise between the student's steps, where samples start at its own states.
        """
        from ...flash_core.distiller import DistillerSettings, DmdSettings, StartStates

        fields = self.model_dump(exclude={"states", "dmd", "critic", "discriminator"})
        states = StartStates(**self.states.model_dump(), stochasticity=stochasticity)
        return DistillerSettings(**fields, states=states, dmd=DmdSettings(**self.dmd.model_dump()))


METHOD_FIELDS_OF_0_1 = {
    *("teacher_steps", "solver", "guidance", "distillation", "perceptual_crop"),
    *("adversarial", "real", "r1", "fake_score"),
}
