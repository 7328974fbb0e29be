"""The student's outputs beside the teacher's: which samples count, and that nothing waits for the device."""

from __future__ import annotations

import pytest
import torch

from flash_diffusion.flash_core.process import VPProcess
from flash_diffusion.flash_core.terms.drift import output_figures

VP = VPProcess(torch.linspace(0.999, 0.005, 1000), "epsilon")


def test_diversity_is_that_of_neighbours_at_pure_noise() -> None:
    process, z = VP, torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([999.0, 999.0, 999.0, 499.0])
    figures = output_figures(process, t, 0.5 * z, z)
    pairs = [(z[row] - z[row - 1]).square().mean().sqrt() for row in (1, 2)]
    assert figures["teacher_diversity"].item() == pytest.approx((sum(pairs) / 4).item(), rel=1e-6)
    assert figures["student_diversity"].item() == pytest.approx(0.5 * figures["teacher_diversity"].item(), rel=1e-6)
    assert output_figures(process, t.clamp(max=499), z, z)["teacher_diversity"] == 0
    assert set(output_figures(process, t[:1], z[:1], z[:1])) == {
        "student_error",
        "student_contrast",
        "teacher_contrast",
    }


def test_the_figures_of_outputs_wait_for_no_device() -> None:
    """Tensors without data raise where a number of theirs is read."""
    nothing = torch.empty(4, 2, 3, 3, device="meta")
    figures = output_figures(VP, torch.empty(4, device="meta"), nothing, nothing)
    assert all(value.shape == () and value.is_meta for value in figures.values())
