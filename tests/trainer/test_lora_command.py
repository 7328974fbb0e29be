"""``flash-diffusion lora``: what it says and writes, loaded by diffusers and PEFT; files that it must not touch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flash_diffusion.flash_core.lora import FlashMetadata, LoraModule, flat_name, read_lora, write_lora
from flash_diffusion.trainer.cli import main

from ..families.networks import tiny_network

PIPELINES = {"sd15": StableDiffusionPipeline, "sd3": StableDiffusion3Pipeline}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
METADATA = FlashMetadata("sd15", "epsilon", "vp", {4: (999.0, 749.0, 499.0, 249.0)}, title="ours", license="mit")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The command's answer; stdout must hold the JSON alone."""
    capsys.readouterr()
    assert main(["lora", *map(str, arguments), "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that fails; return its error message."""
    capsys.readouterr()
    assert main(["lora", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def layers(family: str, rank: int = 4, seed: int = 0, alpha: float = 2.0) -> dict[str, LoraModule]:
    """A random LoRA on the attention of a tiny network."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, module in tiny_network(family).named_modules():
        if isinstance(module, nn.Linear) and path.endswith(TARGETS):
            outputs, inputs = module.weight.shape
            down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
            found[path] = LoraModule(path, down, up, alpha)
    return found


def updates(modules: dict[str, LoraModule]) -> dict[str, Tensor]:
    return {flat_name(module.path): module.scale * module.up @ module.down for module in modules.values()}


def file_updates(path: Path) -> dict[str, Tensor]:
    return updates(dict(read_lora(path).modules))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, update in wanted.items():
        torch.testing.assert_close(found[name].float(), update.float(), atol=1e-4, rtol=1e-4)


def loaded(network: nn.Module) -> dict[str, Tensor]:
    """Return PEFT's change of the weights."""
    return {
        flat_name(path.removeprefix("base_model.model.")): module.get_delta_weight(next(iter(module.lora_A)))
        for path, module in network.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    write_lora(tmp_path / "lora.safetensors", layers("sd15"), METADATA)
    return tmp_path / "lora.safetensors"


def test_info(capsys: pytest.CaptureFixture[str], lora: Path) -> None:
    answer = run(capsys, "info", lora)
    assert (answer["base"], answer["ranks"], answer["alphas"], answer["scales"]) == ("sd15", [4], [2.0], [0.5])
    assert (answer["alpha_source"], answer["dialect"], answer["matched"]) == ("file", "kohya", None)
    assert answer["layers"] == len(layers("sd15"))
    assert answer["flash"]["timesteps"] == {"4": [999.0, 749.0, 499.0, 249.0]}
    assert main(["lora", "info", str(lora)]) == 0
    text = capsys.readouterr().out
    assert "made for: SD 1.5" in text
    assert "license: mit" in text


def test_info_names_the_preset_of_a_published_few_step_lora(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"  # of SD 1.5, by its 768 channels
    weights = {f"{layer}.lora_down.weight": torch.ones(4, 768), f"{layer}.lora_up.weight": torch.ones(320, 4)}
    file = tmp_path / "Hyper-SD15-4steps-lora.safetensors"
    save_file(weights, file)
    assert run(capsys, "info", file)["preset"] == {"name": "Hyper-SD, 4 steps", "how": "by its file name"}
    assert main(["lora", "info", str(file)]) == 0
    text = capsys.readouterr().out
    assert "set there: steps 4, guidance 1" in text
    assert "source: https://huggingface.co/ByteDance/Hyper-SD" in text
    file = file.rename(tmp_path / "hyper_robots.safetensors")
    assert run(capsys, "info", file)["preset"] is None


def test_info_of_a_broken_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04 pickled")
    assert "bad.safetensors is a pickle" in complaint(capsys, "info", tmp_path / "bad.safetensors")
    assert "no LoRA file" in complaint(capsys, "info", tmp_path / "nowhere")


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("dialect", ["portable", "kohya", "diffusers", "peft"])
def test_converted_files_load_in_diffusers_and_peft(
    capsys: pytest.CaptureFixture[str], family: str, dialect: str, tmp_path: Path
) -> None:
    modules = layers(family)
    tensors = {}
    for path, module in modules.items():
        name = f"lora_unet_{flat_name(path)}" if family == "sd15" else f"lora_transformer_{flat_name(path)}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = module.down, module.up
        tensors[f"{name}.alpha"] = torch.tensor(module.alpha)
    save_file(tensors, tmp_path / "given.safetensors", metadata={"ss_steps": "7"})
    output = tmp_path / ("folder" if dialect == "peft" else "lora.safetensors")
    if family == "sd3" and dialect == "kohya":
        assert "write the portable form" in complaint(
            capsys, "convert", tmp_path / "given.safetensors", output, "--to", dialect
        )
        return
    run(capsys, "convert", tmp_path / "given.safetensors", output, "--to", dialect)
    network = tiny_network(family)
    if dialect == "peft":
        network = PeftModel.from_pretrained(network, output)
    else:
        pipeline = PIPELINES[family]
        if family == "sd15":
            state, alphas = pipeline.lora_state_dict(output, unet_config=network.config)
            pipeline.load_lora_into_unet(state, alphas, network)
        else:
            pipeline.load_lora_into_transformer(pipeline.lora_state_dict(output), network)
    same(loaded(network), updates(modules))
    header = read_lora(output).header
    assert header["ss_steps"] == "7"
    assert header["flash.derived"].startswith(f"converted from {'kohya' if family == 'sd15' else 'lora_transformer'}")


def test_native_fused_layers_are_split(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    down, up = torch.randn(2, 128), torch.randn(384, 2)
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path / "native.safetensors")
    run(capsys, "convert", tmp_path / "native.safetensors", tmp_path / "out.safetensors")
    parts = (up @ down).chunk(3)
    names = [f"transformer_blocks_0_attn_to_{layer}" for layer in "qkv"]
    same(file_updates(tmp_path / "out.safetensors"), dict(zip(names, parts, strict=True)))


def test_metadata_and_history_are_carried_along(capsys: pytest.CaptureFixture[str], lora: Path, tmp_path: Path) -> None:
    run(capsys, "resize", lora, tmp_path / "a.safetensors", "--rank", 2)
    run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "diffusers")
    file = read_lora(tmp_path / "b.safetensors")
    assert file.metadata == METADATA
    first, second = file.header["flash.derived"].splitlines()
    assert first.startswith("resized to rank 2, relative error 0.")
    assert second.startswith("converted from kohya keys (flash-diffusion ")


def test_unknown_alpha_is_reported_or_set_by_the_option(
    capsys: pytest.CaptureFixture[str], lora: Path, tmp_path: Path
) -> None:
    bare = {key: value for key, value in load_file(lora).items() if not key.endswith(".alpha")}
    save_file(bare, tmp_path / "bare.safetensors")
    answer = run(capsys, "convert", tmp_path / "bare.safetensors", tmp_path / "one.safetensors")
    assert answer["notes"] == ["it has no alpha: scale 1 is used; see --alpha"]
    assert read_lora(tmp_path / "one.safetensors").scales == (1.0,)
    run(capsys, "convert", tmp_path / "bare.safetensors", tmp_path / "given.safetensors", "--alpha", 2)
    same(file_updates(tmp_path / "given.safetensors"), updates(layers("sd15")))
    assert "it has no alpha: 2 was given" in read_lora(tmp_path / "given.safetensors").header["flash.derived"]
    answer = run(
        capsys, "merge", tmp_path / "bare.safetensors", tmp_path / "bare.safetensors", tmp_path / "m", "--alpha", 1
    )
    assert answer["notes"] == ["bare.safetensors: it has no alpha: 1 was given"] * 2
    same(file_updates(tmp_path / "m"), updates(layers("sd15")))
    words = complaint(capsys, "convert", lora, tmp_path / "x.safetensors", "--alpha", 2)
    assert "--alpha is for files without alpha" in words


def test_resizing(capsys: pytest.CaptureFixture[str], lora: Path, tmp_path: Path) -> None:
    answer = run(capsys, "resize", lora, tmp_path / "full.safetensors", "--rank", 4)
    assert (answer["relative_error"], answer["ranks"]) == (0, [4])
    assert load_file(tmp_path / "full.safetensors").keys() == load_file(lora).keys()
    for key, value in load_file(lora).items():
        assert torch.equal(load_file(tmp_path / "full.safetensors")[key], value)
    answer = run(capsys, "resize", lora, tmp_path / "cut.safetensors", "--rank", 2)
    wanted, found = updates(layers("sd15")), file_updates(tmp_path / "cut.safetensors")
    lost = sum(float((found[name] - update).square().sum()) for name, update in wanted.items())
    total = sum(float(update.square().sum()) for update in wanted.values())
    assert answer["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert answer["ranks"] == [2]
    assert "at least 1" in complaint(capsys, "resize", lora, tmp_path / "x.safetensors", "--rank", 0)


def test_merging(capsys: pytest.CaptureFixture[str], lora: Path, tmp_path: Path) -> None:
    style = layers("sd15", rank=3, seed=1, alpha=3.0)
    write_lora(tmp_path / "style.safetensors", style, None, dialect="diffusers", dtype=torch.float16)
    output = tmp_path / "sum.safetensors"
    answer = run(capsys, "merge", f"{lora}:0.5", f"{tmp_path / 'style.safetensors'}:-1.25", output)
    assert answer["ranks"] == [7]
    assert [item["weight"] for item in answer["inputs"]] == [0.5, -1.25]
    ours, theirs = updates(layers("sd15")), updates(style)
    found = file_updates(output)
    for name in ours:
        torch.testing.assert_close(found[name], 0.5 * ours[name] - 1.25 * theirs[name], atol=1e-2, rtol=1e-2)
    assert read_lora(output).metadata == METADATA
    answer = run(capsys, "merge", lora, tmp_path / "style.safetensors", tmp_path / "cut.safetensors", "--rank", 5)
    assert answer["ranks"] == [5]
    assert 0 < answer["relative_error"] < 1


def test_loras_of_different_bases_are_not_merged(
    capsys: pytest.CaptureFixture[str], lora: Path, tmp_path: Path
) -> None:
    other = FlashMetadata("sd21", "v_prediction", "vp", {})
    write_lora(tmp_path / "sd21.safetensors", layers("sd21"), other)
    write_lora(tmp_path / "sd3.safetensors", layers("sd3"), None, transformer=True)
    words = complaint(capsys, "merge", lora, tmp_path / "sd21.safetensors", tmp_path / "out.safetensors")
    assert "lora.safetensors is for SD 1.5 (by its own metadata), sd21.safetensors for SD 2" in words
    words = complaint(capsys, "merge", lora, tmp_path / "sd3.safetensors", tmp_path / "out.safetensors")
    assert "only LoRAs for the same base can be merged" in words
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_is_overwritten_by_accident(capsys: pytest.CaptureFixture[str], lora: Path, tmp_path: Path) -> None:
    before = lora.read_bytes()
    for force in ([], ["--force"]):
        assert "is an input" in complaint(capsys, "convert", lora, lora, *force)
        assert "is an input" in complaint(capsys, "merge", lora, lora, *force)
        assert "is an input" in complaint(capsys, "resize", lora, lora, "--rank", 1, *force)
    run(capsys, "convert", lora, tmp_path / "folder", "--to", "peft")
    weights = tmp_path / "folder" / "adapter_model.safetensors"
    for given, output in ((tmp_path / "folder", tmp_path / "folder"), (weights, tmp_path / "folder")):
        assert "is an input" in complaint(capsys, "convert", given, output, "--to", "peft", "--force")
    assert "is an input" in complaint(capsys, "convert", tmp_path / "folder", weights, "--force")
    other = tmp_path / "other.safetensors"
    other.write_text("mine")
    assert "pass --force" in complaint(capsys, "convert", lora, other)
    assert other.read_text() == "mine"
    assert "writes a folder" in complaint(capsys, "convert", lora, other, "--to", "peft", "--force")
    assert "writes a file" in complaint(capsys, "convert", lora, tmp_path / "folder", "--force")
    run(capsys, "convert", lora, other, "--force")
    assert read_lora(other).metadata == METADATA
    assert lora.read_bytes() == before
    assert "can't be written" in complaint(capsys, "convert", lora, other / "below.safetensors")


def test_conversions_that_would_lose_keys_are_refused(
    capsys: pytest.CaptureFixture[str], lora: Path, tmp_path: Path
) -> None:
    tensors = load_file(lora)
    save_file(tensors | {"lora_unet_conv_in.diff": torch.ones(1)}, tmp_path / "diff.safetensors")
    assert "would be lost" in complaint(capsys, "convert", tmp_path / "diff.safetensors", tmp_path / "out.safetensors")
    odd = {key.replace("mid_block", "middle_thing"): value for key, value in tensors.items()}
    save_file(odd, tmp_path / "odd.safetensors")
    assert "does not exist in diffusers" in complaint(
        capsys, "convert", tmp_path / "odd.safetensors", tmp_path / "out.safetensors"
    )


def test_text_encoders_are_kept_or_left_out(capsys: pytest.CaptureFixture[str], lora: Path, tmp_path: Path) -> None:
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    text = {f"{name}.lora_down.weight": torch.randn(2, 4), f"{name}.lora_up.weight": torch.randn(4, 2)}
    save_file(load_file(lora) | text, tmp_path / "text.safetensors")
    answer = run(capsys, "convert", tmp_path / "text.safetensors", tmp_path / "a.safetensors", "--to", "diffusers")
    assert answer["text_encoder_layers"] == 1
    keys = load_file(tmp_path / "a.safetensors")
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert "belong to a text encoder" in complaint(
        capsys, "convert", tmp_path / "text.safetensors", tmp_path / "folder", "--to", "peft"
    )
    options = ("--to", "peft", "--no-text-encoder")
    answer = run(capsys, "convert", tmp_path / "text.safetensors", tmp_path / "folder", *options)
    assert answer["text_encoder_layers"] == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_can_be_stored_smaller(
    capsys: pytest.CaptureFixture[str], dtype: str, lora: Path, tmp_path: Path
) -> None:
    run(capsys, "convert", lora, tmp_path / "small.safetensors", "--dtype", dtype)
    modules = read_lora(tmp_path / "small.safetensors").modules
    assert {module.down.dtype for module in modules.values()} == {getattr(torch, dtype)}
    assert {module.scale for module in modules.values()} == {0.5}
