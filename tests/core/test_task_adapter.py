"""Task adapters: written files read back, and merged weights equal base + LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flash_diffusion.flash_core.lora import LoraError, LoraModule
from flash_diffusion.flash_core.task_adapter import (
    TaskAdapter,
    read_task_adapter,
    with_task_adapter,
    write_task_adapter,
)


def adapter(seed: int = 0) -> TaskAdapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    modules = {
        "mid_attn_to_q": LoraModule("mid.attn.to_q", draw(2, 6), draw(8, 2), alpha=4.0),
        "down_conv1": LoraModule("down.conv1", draw(2, 4, 3, 3), draw(8, 2, 1, 1), alpha=2.0),
    }
    return TaskAdapter(
        "inpainting", draw(8, 3, 3, 3), modules, {"masks": {"box": 1.0}}, {"flash.training.updates": "7"}
    )


def base() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    shapes = {
        "conv_in.weight": (8, 4, 3, 3),
        "conv_in.bias": (8,),
        "mid.attn.to_q.weight": (8, 6),
        "down.conv1.weight": (8, 4, 3, 3),
        "norm.weight": (8,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_written_files_read_back(tmp_path: Path) -> None:
    path = tmp_path / "made" / "adapter.safetensors"
    write_task_adapter(path, adapter(), torch.float32)
    found = read_task_adapter(path)
    assert (found.task, found.options, found.extra_channels) == ("inpainting", {"masks": {"box": 1.0}}, 3)
    assert found.facts == {"flash.training.updates": "7"}
    torch.testing.assert_close(found.channels, adapter().channels)
    weights, again = with_task_adapter(base(), adapter()), with_task_adapter(base(), found)
    for name, value in weights.items():
        torch.testing.assert_close(value, again[name])
    assert sorted(file.name for file in path.parent.iterdir()) == ["adapter.safetensors"]


def test_merged_weights_equal_base_plus_lora() -> None:
    weights, merged, added = base(), with_task_adapter(base(), adapter()), adapter()
    z, extra = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5)
    together = F.conv2d(torch.cat([z, extra], 1), merged["conv_in.weight"], merged["conv_in.bias"], padding=1)
    apart = F.conv2d(z, weights["conv_in.weight"], weights["conv_in.bias"], padding=1)
    torch.testing.assert_close(together, apart + F.conv2d(extra, added.channels, padding=1), atol=1e-4, rtol=1e-4)
    x, linear = torch.randn(3, 6), added.modules["mid_attn_to_q"]
    update = 2.0 * F.linear(F.linear(x, linear.down), linear.up)  # alpha 4 over rank 2
    torch.testing.assert_close(
        F.linear(x, merged["mid.attn.to_q.weight"]), F.linear(x, weights["mid.attn.to_q.weight"]) + update
    )
    conv = added.modules["down_conv1"]
    update = F.conv2d(F.conv2d(z, conv.down, padding=1), conv.up)
    plain = F.conv2d(z, weights["down.conv1.weight"], padding=1)
    torch.testing.assert_close(
        F.conv2d(z, merged["down.conv1.weight"], padding=1), plain + update, atol=1e-4, rtol=1e-4
    )
    assert torch.equal(weights["conv_in.weight"], base()["conv_in.weight"])
    assert merged["norm.weight"] is weights["norm.weight"] or torch.equal(merged["norm.weight"], weights["norm.weight"])


def test_the_base_keeps_its_type() -> None:
    halves = {name: value.bfloat16() for name, value in base().items()}
    assert {value.dtype for value in with_task_adapter(halves, adapter()).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("conv_in.weight", (16, 4, 3, 3), ["conv_in.weight", "(16, 4, 3, 3)"]),
        ("mid.attn.to_q.weight", (8, 7), ["mid.attn.to_q", "(8, 7)", "(8, 6)"]),
        ("down.conv1.weight", None, ["down.conv1", "no such layer"]),
    ],
)
def test_another_base_raises_an_error(name: str, shape: tuple[int, ...] | None, words: list[str]) -> None:
    weights = base()
    if shape is None:
        del weights[name]
    else:
        weights[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match="use the base") as caught:
        with_task_adapter(weights, adapter())
    for word in words:
        assert word in str(caught.value)


def test_other_files_raise_an_error(tmp_path: Path) -> None:
    save_file({"conv_in.extra": torch.zeros(2, 1, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(LoraError, match="not a task adapter"):
        read_task_adapter(tmp_path / "other.safetensors")
    header = {"flash.task_adapter": "1", "flash.task": "inpainting", "flash.task_options": "{}"}
    half = {"conv_in.extra": torch.zeros(2, 1, 3, 3), "mid.lora_down": torch.zeros(2, 3)}
    save_file(half, tmp_path / "half.safetensors", metadata=header)
    with pytest.raises(LoraError, match="mid has no up half"):
        read_task_adapter(tmp_path / "half.safetensors")
