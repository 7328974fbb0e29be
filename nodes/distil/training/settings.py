"""The settings of a distillation in the graph: presets, and numbers that follow from the model's size and family.

Numbers by size and by family are those of the trainer's preset ``best``; small models have their own rank and rate.
A test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ....flash_core.grid import MAX_FEW_STEPS
from ....flash_core.settings import DistillerSettings, DmdSettings, Phase
from ....flash_core.solvers import Solver

PresetName = Literal["quick try", "standard", "thorough"]
PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)


@dataclass(frozen=True)
class Budget:
    """How much work a run is.

    Attributes:
        updates: of the LoRA.
        trajectories: solutions of the teacher that are recorded, and replayed in the updates.
        samples: that an update learns from.
    """

    updates: int
    trajectories: int
    samples: int


# On the demo updates help more than trajectories: 1,024 with 165 updates of 16 end far behind 768 with 260.
BUDGETS: dict[PresetName, Budget] = {
    "quick try": Budget(140, 64, 8),
    "standard": Budget(300, 192, 8),
    "thorough": Budget(2000, 4096, 16),
}

# {parameters of the network: value}, see by_size. For small models `best` has rank 32 and 2e-3. Runs as short as *quick
# try* and *standard* came out no nearer with these.
LEARNING_RATES = {5.0e6: 4.0e-3, 8.6e8: 1.0e-4, 2.6e9: 5.0e-5}
DISCRIMINATOR_RATES = {5.0e6: 1.0e-3, 8.6e8: 1.0e-4, 2.6e9: 5.0e-5}
RANKS = {5.0e6: 8, 8.6e8: 64}
AT_ONCE = {1.0e7: 32, 8.6e8: 4, 2.6e9: 2}

# The endings of the adapted layers' names in diffusers. UNets: the whole network, since attention alone learns half as
# fast on the demo.
UNET_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "time_emb_proj", "conv_shortcut"),
)
PIXART_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "linear_1", "linear_2"),
    *("adaln_single.linear", "pos_embed.proj", "proj_out"),
)
MMDIT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Usual:
    """What is usual for a family.

    Attributes:
        guidance: the teacher's guidance scale, ``uncond + w (cond - uncond)``; 1 is off.
        teacher_steps: K, steps of the teacher from noise to picture, a multiple of 4.
        targets: endings of the adapted layers' names; empty for every linear layer of the blocks.
    """

    guidance: float
    teacher_steps: int
    targets: tuple[str, ...]


FAMILIES: dict[str, Usual] = {
    "flash-demo": Usual(3, 8, UNET_TARGETS),
    "sd15": Usual(7.5, 16, UNET_TARGETS),
    "sd21": Usual(7.5, 16, UNET_TARGETS),
    "sdxl": Usual(7, 16, UNET_TARGETS),
    "pixart": Usual(4.5, 16, PIXART_TARGETS),
    "pixart-sigma": Usual(4.5, 16, PIXART_TARGETS),
    "sd3": Usual(7, 28, MMDIT_TARGETS),
    "sd35": Usual(7, 28, MMDIT_TARGETS),
    "flux": Usual(1, 28, MMDIT_TARGETS),  # Flux.1 dev has its guidance built in
}

# Shares of the timesteps' modes t = 999, 749, 499, 249. Pure noise is hardest, and all that a single step has.
# The recipe ``demo`` has these.
DISTILLATION_MODES = (0.55, 0.2, 0.15, 0.1)
# The last phase has one more term on the samples that start at pure noise, where the mean squared error blurs: that of
# the recipe ``demo``, distribution matching (DMD) without guidance at one noise level and with it at a cleaner one. The
# factors of the preset ``best`` (0.25, and 0.2 of the error) made single steps of known subjects too strong.
FIRST_STEP = Phase(modes=(0.5, 0.2, 0.15, 0.15), first_step_distillation=0.5, dmd=0.15)
FIRST_STEP_SHARE = 0.3
FIRST_STEP_RATE = 0.4
DMD = DmdSettings(form="decoupled", rows="first_step")
CRITIC_WARMUP = 20  # updates of the critic alone, as in the preset ``tdm``
# The same phase with the adversarial loss, in the place of the matching by the student itself.
SHARPENED = replace(FIRST_STEP, first_step_distillation=0.2, adversarial=4, dmd=0)
ADVERSARIAL_TIMESTEPS = tuple(range(10, 401))
HEADS_WARMUP = 150  # updates of the discriminator alone before the student listens to it

# Shares of fresh noise between the student's steps. Replayed samples start on the teacher's own path, which has less
# fresh noise than noised data.
PATH_STOCHASTICITY = 0.5
DATA_STOCHASTICITY = 1.0

CLIP_NORM = 1.0
AVERAGE_DECAY = 0.99
BETAS = (0.9, 0.99)  # a short run needs a short memory
DISCRIMINATOR_BETAS = (0.5, 0.99)
WARMUP = 20  # updates over which the learning rate rises
FLAT = 0.3  # of the run, then the learning rate falls as half a cosine
RECORDED_AT_ONCE = 32  # trajectories, at most


@dataclass(frozen=True)
class Stage:
    """A part of the updates with one mixture of losses.

    Attributes:
        updates: of this stage.
        rate: factor of the student's learning rate.
    """

    name: str
    phase: Phase
    updates: int
    rate: float = 1.0


@dataclass(frozen=True)
class DistilSettings:
    """Everything that decides the result of a run, except model, prompts and latents.

    Attributes:
        budget: updates, trajectories and samples of an update.
        at_once: samples that the network takes at once; an update adds up the gradients of several such batches.
        recorded_at_once: trajectories that are recorded at once.
        rank: of the LoRA; its alpha is the same number.
        learning_rate, discriminator_rate: of AdamW; the critic has the discriminator's, as in the preset ``tdm``.
        guidance, teacher_steps, targets: see :class:`Usual`.
        solver: of the teacher's ODE.
        adversarial: whether the last updates have the adversarial loss on the first step.
        critic: whether a critic of its own learns the student's distribution (DMD2); without it and without the
            adversarial loss the student is its own critic.
        replays: True where samples start on recorded trajectories, False where they start at noised data.
        seed: of the LoRA, the order and all noise.
    """

    budget: Budget
    at_once: int
    recorded_at_once: int
    rank: int
    learning_rate: float
    discriminator_rate: float
    guidance: float
    teacher_steps: int
    targets: tuple[str, ...]
    solver: Solver
    adversarial: bool
    critic: bool
    replays: bool
    seed: int

    @property
    def matches(self) -> bool:
        """Whether the last updates match distributions."""
        return self.critic or not self.adversarial

    @property
    def last_terms(self) -> str:
        """The terms of the last updates beside the distillation, in words."""
        terms = {"the adversarial loss": self.adversarial, "distribution matching": self.matches}
        return " and ".join(name for name, on in terms.items() if on)

    @property
    def warmup(self) -> int:
        """Updates of discriminator and critic alone before the last stage."""
        wanted = max(HEADS_WARMUP * self.adversarial, CRITIC_WARMUP * self.critic)
        return min(wanted, self.budget.updates)

    @property
    def batches(self) -> int:
        """How many batches an update adds up."""
        return max(1, round(self.budget.samples / self.at_once))

    @property
    def stochasticity(self) -> float:
        """The share of fresh noise that the LoRA should be sampled with."""
        return PATH_STOCHASTICITY if self.replays else DATA_STOCHASTICITY

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages in their order; their updates sum to the budget's."""
        last = replace(SHARPENED if self.adversarial else FIRST_STEP, dmd=FIRST_STEP.dmd if self.matches else 0.0)
        return in_stages(self.budget.updates, last)

    def of_distiller(self) -> DistillerSettings:
        """Return the constants of the method."""
        return DistillerSettings(
            teacher_steps=self.teacher_steps,
            solver=self.solver,
            guidance=(self.guidance, self.guidance),
            adversarial="relativistic",
            adversarial_rows="first_step",
            adversarial_timesteps=ADVERSARIAL_TIMESTEPS,
            adversarial_weighting="gradient_norm",
            fake_score="critic" if self.critic else "student",
            dmd=DMD,
        )

    def stochasticity_by_steps(self) -> dict[int, float]:
        """Return {step count: share of fresh noise} for the LoRA's metadata; empty for the paper's 1."""
        return {} if self.stochasticity == 1 else dict.fromkeys(range(1, MAX_FEW_STEPS + 1), self.stochasticity)


def in_stages(updates: int, last: Phase) -> tuple[Stage, ...]:
    """Return the stages of a run: the mean squared error alone, then ``last``; without the second in a tiny run."""
    ending = round(updates * FIRST_STEP_SHARE)
    stages = (
        Stage("distillation", Phase(modes=DISTILLATION_MODES), updates - ending),
        Stage("first step", last, ending, FIRST_STEP_RATE),
    )
    return tuple(stage for stage in stages if stage.updates)


def by_size(table: Mapping[float, float], parameters: float) -> float:
    """Return a value for a network's size: linear in the logarithms between two sizes of ``table``, constant outside.

    Args:
        parameters: of the network.
    """
    rows = sorted(table.items())
    below = max((row for row in rows if row[0] <= parameters), default=rows[0])
    above = min((row for row in rows if row[0] >= parameters), default=rows[-1])
    share = math.log(parameters / below[0]) / math.log(above[0] / below[0]) if above[0] > below[0] else 0.0
    return math.exp((1 - share) * math.log(below[1]) + share * math.log(above[1]))


def whole_by_size(table: Mapping[float, float], parameters: float) -> int:
    """Return :func:`by_size` as a whole number, from 8 on a multiple of 4."""
    value = by_size(table, parameters)
    return round(value) if value < 8 else 4 * round(value / 4)


def usual_for(family: str | None, *, flow: bool, transformer: bool) -> Usual:
    """Return what is usual for a family; for an unknown family what is usual for its kind.

    Transformers of unknown families name their layers in many ways, so all linear layers of their blocks are adapted.
    """
    if family in FAMILIES:
        return FAMILIES[family]
    return Usual(4.5 if flow else 7.0, 28 if flow else 16, () if transformer else UNET_TARGETS)


def choose_settings(
    preset: PresetName,
    parameters: float,
    usual: Usual,
    *,
    flow: bool,
    replays: bool,
    seed: int,
    adversarial: bool = False,
    critic: bool = False,
    guidance: float = 0.0,
    rank: int = 0,
    learning_rate: float = 0.0,
    updates: int = 0,
    trajectories: int = 0,
    samples: int = 0,
    at_once: int = 0,
    teacher_steps: int = 0,
) -> DistilSettings:
    """Return the settings of a run; 0 stands for the value of the preset, of the model's size or of its family.

    Args:
        parameters: of the network.
        flow: True for a flow model, whose solver is Euler's.

    Raises:
        ValueError: ``teacher_steps`` is not a multiple of 4.
    """
    if teacher_steps % 4:
        raise ValueError(
            f"teacher_steps is {teacher_steps}; expected a multiple of 4, so that the teacher stops at the few-step "
            f"model's timesteps. Choose {4 * max(1, round(teacher_steps / 4))}, or 0 for what is usual."
        )
    budget = BUDGETS[preset]
    budget = Budget(updates or budget.updates, trajectories or budget.trajectories, samples or budget.samples)
    fits = at_once or whole_by_size(AT_ONCE, parameters)
    return DistilSettings(
        budget=budget,
        at_once=min(fits, budget.samples),
        recorded_at_once=min(fits, RECORDED_AT_ONCE),
        rank=rank or whole_by_size(RANKS, parameters),
        learning_rate=learning_rate or float(f"{by_size(LEARNING_RATES, parameters):.2g}"),
        discriminator_rate=float(f"{by_size(DISCRIMINATOR_RATES, parameters):.2g}"),
        guidance=guidance or usual.guidance,
        teacher_steps=teacher_steps or usual.teacher_steps,
        targets=usual.targets,
        solver="euler" if flow else "dpmpp_2m",
        adversarial=adversarial,
        critic=critic,
        replays=replays,
        seed=seed,
    )
