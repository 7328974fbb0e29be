"""Model files as users have them: scaled float8, tokenizers of another version, pickles, and files of another kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer, CLIPTokenizerFast

from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.teachers import load_teacher, outline_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from ..families.single_file import save_single_file
from ..families.single_file_dit import native_sd3

F8 = torch.float8_e4m3fn
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def checkpoint(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tensors of SD 1.5 as one file."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(models("sd15"), safety_checker=None)
    return load_file(save_single_file(pipeline, tmp_path_factory.mktemp("file") / "model.safetensors"))


def load(family: str, path: Path, **fields: object) -> Teacher:
    return load_teacher(ModelSection.model_validate({"family": family, "path": str(path), **fields}), resolution=64)


# -- scaled float8 -----------------------------------------------------------------------------------------------------


def per_tensor(weight: Tensor) -> Tensor:
    return (weight.abs().max() / 448).float()


def per_row(weight: Tensor) -> Tensor:
    return (weight.abs().amax(dim=1, keepdim=True) / 448).float()


def scaled(
    tensors: dict[str, Tensor], scale_of: Callable[[Tensor], Tensor], names: tuple[str, str], stored_as: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors with scaled matrices of networks, and the same with the values that these stand for."""
    quantised, true = {}, dict(tensors)
    for name, value in tensors.items():
        if value.ndim != 2 or not name.endswith(".weight") or "embedding" in name or "embed" in name:
            quantised[name] = value
            continue
        scale, layer = scale_of(value), name.removesuffix(".weight")
        small = (value / scale).to(F8)
        true[name] = small.float() * scale
        quantised[name] = small.view(stored_as)
        quantised[f"{layer}.{names[0]}"] = scale
        quantised[f"{layer}.{names[1]}"] = torch.tensor(0.5)
    return quantised, true


def older(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    return {**tensors, f"{UNET}scaled_fp8": torch.tensor([], dtype=F8)}, {}


def layers_of(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]


def newer(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    mark = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return tensors | {f"{layer}.comfy_quant": mark.clone() for layer in layers_of(tensors)}, {}


def in_header(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    facts = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers_of(tensors)}}
    return tensors, {"_quantization_metadata": json.dumps(facts)}


OLD_NAMES, NEW_NAMES = ("scale_weight", "scale_input"), ("weight_scale", "input_scale")


@pytest.mark.parametrize(
    ("marked", "names", "scale_of", "stored_as"),
    [
        (older, OLD_NAMES, per_tensor, F8),
        (older, OLD_NAMES, per_row, F8),
        (newer, NEW_NAMES, per_tensor, F8),
        (newer, NEW_NAMES, per_tensor, torch.uint8),
        (in_header, NEW_NAMES, per_row, F8),
    ],
)
def test_scaled_float8_loads_as_weight_times_scale(
    marked: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, str]]],
    names: tuple[str, str],
    scale_of: Callable[[Tensor], Tensor],
    stored_as: torch.dtype,
    checkpoint: dict[str, Tensor],
    models: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    small, true = scaled(checkpoint, scale_of, names, stored_as)
    small, header = marked(small)
    save_file(small, tmp_path / "scaled.safetensors", metadata={"format": "pt", **header})
    save_file(true, tmp_path / "true.safetensors", metadata={"format": "pt"})
    ours = load("sd15", tmp_path / "scaled.safetensors", config=str(models("sd15")))
    expected = load("sd15", tmp_path / "true.safetensors", config=str(models("sd15")))
    assert ours.weights_hash() == expected.weights_hash()
    assert ours.text_encoder_hash() == expected.text_encoder_hash()
    assert ours.image_encoder_hash() == expected.image_encoder_hash()
    assert len(small) > len(checkpoint)


def test_scaled_float8_of_sd3_and_its_t5_loads(models: Callable[[str], Path], tmp_path: Path) -> None:
    small, true = scaled(native_sd3(models("sd3")), per_tensor, OLD_NAMES, F8)
    marks = {f"{UNET}scaled_fp8": torch.tensor([]), "text_encoders.t5xxl.transformer.scaled_fp8": torch.tensor([])}
    save_file({**small, **marks}, tmp_path / "scaled.safetensors", metadata={"format": "pt"})
    save_file(true, tmp_path / "true.safetensors", metadata={"format": "pt"})
    ours, expected = (
        load("sd3", tmp_path / f"{name}.safetensors", config=str(models("sd3"))) for name in ("scaled", "true")
    )
    assert ours.weights_hash() == expected.weights_hash()
    assert ours.text_encoder_hash() == expected.text_encoder_hash()


def as_nvfp4(layer: str) -> dict[str, Tensor]:
    mark = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    return {f"{layer}.comfy_quant": mark, f"{layer}.weight": torch.zeros(4, 4, dtype=torch.uint8)}


UNREADABLE = {
    "nvfp4": (as_nvfp4, "not supported (nvfp4)"),
    "integers": (lambda layer: {f"{layer}.weight": torch.zeros(4, 4, dtype=torch.int8)}, "weight holds whole numbers"),
    "unknown scale": (
        lambda layer: {f"{layer}.weight": torch.zeros(4, 4).to(F8), f"{layer}.weight_scale_inv": torch.ones(1)},
        "weight_scale_inv",
    ),
    "block scales": (
        lambda layer: {f"{layer}.weight": torch.zeros(4, 4).to(F8), f"{layer}.weight_scale": torch.ones(2, 2, 2)},
        "has a scale of shape (2, 2, 2); expected one number, or one for each of the 4 rows",
    ),
    "no JSON": (
        lambda layer: {f"{layer}.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)},
        "its format can't be read",
    ),
}


@pytest.mark.parametrize(("tensors", "expected"), UNREADABLE.values(), ids=UNREADABLE)
def test_other_quantisations_are_refused_by_name(
    tensors: Callable[[str], dict[str, Tensor]],
    expected: str,
    checkpoint: dict[str, Tensor],
    models: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    layer = f"{UNET}middle_block.1.proj_in"
    file = tmp_path / "quantised.safetensors"
    save_file({**checkpoint, **tensors(layer)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.path: .*quantised\.safetensors") as caught:
        load("sd15", file, config=str(models("sd15")))
    assert expected in str(caught.value)
    assert "float16" in str(caught.value)


def test_a_folder_with_quantised_weights_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers would load the first without its scales."""
    folder = shutil.copytree(models("sd15"), tmp_path / "scaled")
    file = folder / "text_encoder" / "model.safetensors"
    tensors, _ = scaled(load_file(file), per_tensor, OLD_NAMES, F8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder/model\.safetensors holds scaled float8 weights"):
        load("sd15", folder)
    folder = shutil.copytree(models("sd15"), tmp_path / "four bits")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"load_in_4bit": True}}))
    for call in (load_teacher, outline_teacher):
        with pytest.raises(UserError, match="the unet of four bits is quantised"):
            call(ModelSection(family="sd15", path=str(folder)))


# -- tokenizers and pickles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "single_file"), [("sd15", False), ("sd15", True), ("sd3", False)])
def test_a_tokenizer_of_one_file_reads_prompts_as_the_older_files(
    family: str, single_file: bool, models: Callable[[str], Path], checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    """transformers 5 writes tokenizer.json alone."""
    folder = shutil.copytree(models(family), tmp_path / "model")
    for place in folder.glob("tokenizer*"):
        if place.name == "tokenizer_3":
            continue  # T5's is saved with both
        CLIPTokenizerFast.from_pretrained(place).save_pretrained(tmp_path / "fast")
        for name in ("vocab.json", "merges.txt"):
            (place / name).unlink()
        shutil.copy(tmp_path / "fast" / "tokenizer.json", place)
    path, fields = folder, {}
    if single_file:
        path, fields = tmp_path / "model.safetensors", {"config": str(folder)}
        save_file(checkpoint, path, metadata={"format": "pt"})
    prompts = ["a red ball, it's 12 cm", "", "Photo " * 30]
    older = CLIPTokenizer.from_pretrained(models(family) / "tokenizer")
    teacher = load(family, path, **fields)
    assert [teacher.pipeline.tokenizer(text).input_ids for text in prompts] == [
        older(text).input_ids for text in prompts
    ]
    ours, expected = (model.encode_prompts(prompts) for model in (teacher, load(family, models(family))))
    assert torch.equal(ours.cross_attention, expected.cross_attention)  # type: ignore[arg-type]


def test_a_broken_tokenizer_is_named(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models("sd15"), tmp_path / "model")
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the tokenizer .*tokenizer\.json can't be read"):
        load("sd15", folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="not a complete diffusers folder"):
        load("sd15", folder)
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer/ lacks tokenizer_config\.json"):
        load("sd15", folder)


@pytest.mark.parametrize(
    ("part", "name"), [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")]
)
def test_a_folder_of_pickles_is_refused_with_the_way_out(
    part: str, name: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(models("sd15"), tmp_path / "model")
    for file in (folder / part).glob("*.safetensors"):
        file.rename(folder / part / name)
    with pytest.raises(UserError) as caught:
        load("sd15", folder)
    message = str(caught.value)
    assert f"the weights in {part}/ are pickles only ({name})" in message
    assert "can run code" in message
    assert f"DiffusionPipeline as P; P.from_pretrained({str(folder)!r}, use_safetensors=False)" in message


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_a_pickle_as_a_file_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(UserError, match=rf"{name} is a pickle; .* convert it once: .*from_single_file"):
        load("sd15", tmp_path / name)


# -- files of another kind ---------------------------------------------------------------------------------------------

OTHERS = {
    "lora": (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "is a LoRA", "model.style_lora"),
    "peft": (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "is a LoRA", "model.style_lora"),
    "loha": (["lora_unet_mid_block.hada_w1_a"], "is a LoRA", "model.style_lora"),
    "control": (["control_model.zero_convs.0.0.weight"], "is a ControlNet or T2I-adapter", "model.control"),
    "ip": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "is an IP-Adapter", "model.image_adapter"),
    "flux": (["double_blocks.0.img_attn.qkv.weight"], "is a Flux model", "another family"),
    "unet": (["input_blocks.0.0.weight", "out.2.weight"], "holds a UNet in a form", "complete checkpoint"),
    "diffusers-unet": (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "holds a UNet", "complete"),
    "transformer": (["transformer_blocks.0.attn.to_q.weight"], "holds a transformer in diffusers' form", "complete"),
    "vae": (["first_stage_model.encoder.conv_in.weight"], "holds a VAE only", "complete checkpoint"),
    "diffusers-vae": (
        ["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"],
        "a VAE only",
        "complete",
    ),
    "clip": (["text_model.encoder.layers.0.mlp.fc1.weight"], "holds a text encoder only", "complete checkpoint"),
    "t5": (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "a text encoder only", "complete"),
    "other": (["conv1.weight"], "holds no denoiser of a known kind (its first tensor is conv1.weight)", "complete"),
}


@pytest.mark.parametrize(("names", "expected", "advice"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("call", [load_teacher, outline_teacher])
def test_a_file_of_another_kind_is_named(
    call: Callable[[ModelSection], object], names: list[str], expected: str, advice: str, tmp_path: Path
) -> None:
    file = tmp_path / "given.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, file)
    for family in ("sd15", "sdxl", "sd3"):
        with pytest.raises(UserError, match=r"model\.path: .*given\.safetensors") as caught:
            call(ModelSection(family=family, path=str(file)))
        assert expected in str(caught.value)
        assert advice in str(caught.value)


def test_a_folder_of_another_kind_is_named(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"unet has no model_index\.json, so it is one part of a model; .* such as .*sd15"
    ):
        load("sd15", models("sd15") / "unet")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is the folder of a PEFT LoRA, .* set model\.style_lora"):
        load("sd15", tmp_path)
