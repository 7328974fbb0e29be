"""Every file format in every family: all layers are patched in ComfyUI; the output equals diffusers' with PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flash_diffusion.flash_core.lora import (
    FlashMetadata,
    LoraModule,
    flat_name,
    read_lora,
    with_diffusers_names,
    write_lora,
)

from ..families.networks import FAMILIES, tiny_network
from .inside_comfyui import run_inside
from .test_model_denoiser import FLUX_GUIDANCE, batch_of, diffusers_output, relative

pytestmark = pytest.mark.comfy

RANK, ALPHA = 3, 4.5
UNETS = ("sd15", "sd21", "sdxl")
# One layer in a few has a rank and an alpha of its own.
OTHER_RANK, OTHER_ALPHA, EVERY = 5, 2.0, 3
PIPELINES = {
    **dict.fromkeys(("sd15", "sd21"), StableDiffusionPipeline),
    "sdxl": StableDiffusionXLPipeline,
    **dict.fromkeys(("sd3", "sd35"), StableDiffusion3Pipeline),
    "flux": FluxPipeline,
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA in PEFT, on a diffusers network."""

    model: nn.Module
    layers: dict[str, tuple[Tensor, Tensor, float]]  # path -> down, up, alpha
    config: LoraConfig


def adapter(family: str, *, fused: bool) -> Adapter:
    """Add PEFT's LoRA to every linear layer and convolution, with random weights.

    Args:
        fused: one rank, alpha = rank, and one down half for all layers of the same input, as for layers that native
            transformers fuse.
    """
    network = tiny_network(family)
    paths = [path for path, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    others = [] if fused else paths[::EVERY]
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK if fused else ALPHA,
        target_modules=paths,
        rank_pattern=dict.fromkeys(others, OTHER_RANK),
        alpha_pattern=dict.fromkeys(others, OTHER_ALPHA),
        init_lora_weights=False,
    )
    model = get_peft_model(network, config)
    generator = torch.Generator().manual_seed(11)
    layers = {}
    for path in paths:
        layer = model.base_model.model.get_submodule(path)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if fused:
            generator.manual_seed(down[0].numel())
        with torch.no_grad():
            down.copy_(0.1 * torch.randn(down.shape, generator=generator))
            generator.manual_seed(len(layers))
            up.copy_(0.1 * torch.randn(up.shape, generator=generator))
        layers[path] = (down.detach(), up.detach(), float(layer.lora_alpha["default"]))
    return Adapter(model.requires_grad_(False), layers, config)


def spelled(adapter: Adapter, key: Callable[[str], str], halves: tuple[str, str], alpha: bool) -> dict[str, Tensor]:
    """Rename the LoRA's keys; a format without alpha has alpha folded into the up half, as its writers do."""
    tensors = {}
    for path, (down, up, value) in adapter.layers.items():
        tensors[f"{key(path)}.{halves[0]}"] = down.clone()
        tensors[f"{key(path)}.{halves[1]}"] = up.clone() if alpha else up * (value / down.shape[0])
        if alpha:
            tensors[f"{key(path)}.alpha"] = torch.tensor(value)
    return tensors


KOHYA, PEFT, DOWN_UP = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"), ("down", "up")
SPELLINGS: dict[str, tuple[Callable[[str], str], tuple[str, str], bool]] = {
    "base_model.model": (lambda path: f"base_model.model.{path}", PEFT, False),
    "unet.base_model.model": (lambda path: f"unet.base_model.model.{path}", PEFT, False),
    "transformer.base_model.model": (lambda path: f"transformer.base_model.model.{path}", PEFT, True),
    "unet": (lambda path: f"unet.{path}", PEFT, False),
    "transformer": (lambda path: f"transformer.{path}", PEFT, False),
    "transformer alpha": (lambda path: f"transformer.{path}", PEFT, True),
    "lora.down": (lambda path: f"unet.{path}.lora", ("down.weight", "up.weight"), False),
    "bare": (lambda path: path, PEFT, False),
    "kohya": (lambda path: f"lora_unet_{flat_name(path)}", KOHYA, True),
    "kohya without alpha": (lambda path: f"lora_unet_{flat_name(path)}", KOHYA, False),
    "lora_transformer": (lambda path: f"lora_transformer_{flat_name(path)}", KOHYA, True),
    "lycoris": (lambda path: f"lycoris_{flat_name(path)}", KOHYA, True),
}
# Written by the libraries themselves, by ComfyUI's own names (inside/lora_matrix.py), or by us.
WRITTEN = ("peft folder", "portable", "with text encoder")
NATIVE = ("native", "kohya native")


def write_files(family: str, folder: Path, apart: Adapter, fused: Adapter) -> None:
    """Write all files of a family."""
    folder.mkdir()
    for name, (key, halves, alpha) in SPELLINGS.items():
        save_file(spelled(apart, key, halves, alpha), folder / name)
    save_file(spelled(fused, *SPELLINGS["unet"]), folder / "fused")
    apart.model.save_pretrained(folder / "peft folder")
    modules = read_lora(folder / "peft folder").modules
    write_lora(folder / "portable", modules, None, transformer=family not in UNETS)
    if family in UNETS:
        processors = {
            f"unet.{path.replace('.to_out.0', '.to_out').replace('.to_', '.processor.to_')}_lora": halves
            for path, halves in attention(apart).items()
        }
        tensors = {f"{key}.down.weight": down.clone() for key, (down, _, _) in processors.items()}
        tensors |= {f"{key}.up.weight": up * (a / down.shape[0]) for key, (down, up, a) in processors.items()}
        save_file(tensors, folder / "processors")
    text = {f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{half}": torch.randn(2, 2) for half in KOHYA}
    save_file(spelled(apart, *SPELLINGS["kohya"]) | text, folder / "with text encoder")
    if family in PIPELINES:
        component = "unet" if family in UNETS else "transformer"
        weights = get_peft_model_state_dict(apart.model)
        PIPELINES[family].save_lora_weights(
            folder / "..",
            **{f"{component}_lora_layers": {key.removeprefix("base_model.model."): v for key, v in weights.items()}},
            **{f"{component}_lora_adapter_metadata": apart.config.to_dict()},
            weight_name=f"{family}.saved",
        )
        (folder / ".." / f"{family}.saved").rename(folder / "save_lora_weights")


def attention(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return the layers of the old attention processors."""
    ends = ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0")
    return {path: halves for path, halves in adapter.layers.items() if path.endswith(ends)}


# What is asked -> the model's family, the file, whether a part of it may be loaded.
CROSSES: dict[str, tuple[str, str, bool]] = {
    "sdxl on sd15": ("sd15", "sdxl/bare", False),
    "sd15 on sdxl": ("sdxl", "sd15/bare", False),
    "flux on sd3": ("sd3", "flux/bare", False),
    "sd3 on sd35": ("sd35", "sd3/bare", False),
    "sd35 on sd3": ("sd3", "sd35/bare", False),
    "a part of sd35 on sd3": ("sd3", "sd35/bare", True),
    "alpha on sigma": ("pixart_sigma", "pixart_alpha/bare", False),
    "a part of alpha on sigma": ("pixart_sigma", "pixart_alpha/bare", True),
    "sigma on alpha": ("pixart_alpha", "pixart_sigma/bare", False),
    "sigma's layers said to be alpha's": ("pixart_sigma", "said to be alpha", False),
    "a part of sd15 on flux": ("flux", "sd15/bare", True),
    "a text encoder's alone": ("sd15", "text encoder", True),
    "unknown keys": ("sd15", "unknown keys", False),
    "unknown keys allowed": ("sd15", "unknown keys", True),
}


def write_crosses(folder: Path) -> None:
    """Write the files of CROSSES that no family has."""
    (folder / "crosses.json").write_text(json.dumps(CROSSES))
    layers = read_lora(folder / "pixart_sigma" / "peft folder").modules
    said = FlashMetadata("pixart", "epsilon", "vp", {4: (999.0, 749.0, 499.0, 249.0)})
    write_lora(folder / "said to be alpha", layers, said, transformer=True)
    text = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{half}": torch.randn(2, 2) for half in KOHYA}
    save_file(text, folder / "text encoder")
    save_file(
        load_file(folder / "sd15" / "kohya") | {"lora_unet_conv_in.set_weight": torch.ones(1)}, folder / "unknown keys"
    )


@dataclass(frozen=True)
class Matrix:
    """The result of every file, and the expected result."""

    folder: Path
    answers: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Tensor]]
    expected: dict[str, dict[str, Tensor]]
    layers: dict[str, int]


@pytest.fixture(scope="module")
def matrix(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Run all files in one process."""
    folder = tmp_path_factory.mktemp("matrix")
    expected: dict[str, dict[str, Tensor]] = {}
    layers = {}
    for family in FAMILIES:
        apart, fused = adapter(family, fused=False), adapter(family, fused=True)
        network = tiny_network(family)
        save_file(network.state_dict(), folder / f"{family}.safetensors")
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
        write_files(family, folder / family, apart, fused)
        given = batch_of(family, network)
        with torch.no_grad():
            networks = {"base": network, "apart": apart.model.base_model.model, "fused": fused.model.base_model.model}
            expected[family] = {
                name: diffusers_output(family, network, given, given["z0"]) for name, network in networks.items()
            }
            if family in UNETS:
                for path in set(apart.layers) - set(attention(apart)):
                    networks["apart"].get_submodule(path).scaling["default"] = 0.0
                expected[family]["attention"] = diffusers_output(family, networks["apart"], given, given["z0"])
        layers[family] = len(apart.layers)
        save_file(inputs(family, network, given), folder / f"{family}.given.safetensors")
    write_crosses(folder)
    run_inside(runtime, "lora_matrix.py", folder, *FAMILIES)
    return Matrix(
        folder,
        json.loads((folder / "answers.json").read_text()),
        {family: load_file(folder / f"{family}.results") for family in FAMILIES},
        expected,
        layers,
    )


def inputs(family: str, network: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch in the form that ComfyUI's networks take."""
    result = {"z": given["z0"], "t": given["t"], "context": given["tokens"]}
    if family == "sdxl":
        height, width = (8.0 * side for side in given["z0"].shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width]).repeat(len(given["z0"]))
        embedded = network.add_time_proj(sizes).reshape(len(given["z0"]), -1)
        result["y"] = torch.cat([given["pooled_output"], embedded], dim=1)
    elif "pooled_output" in given:
        result["y"] = given["pooled_output"]
    if family == "flux":
        result["t"] = given["t"] / 1000
        result["guidance"] = torch.full((len(given["z0"]),), FLUX_GUIDANCE)
    return result


CASES = [(family, name) for family in FAMILIES for name in (*SPELLINGS, *WRITTEN)]
CASES += [(family, "save_lora_weights") for family in PIPELINES]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_layer_is_patched_and_the_output_equals_pefts(matrix: Matrix, family: str, name: str) -> None:
    answer = matrix.answers[f"{family}/{name}"]
    assert "error" not in answer, answer["error"]
    assert answer["matched"] == answer["layers"] == answer["patches"] == matrix.layers[family]
    assert answer["complete"]
    assert relative(matrix.outputs[family][name], matrix.expected[family]["apart"]) < 1e-4
    assert relative(matrix.outputs[family][name], matrix.expected[family]["base"]) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fused", *NATIVE])
def test_native_names_and_fused_layers_equal_peft(matrix: Matrix, family: str, name: str) -> None:
    answer = matrix.answers[f"{family}/{name}"]
    assert "error" not in answer, answer["error"]
    assert answer["matched"] == answer["layers"] == answer["patches"]
    assert relative(matrix.outputs[family][name], matrix.expected[family]["fused"]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_equals_diffusers_before_and_after(matrix: Matrix, family: str) -> None:
    outputs = matrix.outputs[family]
    assert relative(outputs["base"], matrix.expected[family]["base"]) < 1e-4
    assert torch.equal(outputs["base"], outputs["base again"])


@pytest.mark.parametrize("family", UNETS)
def test_files_of_old_attention_processors_load(matrix: Matrix, family: str) -> None:
    answer = matrix.answers[f"{family}/processors"]
    assert answer["matched"] == answer["layers"] == answer["patches"] >= 12
    assert relative(matrix.outputs[family]["processors"], matrix.expected[family]["attention"]) < 1e-4


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in UNETS])
def test_native_transformers_become_diffusers_layers(matrix: Matrix, family: str) -> None:
    """The names and splits of ``convert`` agree with ComfyUI's own table, with which the file was written."""
    wanted = read_lora(matrix.folder / family / "fused").modules
    for name in NATIVE:
        converted = with_diffusers_names(read_lora(matrix.folder / family / name).modules)
        assert {flat_name(path) for path in converted} == set(wanted)
        for path, module in converted.items():
            assert torch.equal(module.up, wanted[flat_name(path)].up)
            assert torch.equal(module.down, wanted[flat_name(path)].down)


@pytest.mark.parametrize("family", UNETS)
def test_native_unets_become_diffusers_layers(matrix: Matrix, family: str) -> None:
    """The names depend on the sizes, so the sizes are the published ones."""
    names = json.loads((matrix.folder / "names.json").read_text())[family]
    checked = 0
    for theirs, native in names.items():
        path, _, end = theirs.rpartition(".")
        if end != "weight" or "norm" in path or path.startswith("class_embedding"):  # SDXL's is called add_embedding
            continue
        flat = flat_name(native.removesuffix(".weight"))
        module = LoraModule(flat, torch.zeros(1, 1), torch.zeros(1, 1))
        assert list(with_diffusers_names({flat: module})) == [path]
        checked += 1
    assert checked > 150


def test_the_report_names_alpha_and_its_source(matrix: Matrix) -> None:
    for name, source in (
        ("kohya", "file"),
        ("peft folder", "adapter_config"),
        ("save_lora_weights", "header"),
        ("bare", "unknown"),
    ):
        answer = matrix.answers[f"sd15/{name}"]
        assert answer["alpha_source"] == source
        assert answer["ranks"] == [RANK, OTHER_RANK]
        if source != "unknown":
            assert answer["alphas"] == [OTHER_ALPHA, ALPHA]
    assert "alpha: unknown (scale 1 is used" in matrix.answers["sd15/bare"]["text"]


def test_the_report_counts_text_encoder_layers(matrix: Matrix) -> None:
    (left_out,) = matrix.answers["sdxl/with text encoder"]["left_out"]
    assert left_out["count"] == 1
    assert left_out["harmless"]


@pytest.mark.parametrize(
    ("name", "lora", "model"),
    [
        ("sdxl on sd15", "an unknown model (attn2 reads 32 channels)", "SD 1.5 (attn2 reads 32 channels)"),
        ("sd15 on sdxl", "an unknown model (attn2 reads 32 channels)", "SDXL (attn2 reads 32 channels)"),
        ("flux on sd3", "Flux", "SD3 (128 channels wide)"),
        ("sd3 on sd35", "a transformer like SD3 (128 channels wide)", "SD3.5 (128 channels wide)"),
        ("sd35 on sd3", "SD3.5 medium", "SD3 (128 channels wide)"),
        ("alpha on sigma", "PixArt-alpha at 1024 pixels", "PixArt-Sigma"),
        ("a part of sd15 on flux", "an unknown model", "Flux"),
    ],
)
def test_another_family_raises_an_error_with_both_names(matrix: Matrix, name: str, lora: str, model: str) -> None:
    error = matrix.answers[name]["error"]
    assert f"It is for {lora}" in error
    assert f"the model is {model}" in error
    assert "Load the checkpoint" in error
    assert ("turn on allow_partial" in error) == ("0 of its" not in error)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("a part of sd35 on sd3", {"layers that the model lacks": 4, "layers that have another shape in the model": 1}),
        ("a part of alpha on sigma", {"layers that the model lacks": 4}),
        ("unknown keys allowed", {"keys that are not plain LoRA on a layer": 1}),
    ],
)
def test_allow_partial_loads_the_layers_that_fit(matrix: Matrix, name: str, left_out: dict[str, int]) -> None:
    answer = matrix.answers[name]
    assert {item["what"]: item["count"] for item in answer["left_out"]} == left_out
    missing = sum(count for what, count in left_out.items() if what.startswith("layers"))
    assert answer["matched"] == answer["patches"] == answer["layers"] - missing > 0
    assert not answer["complete"]


def test_pixart_alpha_has_all_layers_of_sigma(matrix: Matrix) -> None:
    assert matrix.answers["sigma on alpha"]["complete"]
    (note,) = matrix.answers["sigma's layers said to be alpha's"]["notes"]
    assert note.startswith("WARNING: made for PixArt-alpha, while the model is PixArt-Sigma")


def test_layers_outside_the_denoiser_are_reported(matrix: Matrix) -> None:
    assert "has no layer for the diffusion model" in matrix.answers["a text encoder's alone"]["error"]
    assert (
        "keys that are not plain LoRA on a layer: 1, e.g. lora_unet_conv_in.set_weight"
        in matrix.answers["unknown keys"]["error"]
    )
