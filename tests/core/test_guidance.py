"""Guidance without passes that change nothing: the same results as guiding all, and fewer passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_diffusion.flash_core.denoiser import Conditioning, Denoiser, guided_z0, predict_z0
from flash_diffusion.flash_core.distiller import Distiller, DistillerSettings, DmdSettings, Phase
from flash_diffusion.flash_core.passes.asking import asked_by
from flash_diffusion.flash_core.passes.counting import CountedDenoiser
from flash_diffusion.flash_core.passes.guidance import guided_rows, is_guided
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess
from flash_diffusion.flash_core.rollout import Rollout
from flash_diffusion.flash_core.terms.distribution_matching import real_and_fake
from flash_diffusion.flash_core.terms.segments import guided_by_teacher

from .helpers.networks import AdapterDenoiser, ScriptedDenoiser, process_name, processes


def noise(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, 2, 2, generator=torch.Generator().manual_seed(seed))


def conditions(batch: int, value: float) -> Conditioning:
    return Conditioning(vector=torch.full((batch, 1), value) + torch.arange(batch)[:, None] / 10)


@pytest.mark.parametrize("process", processes(), ids=process_name)
@pytest.mark.parametrize("rows", [[], [1], [0, 2, 3], [0, 1, 2, 3], None])
def test_samples_of_scale_1_need_no_unconditional_pass(process: Process, rows: list[int] | None) -> None:
    """Guiding a sample by 1 is its conditional prediction, so leaving it out of the second branch changes nothing."""
    denoiser = CountedDenoiser(AdapterDenoiser.seeded(process))
    t = torch.tensor([process.timestep(fraction) for fraction in (0.9, 0.5, 0.3, 0.1)])
    scale = torch.tensor([4.0 if rows is None or row in rows else 1.0 for row in range(4)])
    parts = noise(4), t, conditions(4, 0.3), conditions(4, -1.0), scale
    whole = guided_z0(denoiser, *parts)
    denoiser.forget()
    with asked_by("guided"):
        part = guided_z0(denoiser, *parts, rows)
    assert torch.allclose(part, whole, rtol=1e-6, atol=1e-6)
    guided = 4 if rows is None else len(rows)
    assert denoiser.counts == {"guided": 4 + guided}
    assert sum(denoiser.unconditional.values()) == guided


@pytest.mark.parametrize("process", [VPProcess.from_betas(), FlowProcess(shift=3.0)], ids=process_name)
def test_the_teacher_is_guided_on_the_interval_alone(process: Process) -> None:
    """Against a network that is guided by hand at the grid's inner half: t of 8 steps are 999, 874, ..., 124."""
    solver = "euler" if process.kind == "flow" else "ddim"
    settings = DistillerSettings(teacher_steps=8, solver=solver, guidance_interval=(250, 750))
    denoiser = CountedDenoiser(AdapterDenoiser.seeded(process))
    distiller = Distiller(denoiser, settings)
    parts = noise(3), conditions(3, 0.3), conditions(3, -1.0), torch.full((3,), 5.0)
    found = distiller.teacher_solution(*parts, [0, 2, 6])
    steps = (1, 1, 2, 2, 2, 2, 1, 1)  # 749, 624, 499 and 374 are inside
    assert sum(denoiser.counts.values()) == sum(sum(steps[start:]) for start in (0, 2, 6))

    class Guided:
        """The teacher with guidance inside its prediction."""

        def __init__(self) -> None:
            self.process = process
            self.role = denoiser.role

        def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            inside = torch.tensor([2 <= round(8 * (1 - process.fraction(value))) < 6 for value in t.tolist()])
            scale = torch.where(inside, 5.0, 1.0)
            half = conditioning.vector[: len(z_t)]  # type: ignore[index]
            empty = Conditioning(vector=half - 1.3)
            z0 = guided_z0(denoiser, z_t, t, conditioning, empty, scale)
            return process.output_from_z0(z_t, z0, t)

    plain = Distiller(Guided(), DistillerSettings(teacher_steps=8, solver=solver, guidance=(1, 1)))  # type: ignore[arg-type]
    wanted = plain.teacher_solution(*parts[:3], torch.ones(3), [0, 2, 6])
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_rows_are_those_on_the_interval() -> None:
    process = VPProcess.from_betas()
    times = [999.0, 500.0, 10.0]
    assert guided_rows(DistillerSettings(), process, times) is None
    assert guided_rows(DistillerSettings(guidance=(1, 1)), process, times) == []
    assert guided_rows(DistillerSettings(guidance=(1, 1)), process, times, (3, 3)) is None
    inside = DistillerSettings(guidance_interval=(10, 500))
    assert guided_rows(inside, process, times) == [1, 2]
    assert guided_rows(inside, process, times, (1, 1)) == []
    assert [is_guided(inside, process, t) for t in (9, 10, 500, 501)] == [False, True, True, False]


@pytest.mark.parametrize("process", [VPProcess.from_betas(), FlowProcess(shift=3.0)], ids=process_name)
@pytest.mark.parametrize("dmd", [DmdSettings(), DmdSettings(form="trajectory")], ids=lambda dmd: dmd.form)
def test_guidance_on_an_interval_reads_nothing_back_from_the_device(process: Process, dmd: DmdSettings) -> None:
    """Tensors on the device ``meta`` have no values, so reading one back raises an error."""
    settings = DistillerSettings(teacher_steps=4, guidance_interval=(300, 800), dmd=dmd, fake_score="critic")
    counted = CountedDenoiser(ScriptedDenoiser(process, dict.fromkeys(("teacher", "critic"), lambda z, t, c: z)))
    z = torch.empty(16, 4, 2, 2, device="meta")
    starts = tuple(process.timestep(fraction) for fraction in (1, 0.75, 0.5, 0.25) for _ in range(4))
    parts = conditions(16, 0.3).to("meta"), conditions(16, -1.0).to("meta")
    rollout = Rollout(z, torch.tensor(starts).to("meta"), z, z, torch.empty(16, device="meta"), *parts, starts)
    with counted.role("teacher"), asked_by("dmd"):
        real_and_fake(counted, settings, z, rollout, torch.Generator().manual_seed(0))
    assert 0 < sum(counted.unconditional.values()) < 16
    counted.forget()
    with counted.role("teacher"), asked_by("intra segment"):
        guided_by_teacher(counted, settings, rollout)
    assert sum(counted.unconditional.values()) == 8  # 749 and 499 are inside


def test_a_step_of_an_unguided_teacher_asks_once_for_each_sample() -> None:
    """Solutions, real score and intra-segment guidance: nothing is asked without a condition."""
    settings = DistillerSettings(teacher_steps=4, guidance=(1, 1), dmd=DmdSettings())
    counted = CountedDenoiser(AdapterDenoiser.seeded(VPProcess.from_betas()))
    distiller, generator = Distiller(counted, settings), torch.Generator().manual_seed(0)
    phase = Phase(modes=(1, 1, 1, 1), dmd=1.0, intra_segment=0.1)
    rollout = distiller.rollout(noise(5), conditions(5, 0.3), conditions(5, -1.0), phase, generator)
    left = sum(4 - distiller.timesteps.index(t) for t in rollout.t.tolist())
    distiller.student_step(rollout, phase, generator)
    assert counted.counts == {"solutions": left, "student": 3 * 5, "dmd": 2 * 5, "intra segment": 2 * 5}
    assert not sum(counted.unconditional.values())


def test_counting_changes_nothing() -> None:
    bare: Denoiser = AdapterDenoiser.seeded(VPProcess.from_betas())
    parts = noise(2), torch.tensor([999, 249]), conditions(2, 0.1)
    with bare.role("student"):
        wanted = predict_z0(bare, *parts)
    counted = CountedDenoiser(bare)
    with counted.role("student"), asked_by("student"):
        assert torch.equal(predict_z0(counted, *parts), wanted)
        with torch.no_grad():
            counted.features(*parts)
    assert counted.counts == {"student": 3 * 2 + 2}
    counted.forget("student")
    assert not counted.counts
