"""The schedule of discriminator and critic: warm-up, updates of each, memory, alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.distiller import Distiller
from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.data.batches.memory import OutputMemory
from flash_diffusion.trainer.distill.loop import Run


def conditions(*values: float) -> Conditioning:
    """Conditions that carry a number for each sample."""
    return Conditioning(vector=torch.tensor(values)[:, None], residuals=(torch.tensor(values)[:, None, None, None],))


def outputs(*values: float, size: int = 2) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, size, size).clone()


def test_memory_keeps_the_last_outputs_with_their_conditions() -> None:
    memory, generator = OutputMemory(3), torch.Generator().manual_seed(0)
    memory.add(outputs(1.0, 2.0), conditions(1, 2))
    memory.add(outputs(), conditions())
    memory.add(outputs(3.0, 4.0), conditions(3, 4))  # 1 goes
    assert len(memory) == 3
    z, drawn = memory.draw(300, generator)
    assert z.shape == (300, 1, 2, 2)
    assert torch.equal(z[:, 0, 0, 0], drawn.vector[:, 0])
    assert torch.equal(z[:, :, :1, :1], drawn.residuals[0])
    counts = {value: int((z[:, 0, 0, 0] == value).sum()) for value in (2, 3, 4)}
    assert sum(counts.values()) == 300
    assert all(70 < count < 130 for count in counts.values())
    # What a checkpoint holds gives the same draws.
    again = OutputMemory(3)
    again.restore(memory.state(), torch.device("cpu"))
    one, two = (part.draw(8, torch.Generator().manual_seed(1)) for part in (memory, again))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1].vector, two[1].vector)


def test_memory_draws_outputs_of_one_size() -> None:
    memory, generator = OutputMemory(9), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="memory is empty"):
        memory.draw(1, generator)
    memory.add(outputs(1.0, 2.0, 3.0), conditions(1, 2, 3))
    memory.add(outputs(4.0, size=3), conditions(4))
    sizes = [memory.draw(2, generator)[0] for _ in range(200)]
    large = [z for z in sizes if z.shape[-1] == 3]
    assert 25 < len(large) < 75  # one output of four
    assert all((z == 4).all() for z in large)


def test_discriminator_and_critic_learn_alone_first_and_as_often_as_the_recipe_says(
    recipe_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_content["method"] |= {
        "fake_score": "critic",
        "discriminator": {"updates": 2, "warmup": 1},
        "critic": {"updates": 3, "warmup": 4, "memory": 6, "ida": 0.25},
    }
    run = Run(parse_recipe(recipe_content), tmp_path, Accelerator(), None)
    made: list[str] = []
    seen: list[Tensor] = []
    for name in ("student_step", "discriminator_step", "critic_step"):
        original = getattr(Distiller, name)

        def counted(self: Distiller, *arguments: Any, name: str = name, original: Any = original) -> Any:
            made.append(name.removesuffix("_step")[0])
            if name == "critic_step":
                seen.append(arguments[0])
            return original(self, *arguments)

        monkeypatch.setattr(Distiller, name, counted)
    parts, aligned = run.parts.trained.parameters, run.updater._align_critic
    # Both LoRAs begin with the same random half, so that mixing the halves mixes the products.
    assert all(torch.equal(*pair) for pair in zip(parts["student"].values(), parts["critic"].values(), strict=True))

    def checked() -> None:
        before = [value.clone() for value in parts["critic"].values()]
        aligned()
        for old, new, student in zip(before, parts["critic"].values(), parts["student"].values(), strict=True):
            torch.testing.assert_close(new.detach(), 0.75 * old + 0.25 * student.detach())

    monkeypatch.setattr(run.updater, "_align_critic", checked)
    run.train()
    assert "".join(made) == "ss" + "dcccc" + "sddccc" * 3  # phase 1 trains the student alone
    assert run.state.warmed_up == {"discriminator": 1, "critic": 4}
    assert run.state.position == 2 * (2 + 4 + 3)  # warm-up takes samples of its own
    assert [len(z) for z in seen] == [2] * len(seen)
    assert len(run.updater.memory) == 6


def test_a_phase_scales_the_students_rate_alone(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    """A factor of 1/4 in the phase is a quarter of optimizer.lr, bit by bit; the heads keep theirs."""
    recipe_content["phases"] = [dict(recipe_content["phases"][-1], updates=2)]
    ends = []
    for name, rate, factor in (("whole", 2e-3, 0.25), ("quarter", 5e-4, 1.0)):
        recipe_content["optimizer"] = {"lr": rate, "discriminator_lr": 1e-3}
        recipe_content["phases"][0]["learning_rate"] = factor
        run = Run(parse_recipe(recipe_content), tmp_path / name, Accelerator(), None)
        run.train()
        ends.append(run.parts.trained.parameters)
    for learner, parameters in ends[0].items():
        for one, other in zip(parameters.values(), ends[1][learner].values(), strict=True):
            assert torch.equal(one, other), learner
