"""A style LoRA of the demo: trained for a moment, written as people write them, and read back."""

from __future__ import annotations

from pathlib import Path

import torch

from flash_diffusion.flash_core.lora import base_of, read_lora
from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.config import DataSection, ModelSection, TaskSection
from flash_diffusion.trainer.data.encoding.prepare import prepare_examples
from flash_diffusion.trainer.demo.making.adapters.training import AdapterTraining
from flash_diffusion.trainer.demo.shards import shard_path
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher


def test_style_command_writes_an_ordinary_lora(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    options = ["--updates", "3", "--rank", "2", "--batch-size", "2", "--limit", "3", "--output", str(path)]
    assert main(["demo", "style", "noto", *options]) == 0
    lora = read_lora(path)
    assert lora.metadata is None  # no Flash LoRA
    assert base_of(lora) == "flash-demo"
    assert (lora.ranks, lora.alphas, lora.dialect) == ((2,), (2.0,), "kohya")
    assert lora.header["modelspec.license"] == "Apache-2.0"
    assert int(lora.header["style.updates"]) > 0


def test_the_loss_on_the_style_falls() -> None:
    teacher = load_teacher(ModelSection(family="demo"))
    data = DataSection(source="webdataset", path=shard_path("noto"), limit=2)
    task = build_task(TaskSection())
    examples = prepare_examples(data, teacher, task)
    training = AdapterTraining(teacher, examples, task, rank=2, batch_size=4, lr=3e-3, seed=0)
    assert set(training.parameters) == set(teacher.denoiser.adapter_parameters("student"))

    def loss() -> float:
        generator = torch.Generator().manual_seed(1)
        z0, conditioning = examples.batch(torch.tensor([0, 1, 0, 1]), "cpu")
        process, t = teacher.denoiser.process, torch.tensor([100, 300, 500, 700])
        noise = torch.randn(z0.shape, generator=generator)
        with torch.no_grad(), teacher.denoiser.role("student"):
            output = teacher.denoiser.predict(process.add_noise(z0, noise, t), t, conditioning)
        return float(torch.nn.functional.mse_loss(output, process.target(z0, noise, t)))

    before = loss()
    for _ in range(25):
        training.update(0.0)
    assert loss() < 0.9 * before
