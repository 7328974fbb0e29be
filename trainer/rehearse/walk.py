"""Walk the updates of every phase at true size, on tensors without values, and count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any, cast

import torch
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ...flash_core.grid import NUM_MODES, timestep_mixture, trailing_fractions
from ...flash_core.terms.draws import FIRST_STEP_FRACTION
from ..config import PhaseSection, Recipe
from ..distill.assembly import Assembly, add_adapters, discriminator_of, join, needs_discriminator
from ..distill.passes import GUIDED, update_passes
from ..distill.preview import ROWS, Preview, preview_rows
from ..distill.update import Updater
from ..export.export import stochasticity_of
from ..export.training_state import TrainingState
from ..metrics.lpips import Lpips
from ..tasks import build_task
from ..tasks.requirements import check_channels, check_control
from ..teachers import family
from ..teachers.in_memory.stages import NETWORK, PICTURES
from ..teachers.in_memory.waiting import keep_off_device, waiting_weights
from .floor import Floor, PassWork, floor_of, of_base
from .meter import ACTIVATIONS, Meter, Moment
from .pretend.fakes import Fakes, PretendAccelerator, checkpoint_on_cuda, quiet
from .pretend.optimizer import pretend_adamw
from .pretend.teacher import in_dtype_of_base, outlined, pictures, pretend_teacher
from .samples import CAPTION, PretendExamples, PretendRollouts, RehearsedDistiller, conditions_of
from .stages import PretendCourier, PretendStages

ROLLOUT, OPTIMISER = "rollout", "optimiser"


@dataclass(frozen=True)
class PhaseCost:
    """What an update of a phase needs.

    Attributes:
        moments: moment -> what was counted, at its highest peak.
        flops: of an update, expected over the starts of its samples.
        moved: bytes of an update, at least, expected as well.
        crossed: bytes of a waiting base that an update copies to the device, expected as well.
        passes: forward passes of the network for one sample, a backward pass counted as two; expected.
        work: kind of product -> FLOPs of an update, expected; see :class:`.meter.Moment`.
        floor: what an update needs at least.
    """

    name: str
    updates: int
    moments: Mapping[str, Moment]
    flops: float
    moved: float
    crossed: float
    passes: float
    work: Mapping[str, float]
    floor: Floor


@dataclass(frozen=True)
class Rehearsal:
    """What a whole run needs.

    Attributes:
        recipe: as it was given.
        model: what was rehearsed.
        published: True where a published model stood in for one that can't be read.
        base_values: parameters of the frozen base.
        parts: part -> bytes that stay on the device while training.
        waiting: bytes of the base that wait in the computer's memory (``memory.base``).
        phases: of the recipe, in order.
        beside: encoding, recording, preview -> what was counted in one of each.
        pass_flops: of one forward pass of the network for one sample.
        needed: FLOPs of the base that the passes of one sample ask for.
    """

    recipe: Recipe
    model: str
    published: bool
    base_values: int
    parts: Mapping[str, int]
    waiting: int
    phases: Sequence[PhaseCost]
    beside: Mapping[str, Moment]
    pass_flops: float
    needed: PassWork

    @property
    def moments(self) -> dict[str, Moment]:
        """Every moment at its highest peak over the phases."""
        found = dict(self.beside)
        for phase in self.phases:
            found = highest(found, phase.moments)
        return found

    @property
    def waits(self) -> dict[str, int]:
        """Place in the code -> how often an update waits for the device there."""
        found: dict[str, int] = {}
        for phase in self.phases:
            for moment in phase.moments.values():
                for place, count in moment.waits.items():
                    found[place] = max(found.get(place, 0), count)
        return found


def highest(one: Mapping[str, Moment], other: Mapping[str, Moment]) -> dict[str, Moment]:
    """Return of each moment the one with the higher peak."""
    found = dict(one)
    for name, moment in other.items():
        if name not in found or moment.peak > found[name].peak:
            found[name] = moment
    return found


def rehearse(recipe: Recipe, device: str = "cpu") -> Rehearsal:
    """Run a recipe's encoding, updates and preview on tensors without values.

    The teacher's grid is shortened, since all its steps need the same memory. Its work is counted for the whole grid.

    Args:
        device: ``cpu``, where precision and attention are those of a GPU; or ``fakes.PRETEND_DEVICE``, without
            autocast, which finds tensors that were forgotten on the CPU, and every wait for the device.

    Raises:
        UserError: the recipe does not fit the model, or the model is neither there nor a published one; on the pretend
            device also: an operation reads tensors of two devices.
    """
    with quiet():
        return _Walk(recipe, device).rehearsal()


def shortened(recipe: Recipe) -> Recipe:
    """Return the recipe with as few steps and rows as need its memory: other steps and rows only repeat the work.

    The teacher's grid is the shortest on which all modes and runs have their timesteps; a preview has one batch of
    prompts and one step of the student.
    """
    steps = lcm(NUM_MODES, max(recipe.method.states.steps))
    method = recipe.method.model_copy(update={"teacher_steps": min(steps, recipe.method.teacher_steps)})
    rows = min(recipe.batch_size, len(recipe.preview.prompts) or ROWS)
    preview = recipe.preview.model_copy(update={"prompts": [CAPTION] * rows, "steps": [1]})
    return recipe.model_copy(update={"method": method, "preview": preview})


def in_one_step(recipe: Recipe) -> Recipe:
    """Return the recipe with a teacher's grid of one step: a preview's further steps need the same memory."""
    return recipe.model_copy(update={"method": recipe.method.model_copy(update={"teacher_steps": 1})})


class _Walk:
    """One rehearsal: the parts of a run without values, and their meter."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.given, self.recipe = recipe, shortened(recipe)
        self.fakes, self.meter = Fakes(device), Meter(device)
        self.accelerator = PretendAccelerator(torch.device(device), recipe.precision)
        self.task = build_task(recipe.task)
        check_control(self.task, recipe.model)
        outline, source, self.published = outlined(recipe.model, self.task, recipe.data.resolution)
        check_channels(self.task, outline)
        in_dtype_of_base(recipe.model, outline)  # before the adapters, which stay float32
        if recipe.memory.base == "cpu":
            keep_off_device(outline.denoiser.network, PretendCourier(self.fakes.device, self.meter))
        add_adapters(outline.denoiser, recipe, family(recipe.model.family).default_targets)
        if recipe.gradient_checkpointing:
            outline.denoiser.recompute_activations(checkpoint_on_cuda(self.meter.again))
        self.base_values = outline.parameters
        with self.meter:
            self.teacher = pretend_teacher(recipe.model, outline, source, self.fakes)
            self.teacher.stochasticity = stochasticity_of(recipe)
            self.examples = PretendExamples(self.teacher, self.task)
            self.parts = self._assembled()
            self.rollouts = PretendRollouts(
                self.recipe, self.teacher, self.task, self.examples, self.parts.distiller, self.accelerator
            )
            self.updater = Updater(self.recipe, self.parts, cast(Any, self.rollouts), cast(Any, self.accelerator))
        self.state = TrainingState()
        self.walked: dict[Any, list[dict[str, Moment]]] = {}

    def rehearsal(self) -> Rehearsal:
        """Return what all of the run needs, moment by moment, in the order of a run."""
        recipe, meter = self.recipe, self.meter
        beside: dict[str, Moment] = {}
        self._own_frozen()
        meter.leave(self._trained())
        stages = self.teacher.stages
        if recipe.encodes_in_stages:
            stages.begin()
        with meter, meter.moment("encoding") as beside["encoding"]:
            self._encode()
            preview = Preview(in_one_step(recipe), preview_rows(self.parts, recipe.preview.prompts))
        if not recipe.data.stream:
            self.teacher.release_encoders()
        if recipe.memory.offload:
            stages.enter(NETWORK)
        else:
            stages.end()
        self._own_trained()
        with meter, meter.moment("one pass") as one:
            self._one_pass()
        needed = self._needed(one)
        parts = {name: size for name, size in meter.live.items() if size and name != ACTIVATIONS}
        if recipe.trajectories.count:
            with meter, self.accelerator.autocast():
                self.rollouts.record()
            beside["recording"] = meter.moments["recording"]
        phases = [self._phase(section, one, needed, parts) for section in self.given.phases]
        averaged = self.parts.average.applied()
        with meter, meter.moment("preview") as beside["preview"], self.accelerator.autocast(), averaged:
            preview.columns()
        per_pass = one.flops / (GUIDED * recipe.batch_size)
        return Rehearsal(
            *(self.given, self.teacher.name, self.published, self.base_values, parts, self.waiting),
            *(phases, beside, per_pass, needed),
        )

    # -- the parts -----------------------------------------------------------------------------------------------

    def _assembled(self) -> Assembly:
        recipe = self.recipe
        discriminator = None
        if needs_discriminator(recipe):
            _, conditioning = self.examples.batch(torch.zeros(1, dtype=torch.long), self.accelerator.device)
            made = discriminator_of(self.teacher, conditioning, recipe, cast(Any, self.accelerator))
            self.fakes.module(made)
            discriminator = made
        perceptual = None
        if recipe.method.distillation == "lpips":
            perceptual = Lpips()
            self.fakes.module(perceptual)
            self.meter.own("LPIPS", perceptual.parameters(), weights=True)
        parts = join(
            *(recipe, self.teacher, self.task, self.examples, discriminator, perceptual),
            distiller_class=RehearsedDistiller,
            make_optimizer=pretend_adamw,
        )
        self.distiller = cast(RehearsedDistiller, parts.distiller)
        self.distiller.meter = self.meter
        return parts

    def _own_frozen(self) -> None:
        """Tell the meter what is loaded before training, and which parts are moved together."""
        own, teacher = self.meter.own, self.teacher
        teacher.stages = PretendStages(teacher.device, teacher.stages.groups, self.meter)
        network = teacher.denoiser.network
        waiting = waiting_weights(network)
        self.waiting = self.meter.wait_elsewhere("base", waiting)
        others = {id(value) for value in (*self._trained(), *waiting)}
        frozen = (value for value in network.parameters() if id(value) not in others)
        own("base", [*frozen, *network.buffers()], weights=True)
        if teacher.denoiser.control is not None:
            own("control", teacher.denoiser.control.network.parameters(), weights=True)
        own("VAE", teacher.vae.parameters(), weights=True)
        adapter: Any = teacher.image_adapter  # a stand-in without values
        if adapter is not None:
            own("image encoder", adapter.encoder.parameters(), weights=True)
            teacher.stages.groups[PICTURES] += (adapter.encoder,)
        for name, part in teacher.pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                own("text encoders", [*part.parameters(), *part.buffers()], weights=True)

    def _own_trained(self) -> None:
        """Tell the meter what training adds; each optimiser steps once, without a gradient, to make its state."""
        own, parts = self.meter.own, self.parts
        with self.meter:
            for learner, optimizer in parts.trained.optimizers.items():
                for value in parts.trained.parameters[learner].values():
                    value.grad = torch.zeros_like(value)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        names = {"student": "LoRA", "critic": "critic", "discriminator": "discriminator"}
        for learner, parameters in parts.trained.parameters.items():
            own(names[learner], parameters.values(), weights=True)
            states = parts.trained.optimizers[learner].state.values()
            own("optimisers", [value for state in states for value in state.values()])
        own("moving average", parts.average.tensors.values())

    def _trained(self) -> Iterator[Tensor]:
        for parameters in self.parts.trained.parameters.values():
            yield from parameters.values()

    # -- the moments ---------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        """Encode as many pictures and captions as the recipe takes at once."""
        count = self.recipe.data.encode_batch
        with torch.no_grad():
            self.teacher.encode_prompts([CAPTION] * count)
            shown = pictures(self.teacher, count)
            if self.recipe.reads_pictures:
                self.teacher.encode(shown.to(self.teacher.device))
            if self.task.has_conditions:
                conditions_of(self.task, self.teacher, shown)

    @torch.no_grad()
    def _one_pass(self) -> None:
        """Ask the teacher once for a batch with both branches of guidance."""
        denoiser = self.teacher.denoiser
        with self.accelerator.autocast(), denoiser.role("teacher"):
            denoiser.predict(*self._asked(GUIDED * self.recipe.batch_size))

    def _asked(self, count: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Return noisy latents, timesteps and conditions of so many samples."""
        z, conditioning = self.rollouts.inputs(count)
        t = torch.full((count,), self.teacher.denoiser.process.timestep(0.5), device=self.accelerator.device)
        return z, t, conditioning

    def _needed(self, one: Moment) -> PassWork:
        """Return what the passes of one sample ask of the base, without checkpointing, which ends no pass early."""
        denoiser, meter = self.teacher.denoiser, self.meter
        z, t, conditioning = self._asked(1)
        if self.recipe.gradient_checkpointing:
            denoiser.keep_activations()
        autocast = self.accelerator.autocast
        with meter, meter.moment("needed by the student") as student, autocast(), denoiser.role("student"):
            denoiser.predict(z, t, conditioning).sum().backward()
        with meter, meter.moment("needed for features") as features, autocast():
            maps = denoiser.features(z.requires_grad_(), t, conditioning)
        with meter, meter.moment("needed to the input") as back:
            torch.autograd.grad([value.float().sum() for value in maps], z)
        if self.recipe.gradient_checkpointing:
            denoiser.recompute_activations(checkpoint_on_cuda(meter.again))
        for value in self.parts.trained.parameters["student"].values():
            value.grad = None
        forward = of_base(one) / (GUIDED * self.recipe.batch_size)
        return PassWork(forward, of_base(student), of_base(features), of_base(features) + of_base(back))

    def _phase(self, section: PhaseSection, one: Moment, needed: PassWork, parts: Mapping[str, int]) -> PhaseCost:
        """Make an update whose samples start with as little noise as the phase has; if it matters, one with as much.

        Phases with the same terms share them.
        """
        modes = [index for index, weight in enumerate(section.modes) if weight]
        walked = (modes[-1], modes[0]) if self._depends_on_start() else (modes[-1],)
        weights = {**section.phase().__dict__, "modes": ()}
        key = (walked, tuple(name for name, weight in weights.items() if weight), section.first_step_distillation)
        if key not in self.walked:
            self.walked[key] = [self._update(section, mode) for mode in walked]
        clean, noisy = self.walked[key][0], self.walked[key][-1]
        share = self._first_step_share(section)
        passes = update_passes(self.given, section)
        solved = sum(passes.get(name, 0.0) for name in ("trajectories", "solutions", "own states"))

        def expected(value: Callable[[Moment], float]) -> float:
            sums = [sum(value(moment) for key, moment in part.items() if key != ROLLOUT) for part in (clean, noisy)]
            in_one_pass = value(one) / (GUIDED * self.recipe.batch_size)
            return sums[0] * (1 - share) + sums[1] * share + solved * in_one_pass

        kinds = dict.fromkeys(kind for part in (clean, noisy) for moment in part.values() for kind in moment.work)
        return PhaseCost(
            section.name,
            section.updates,
            highest(clean, noisy),
            expected(lambda moment: moment.flops),
            expected(lambda moment: moment.moved),
            expected(lambda moment: moment.crossed),
            sum(passes.values()),
            {kind: expected(lambda moment, kind=kind: moment.work.get(kind, 0)) for kind in kinds},  # type: ignore[misc]
            floor_of(self.given, section, needed, {**parts, "base": parts["base"] + self.waiting}),
        )

    def _depends_on_start(self) -> bool:
        """Return True where what an update computes depends on how noisy its samples start."""
        method = self.recipe.method
        return "first_step" in (method.adversarial_rows, method.dmd.rows, method.feature_rows) or (
            method.states.student + method.states.trajectory > 0
        )

    def _update(self, section: PhaseSection, mode: int) -> dict[str, Moment]:
        """Make one update, all of whose samples start at a mode."""
        meter = self.meter
        self.distiller.start = mode * self.recipe.method.teacher_steps // NUM_MODES
        meter.moments = {}
        with meter, meter.moment(OPTIMISER):
            self.updater.update(self.state, section, 1.0)
        return meter.moments

    def _first_step_share(self, section: PhaseSection) -> float:
        """Return the share of samples that start in the noisiest tenth of the schedule, where some terms act."""
        steps = self.given.method.teacher_steps
        shares = timestep_mixture(steps, section.modes).tolist()
        fractions = trailing_fractions(steps)
        return float(sum(share for share, at in zip(shares, fractions, strict=True) if at > FIRST_STEP_FRACTION))
