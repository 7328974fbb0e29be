"""LoRAs of the trainer's export work in ComfyUI: every layer is patched, and the output equals diffusers'.

This holds for this extension's loader and for core's, on the same tiny weights of every family.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.lora import FlashMetadata, write_lora
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess
from flash_diffusion.trainer.export.export import lora_modules
from flash_diffusion.trainer.teachers import family as teacher_of

from ..families.networks import POOLED_WIDTH, SD3_POOLED_WIDTH, TEXT_WIDTH, tiny_network
from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

FAMILIES = ("sd15", "sd21", "sdxl", "pixart_alpha", "pixart_sigma", "sd3", "sd35")
RANK, ALPHA = 4, 6.0
TOKENS = 7


@dataclass(frozen=True)
class Case:
    """One family in both worlds.

    Attributes:
        answer: the counts of the script in ComfyUI's process.
        expected: the output of diffusers with PEFT.
        outputs: ComfyUI's outputs: ``bare``, ``ours``, ``core``.
        total: the number of the LoRA's layers.
    """

    answer: dict[str, Any]
    expected: Tensor
    outputs: dict[str, Tensor]
    total: int


def conditions(family: str, network: nn.Module, generator: torch.Generator) -> tuple[Conditioning, dict[str, Tensor]]:
    """Return the same conditions for diffusers and for ComfyUI's model, with the argument names of each."""
    text = torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator)
    if family == "sdxl":
        vector = torch.randn(2, POOLED_WIDTH, generator=generator)
        sizes = torch.tensor([[512.0, 768.0, 0.0, 16.0, 512.0, 768.0]] * 2)
        embedded = network.add_time_proj(sizes.flatten()).reshape(2, -1)
        arguments = {"context": text, "y": torch.cat([vector, embedded], dim=1)}
        return Conditioning(cross_attention=text, vector=vector, size_ids=sizes), arguments
    if family == "pixart_alpha":
        sizes = torch.tensor([[320.0, 384.0, 320 / 384]] * 2)
        arguments = {"context": text, "c_size": sizes[:, :2].contiguous(), "c_ar": sizes[:, 2:].contiguous()}
        return Conditioning(cross_attention=text, size_ids=sizes), arguments
    if family in ("sd3", "sd35"):
        vector = torch.randn(2, SD3_POOLED_WIDTH, generator=generator)
        return Conditioning(cross_attention=text, vector=vector), {"context": text, "y": vector}
    return Conditioning(cross_attention=text), {"context": text}


def prepare(family: str, folder: Path) -> tuple[Tensor, int]:
    """Write the script's inputs; return diffusers' output with the adapter, and the number of its layers."""
    network = tiny_network(family)
    generator = torch.Generator().manual_seed(1)
    teacher = teacher_of(family)
    flow = family in ("sd3", "sd35")
    process: Process = FlowProcess(3.0) if flow else VPProcess.from_betas()
    (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
    save_file(network.state_dict(), folder / f"{family}-weights.safetensors")

    conditioning, arguments = conditions(family, network, generator)
    # The two PixArts place their patches alike only near the sample size of 64.
    shape = (4, 40, 48) if family.startswith("pixart") else (16 if flow else 4, 8, 16)
    z, t = torch.randn(2, *shape, generator=generator), torch.tensor([749.0, 249.0])
    save_file({"z": z, "t": t, **arguments}, folder / f"{family}-inputs.safetensors")

    denoiser = teacher.denoiser_class(network, process)
    denoiser.add_adapter("student", RANK, ALPHA, teacher.default_targets)
    parameters = denoiser.adapter_parameters("student")
    with torch.no_grad():
        for value in parameters.values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        with denoiser.role("student"):
            expected = denoiser.predict(z, t, conditioning)
    modules = lora_modules(parameters, ALPHA)
    timesteps = {1: (process.timestep(1.0),)}
    metadata = FlashMetadata(teacher.base, process.prediction, "flow" if flow else "vp", timesteps)
    write_lora(folder / f"{family}-lora.safetensors", modules, metadata, transformer=teacher.transformer)
    return expected, len(modules)


@pytest.fixture(scope="module")
def cases(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Run every family in one process with ComfyUI."""
    folder = tmp_path_factory.mktemp("exports")
    prepared = {family: prepare(family, folder) for family in FAMILIES}
    printed = run_inside(runtime, "exports.py", folder)
    answers = json.loads(printed.splitlines()[-1])
    return {
        family: Case(answers[family], expected, load_file(folder / f"{family}-outputs.safetensors"), total)
        for family, (expected, total) in prepared.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_patched(cases: dict[str, Case], family: str) -> None:
    answer, total = cases[family].answer, cases[family].total
    assert total > 10
    assert answer["complete"]
    assert (answer["matched"], answer["ours"], answer["core"]) == (total,) * 3
    assert answer["log"] == []


@pytest.mark.parametrize("loader", ["ours", "core"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_equals_diffusers(cases: dict[str, Case], family: str, loader: str) -> None:
    case = cases[family]
    assert float((case.outputs["bare"] - case.expected).abs().max()) > 0.05
    torch.testing.assert_close(case.outputs[loader], case.expected, atol=1e-4, rtol=0)
