"""Teachers of further tasks: the demo's base with a task adapter, trained, written, and loaded by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.task_adapter import TaskAdapter, write_task_adapter
from flash_diffusion.trainer.config import DataSection, ModelSection, TaskSection, parse_recipe
from flash_diffusion.trainer.data.encoding.prepare import prepare_examples
from flash_diffusion.trainer.demo.making.adapters.task_teacher import TaskTraining
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher, outline_teacher
from flash_diffusion.trainer.teachers.base import Teacher
from flash_diffusion.trainer.teachers.conditions.task_adapters import widened

from ..families.networks import tiny_network

SECTION = TaskSection(name="inpainting", variants=2, options={"masks": {"box": 1.0}})


def asked(teacher: Teacher, channels: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """What a network can be asked: noisy latents, timesteps, and conditions with extra channels."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(2, *teacher.latent_shape, generator=generator)
    concat = torch.randn(2, channels, *teacher.latent_shape[1:], generator=generator)
    text = teacher.unconditional(2)
    return z, torch.tensor([900, 100]), text.joined(Conditioning(concat=concat)) if channels else text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A few updates of a task teacher, its file, and what it answers before and after."""
    teacher = load_teacher(ModelSection(family="demo"))
    task = build_task(SECTION)
    examples = prepare_examples(DataSection(source="demo", limit=4), teacher, task, 2)
    with torch.no_grad():
        base = teacher.denoiser.predict(*asked(teacher, 0))
    training = TaskTraining(teacher, examples, task, rank=2, batch_size=4, lr=1e-3, seed=0)
    channels = training.channels.shape[1]
    with torch.no_grad(), teacher.denoiser.role("student"):
        untrained = teacher.denoiser.predict(*asked(teacher, channels))
    losses = [float(training.update(0.0)) for _ in range(3)]
    with torch.no_grad(), teacher.denoiser.role("student"), training.average.applied():
        answer = teacher.denoiser.predict(*asked(teacher, channels))
    path = tmp_path_factory.mktemp("tasks") / "inpainting.safetensors"
    write_task_adapter(path, training.adapter(SECTION, {"flash.training.updates": "3"}), torch.float32)
    return path, {"base": base, "untrained": untrained, "answer": answer, "losses": losses, "channels": channels}


def test_new_channels_change_nothing_before_training(trained: tuple[Path, dict[str, Any]]) -> None:
    _, found = trained
    torch.testing.assert_close(found["untrained"], found["base"], atol=1e-5, rtol=1e-5)
    assert all(loss > 0 for loss in found["losses"])
    assert float((found["answer"] - found["base"]).abs().max()) > 1e-4


def test_recipe_loads_the_trained_task_adapter(trained: tuple[Path, dict[str, Any]]) -> None:
    path, found = trained
    model = ModelSection(family="demo", task_adapter=str(path))
    teacher = load_teacher(model)
    assert teacher.latent_shape == (16, 16, 16)
    with torch.no_grad():
        answer = teacher.denoiser.predict(*asked(teacher, found["channels"]))
    torch.testing.assert_close(answer, found["answer"], atol=1e-4, rtol=1e-4)
    assert teacher.weights_hash() != load_teacher(ModelSection(family="demo")).weights_hash()
    outline = outline_teacher(model)
    assert outline.denoiser.network.config["in_channels"] == 16 + found["channels"]
    assert next(outline.denoiser.network.parameters()).is_meta


def test_a_network_of_default_width_is_widened() -> None:
    """diffusers replaces what its configuration calls a default, unless it is told otherwise."""
    plain = tiny_network("sd15")
    extra = torch.randn(32, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    wide = widened(plain, TaskAdapter("inpainting", extra, {}), "a tiny SD 1.5")
    assert wide.config["in_channels"] == 9
    assert torch.equal(wide.conv_in.weight[:, :4], plain.conv_in.weight)
    assert torch.equal(wide.conv_in.weight[:, 4:], extra)
    with pytest.raises(UserError, match="no UNet"):
        widened(tiny_network("sd3"), TaskAdapter("inpainting", extra, {}), "a tiny SD3")


def recipe(path: Path | None, **task: Any) -> dict[str, Any]:
    return {
        "model": {"family": "demo", **({} if path is None else {"task_adapter": str(path)})},
        "data": {"source": "demo", "limit": 3},
        "task": {"name": "inpainting", "variants": 2, **task},
        "lora": {"rank": 2},
        "method": {"teacher_steps": 4, "guidance": [2, 3]},
        "phases": [{"name": "all", "updates": 2, "modes": [1, 1, 1, 1], "adversarial": 0.1, "dmd": 0.1}],
        "batch_size": 2,
        "preview": {"every": 0, "steps": [1]},
    }


def test_distill_command_accepts_the_task_adapter(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from flash_diffusion.flash_core.lora import read_lora

    lora = read_lora(distil(parse_recipe(recipe(trained[0])), tmp_path / "run"))
    assert lora.metadata is not None
    assert lora.metadata.task == "inpainting"
    assert list((tmp_path / "run" / "previews").glob("*.webp"))


def test_task_refuses_a_model_of_another_task(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a model that reads 33 channels .* reads 16"):
        distil(parse_recipe(recipe(None)), tmp_path / "without")
    with pytest.raises(UserError, match="super-resolution needs a model that reads 32 channels .* reads 33"):
        distil(parse_recipe(recipe(trained[0], name="super-resolution")), tmp_path / "other")
    with pytest.raises(UserError, match=r"task_adapter.*'no-such'.*one of the demo's"):
        load_teacher(ModelSection(family="demo", task_adapter="no-such"))
