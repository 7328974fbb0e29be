"""Weights in few bits: the products and gradients of the rounded weights, fewer bytes, a LoRA as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.trainer.config import ModelSection, parse_recipe
from flash_diffusion.trainer.distill.assembly import assemble
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.in_memory.compact import SCHEMES, store_compactly


class Network(nn.Module):
    """Two layers in a block, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1, groups=2, bias=False))
        self.block = nn.Linear(8, 5)
        self.proj_out = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.proj_out(self.block(self.blocks(x).mean((2, 3))))
        return out


def rounded(weight: torch.Tensor, name: str) -> torch.Tensor:
    """A weight as a scheme keeps it."""
    scheme = SCHEMES[name]
    return scheme.decode(*scheme.encode(weight), weight.shape, torch.float32)


@pytest.mark.parametrize("name", SCHEMES)
def test_products_and_gradients_are_those_of_the_rounded_weights(name: str) -> None:
    torch.manual_seed(0)
    compact, plain = Network(), Network()
    store_compactly(compact, name)
    for path, layer in compact.named_modules():
        if hasattr(layer, "scheme"):
            rounded = layer.scheme.decode(layer.weight, layer.weight_scale, layer.shape, torch.float32)
            plain.get_submodule(path).load_state_dict(
                {"weight": rounded} | ({} if layer.bias is None else {"bias": layer.bias})
            )
    plain.proj_out.load_state_dict(compact.proj_out.state_dict())
    inputs, results = torch.randn(2, 3, 9, 9), []
    for network in (compact, plain):
        given = inputs.clone().requires_grad_()
        out = network(given)
        (gradient,) = torch.autograd.grad(out.square().sum(), given)
        results.append((out, gradient))
    torch.testing.assert_close(results[0], results[1])


def test_float8_is_torchs_cast_and_int8_is_closer() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    decoded = {name: rounded(weight, name) for name in SCHEMES}
    assert torch.equal(decoded["float8"], weight.to(torch.float8_e4m3fn).float())
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((decoded["int8"] - weight).abs() <= step / 2 + 1e-6).all())
    assert (decoded["int8"] - weight).norm() < (decoded["float8"] - weight).norm() / 2
    assert (decoded["float8"] - weight).norm() < (decoded["nf4"] - weight).norm() < 0.1 * weight.norm()
    assert rounded(weight * 1e4, "float8").abs().max() == 448


def test_nf4_keeps_the_largest_of_each_block_and_the_zeros() -> None:
    """Shapes that are no multiple of a block too; the largest value of a block is its factor, and 0 is a level."""
    weight = torch.randn(3, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 0
    found = rounded(weight, "nf4")
    assert found.shape == weight.shape
    assert not found[0, 0].any()
    blocks = [(given, kept) for given, kept in zip(weight.flatten().split(64), found.flatten().split(64), strict=True)]
    assert len(blocks) == 3  # 135 values
    for given, kept in blocks:
        largest = given.abs().argmax()
        assert kept[largest].abs() == given[largest].abs()
        assert (kept - given).abs().max() <= given.abs().max() * 0.152 + 1e-6  # half of the widest gap: -1 to -.696


def test_nf4_has_the_bits_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    bits, scale = SCHEMES["nf4"].encode(weight)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert scale is not None
    assert torch.equal(bits, theirs.flatten())
    assert torch.equal(scale.flatten(), state.absmax)
    torch.testing.assert_close(rounded(weight, "nf4"), functional.dequantize_4bit(theirs, state))


def test_no_cast_weight_is_kept_for_the_backward_pass() -> None:
    layer = nn.Module()
    layer.block = nn.Linear(256, 256)
    store_compactly(layer, "int8")
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        layer.block(torch.randn(1, 256, requires_grad=True))
    assert max(value.nbytes for value in kept) == 256 * 256  # bytes of the 8-bit weight


@pytest.mark.parametrize(("storage", "bytes_kept", "error"), [("int8", 0.35, 0.05), ("nf4", 0.25, 0.4)])
def test_a_compact_base_is_another_teacher_of_fewer_bytes(
    models: Callable[[str], Path], storage: str, bytes_kept: float, error: float
) -> None:
    def size(network: nn.Module) -> int:
        return sum(value.nbytes for name, value in network.named_parameters() if "block" in name.split(".")[0])

    for family in ("sdxl", "sd3"):
        section = ModelSection(family=family, path=str(models(family)))
        plain = load_teacher(section)
        stored = load_teacher(section.model_copy(update={"storage": storage}))
        assert size(stored.denoiser.network) < bytes_kept * size(plain.denoiser.network)  # norms and biases stay
        assert stored.denoiser.dtype == torch.float32
        assert stored.weights_hash() != plain.weights_hash()
        z = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((2,), 500)
        outputs = [one.denoiser.predict(z, t, one.unconditional(2)) for one in (plain, stored)]
        assert 0 < (outputs[1] - outputs[0]).norm() < error * outputs[0].norm()


def test_a_lora_of_a_compact_base_has_the_usual_keys_and_says_its_base(
    recipe_content: dict[str, Any], tmp_path: Path
) -> None:
    recipe_content["lora"] = {"rank": 4, "targets": ["to_q", "conv1"]}  # linear layers and convolutions
    plain = parse_recipe(recipe_content)
    recipe_content["model"]["storage"] = "float8"
    stored = parse_recipe(recipe_content)
    assert stored.digest() != plain.digest()
    files = [distil(recipe, tmp_path / name) for name, recipe in (("plain", plain), ("float8", stored))]
    tensors = [load_file(file) for file in files]
    assert {name: (value.shape, value.dtype) for name, value in tensors[0].items()} == {
        name: (value.shape, value.dtype) for name, value in tensors[1].items()
    }
    metadata = [read_lora(file).metadata for file in files]
    assert metadata[0] is not None
    assert metadata[1] is not None
    assert "base_weights" not in metadata[0].training
    assert metadata[1].training["base_weights"] == "float8"
    assert metadata[0].teacher_hash != metadata[1].teacher_hash
    assert "float8" in (tmp_path / "float8" / "README.md").read_text()


def test_adapters_begin_as_on_the_plain_base(recipe_content: dict[str, Any]) -> None:
    recipe_content["lora"] = {"rank": 4, "targets": ["to_q", "conv1"]}
    plain = assemble(parse_recipe(recipe_content), Accelerator())
    recipe_content["model"]["storage"] = "nf4"
    stored = assemble(parse_recipe(recipe_content), Accelerator())
    first, second = (parts.trained.parameters["student"] for parts in (plain, stored))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(second[name], value)


def test_sharding_refuses_a_compact_base(
    recipe_content: dict[str, Any],
) -> None:
    recipe_content["model"]["storage"] = "int8"
    with pytest.raises(UserError, match=r"leave out model\.storage, memory\.offload and memory\.base"):
        parse_recipe({**recipe_content, "sharding": "base"})
