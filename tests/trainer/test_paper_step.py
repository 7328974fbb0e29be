"""The benchmark against the paper's training step: what each of the two asks its network for, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from flash_diffusion.benchmarks import paper_step
from flash_diffusion.benchmarks.paper_step import STARTS, WIDTH, OurStep, PaperStep
from flash_diffusion.trainer.teachers.families.stable_diffusion import UNetDenoiser

STEPS = 4 + 4 + 3 + 2 + 1  # of the teacher in five updates with K = 4


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give the benchmark a tiny network; return a list that gets the samples of each call."""

    def tiny() -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )

    samples: list[int] = []
    original = UNetDenoiser.predict

    def counted(self: UNetDenoiser, z_t: torch.Tensor, *arguments: Any) -> torch.Tensor:
        samples.append(len(z_t))
        return original(self, z_t, *arguments)

    monkeypatch.setattr(paper_step, "network", tiny)
    monkeypatch.setattr(UNetDenoiser, "predict", counted)
    return samples


def test_the_papers_step_solves_twice_and_asks_for_each_branch_alone(asked: list[int]) -> None:
    """For each optimiser: a rollout, the student. Then hidden states: one fake, later fake and real; DMD: three."""
    step = PaperStep(batch=2, steps=4)
    before = [value.clone() for value in step.student.adapter_parameters("student").values()]
    asked.clear()
    for _ in STARTS:
        step.update()
    assert set(asked) == {2}  # no call holds both branches of guidance, nor fake and real
    assert len(asked) == 2 * 2 * STEPS + len(STARTS) * (2 + 1 + 2 + 3)
    after = step.student.adapter_parameters("student").values()
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not any(".lora_" in name for name, _ in step.teacher.network.named_parameters())


def test_our_step_has_the_same_starts_and_one_rollout(asked: list[int]) -> None:
    """Ten samples go twice through the five starts; each then costs student, fake, real and DMD's three."""
    step = OurStep(batch=2, steps=4)
    asked.clear()
    for _ in STARTS:
        step.update()
    assert sum(asked) == 2 * 2 * STEPS + 10 * (1 + 1 + 1 + 3)
    asked.clear()
    recorded = step.record(4)
    assert sum(asked) == 4 * 2 * 4
    asked.clear()
    step.update(recorded.rows(torch.arange(2)))
    assert sum(asked) == 2 * (1 + 1 + 1 + 3)
