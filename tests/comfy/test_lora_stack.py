"""A Flash LoRA with styles in the real ComfyUI: equal to one loader after another, with warnings of conflicts."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash_diffusion.flash_core.lora import read_lora, write_lora
from flash_diffusion.flash_core.lora.overlap import common_names, overlap

from . import prompts
from .client import Client, Run
from .loras import save_random_lora, save_sd15_lora

pytestmark = pytest.mark.comfy

FLASH = "flash_demo.safetensors"
SHIPPED = prompts.ROOT / "trainer" / "demo" / "lora" / FLASH
TOLERANCE = 1e-4  # of the latents' standard deviation: sums of patches in another order
TEXT_LAYERS = ("self_attn_q_proj", "self_attn_v_proj", "mlp_fc1")


def save_style(path: Path, seed: int, size: float, *, unet: bool = True, text: bool = False) -> None:
    """Save a random style LoRA on the demo's layers, in kohya's format, which core's loader also reads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    if unet:
        shapes = {f"lora_unet_{name}": module.shape for name, module in read_lora(SHIPPED).modules.items()}
    if text:
        config = json.loads((prompts.TEACHER / "text_encoder" / "config.json").read_text())
        width, inner = config["hidden_size"], config["intermediate_size"]
        for layer in range(config["num_hidden_layers"]):
            for name in TEXT_LAYERS:
                outputs = inner if name == "mlp_fc1" else width
                shapes[f"lora_te_text_model_encoder_layers_{layer}_{name}"] = (outputs, width)
    tensors = {}
    for key, (outputs, inputs, *kernel) in shapes.items():
        spread = size if key.startswith("lora_unet_") else 0.1
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, inputs, *kernel, generator=generator) * spread
        tensors[f"{key}.lora_up.weight"] = torch.randn(outputs, 4, *(1 for _ in kernel), generator=generator) * spread
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)


def save_fighting_style(path: Path) -> None:
    """Save a style that uses the Flash LoRA's directions, but with another update."""
    generator = torch.Generator().manual_seed(3)
    modules = {}
    for name, module in read_lora(SHIPPED).modules.items():
        mixed = torch.randn(module.rank, module.rank, generator=generator) @ module.down.float().flatten(1)
        modules[name] = dataclasses.replace(module, down=mixed.reshape(module.down.shape), up=module.up.float())
    write_lora(path, modules, None)


@pytest.fixture(scope="module")
def folder(server) -> Path:
    """Fill ComfyUI's LoRA folder with styles."""
    loras: Path = server.base / "models" / "loras"
    save_style(loras / "style_a.safetensors", 1, 0.06, text=True)
    save_style(loras / "style_b.safetensors", 2, 0.04)
    save_fighting_style(loras / "style_fights.safetensors")
    save_style(loras / "style_text.safetensors", 4, 0.0, unet=False, text=True)
    opposed = load_file(loras / "style_a.safetensors")
    for key in opposed:
        if key.endswith("lora_up.weight"):
            opposed[key] = -opposed[key]
    save_file(opposed, loras / "style_opposed.safetensors")
    save_sd15_lora(loras / "style_sd15.safetensors")
    save_file({"lora_unet_x.dora_scale": torch.ones(1)}, loras / "style_dora.safetensors")
    return loras


def stack(flash: str = FLASH, flash_strength: float = 1.0, *, clip: bool = True, steps: int = 2, **styles) -> dict:
    """Make the workflow of :func:`prompts.latents` with the stack; ``style_a=.7`` puts this file at .7 into a slot."""
    prompt = prompts.latents("", seed=11, steps=steps, pictures=1)
    inputs = {"model": [prompts.MODELS, 0], "flash_lora": flash, "flash_strength": flash_strength}
    if clip:
        inputs["clip"] = [prompts.MODELS, 1]
        prompt[prompts.TEXT]["inputs"]["clip"] = [prompts.LORA, 1]
    for slot, (name, strength) in enumerate(styles.items(), 1):
        inputs |= {f"style_{slot}": f"{name}.safetensors", f"style_{slot}_strength": strength}
    prompt[prompts.LORA] = prompts.node("FlashLoraStack", **inputs)
    prompt["report"] = prompts.node("PreviewAny", source=[prompts.LORA, 2])
    return prompt


def one_after_another(**styles: float) -> dict:
    """Make the same workflow with our loader for the Flash LoRA and core's loaders for the styles."""
    prompt = prompts.latents(FLASH, seed=11, steps=2, pictures=1)
    model, clip = [prompts.LORA, 0], [prompts.MODELS, 1]
    for name, strength in styles.items():
        prompt[name] = prompts.node(
            "LoraLoader",
            model=model,
            clip=clip,
            lora_name=f"{name}.safetensors",
            strength_model=strength,
            strength_clip=strength,
        )
        model, clip = [name, 0], [name, 1]
    prompt[prompts.SAMPLER]["inputs"]["model"] = model
    prompt[prompts.TEXT]["inputs"]["clip"] = clip
    return prompt


def latent_of(client: Client, prompt: dict) -> Tensor:
    run = client.run(prompt)
    assert run.succeeded, run.error
    return client.latent(run, "latent")


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.std())


def report_of(client: Client, prompt: dict) -> tuple[str, Run]:
    run = client.run(prompt)
    assert run.succeeded, run.error
    return run.outputs["report"]["text"][0], run


def refusal(client: Client, prompt: dict) -> str:
    run = client.run(prompt)
    assert run.error is not None
    assert run.error["node_type"] == "FlashLoraStack"
    return run.error["exception_message"]


@pytest.mark.parametrize("strengths", [{"style_a": 0.7, "style_b": 1.0}, {"style_b": -0.5, "style_a": 1.5}])
def test_a_stack_equals_one_loader_after_another(client: Client, folder: Path, strengths: dict[str, float]) -> None:
    """Strengths have the meaning of core's loader, for the model and for the text encoder."""
    expected = latent_of(client, one_after_another(**strengths))
    assert distance(latent_of(client, stack(**strengths)), expected) < TOLERANCE
    assert distance(latent_of(client, stack()), expected) > 0.1


def test_the_order_of_styles_does_not_matter(client: Client, folder: Path) -> None:
    one = latent_of(client, stack(style_a=0.7, style_b=1.2))
    assert distance(latent_of(client, stack(style_b=1.2, style_a=0.7)), one) < TOLERANCE


def test_a_flash_lora_in_a_style_slot_counts_as_the_flash_lora(client: Client, folder: Path) -> None:
    prompt = stack("none", style_a=0.7, flash_demo=1.0)
    assert distance(latent_of(client, prompt), latent_of(client, stack(style_a=0.7))) < TOLERANCE
    assert f"Flash LoRA {FLASH}, strength 1" in report_of(client, prompt)[0]


def test_without_a_lora_nothing_changes(client: Client, folder: Path) -> None:
    report, run = report_of(client, stack("none", style_a=0.0))
    assert "no LoRA is chosen" in report
    assert torch.equal(
        client.latent(run, "latent"), latent_of(client, prompts.latents(None, seed=11, steps=2, pictures=1))
    )


def test_the_sampler_gets_the_flash_loras_timesteps(client: Client, folder: Path) -> None:
    save_random_lora(folder / "flash_random.safetensors", prompts.TEACHER)  # knows 1, 2 and 4 steps
    run = client.run(stack("flash_random.safetensors", style_b=1.0, steps=3))
    assert "the LoRA was trained for 1, 2, 4 steps" in run.texts[prompts.SAMPLER]
    run = client.run(stack("none", style_b=1.0, steps=3))
    assert "the LoRA was trained for" not in run.texts[prompts.SAMPLER]


def chained(first: dict, **styles: float) -> dict:
    """Add a second stack, with styles or another Flash LoRA, after a workflow's first stack."""
    prompt = first
    inputs = {"model": [prompts.LORA, 0], "clip": [prompts.LORA, 1], "flash_lora": "none", "flash_strength": 1.0}
    for slot, (name, strength) in enumerate(styles.items(), 1):
        inputs |= {f"style_{slot}": f"{name}.safetensors", f"style_{slot}_strength": strength}
    prompt["second"] = prompts.node("FlashLoraStack", **inputs)
    prompt[prompts.SAMPLER]["inputs"]["model"] = ["second", 0]
    prompt[prompts.TEXT]["inputs"]["clip"] = ["second", 1]
    prompt["report"] = prompts.node("PreviewAny", source=["second", 2])
    return prompt


def test_stacks_can_be_chained(client: Client, folder: Path) -> None:
    prompt = chained(stack(style_a=0.7), style_b=1.0, style_fights=1.0)
    report, run = report_of(client, prompt)
    expected = latent_of(client, stack(style_a=0.7, style_b=1.0, style_fights=1.0))
    assert distance(client.latent(run, "latent"), expected) < TOLERANCE
    # The second stack measures its styles against the first one's Flash LoRA, and names all styles.
    for name in ("style_a", "style_b", "style_fights"):
        assert f"{name}.safetensors: shares " in report
    assert "WARNING: style_fights.safetensors outweighs flash_demo.safetensors" in report


def test_two_flash_loras_raise_an_error_with_both_names(client: Client, folder: Path) -> None:
    copy = folder / "another_flash.safetensors"
    copy.write_bytes(SHIPPED.read_bytes())
    for prompt in (stack(another_flash=1.0), chained(stack(), another_flash=1.0)):
        message = refusal(client, prompt)
        assert f"two Flash LoRAs: {FLASH} and {copy.name}" in message
        assert "Keep one" in message
    prompt = stack()
    prompt["loader"] = prompts.node(
        "FlashLoraLoader", model=[prompts.MODELS, 0], lora_name="another_flash.safetensors", strength=1.0
    )
    prompt[prompts.LORA]["inputs"]["model"] = ["loader", 0]
    title = read_lora(SHIPPED).metadata.title
    assert f"'{title}' (already in the model) and {FLASH}" in refusal(client, prompt)
    # A LoRA at strength 0 does not count.
    assert client.run(stack(another_flash=0.0)).succeeded


def test_a_lora_for_another_base_raises_an_error_with_file_and_architectures(client: Client, folder: Path) -> None:
    message = refusal(client, stack(style_a=1.0, style_sd15=1.0))
    assert message.startswith("style_sd15.safetensors: ")
    assert "SD 1.5 (attn2 reads 768 channels)" in message
    assert "the Flash demo (attn2 reads 128 channels)" in message


def test_another_algorithm_raises_an_error_with_its_name(client: Client, folder: Path) -> None:
    message = refusal(client, stack(style_dora=1.0))
    assert "style_dora.safetensors" in message
    assert "DoRA" in message


def test_text_encoder_layers_need_the_clip(client: Client, folder: Path) -> None:
    report, _ = report_of(client, stack(style_a=1.0))
    layers = report.split("text encoder: ")[1].split(" layers")[0]
    matched, total = layers.split("/")
    assert matched == total
    assert int(total) >= len(TEXT_LAYERS)
    without, run = report_of(client, stack(style_a=1.0, clip=False))
    assert "text encoder layers; connect 'clip' to use them" in without
    assert run.succeeded
    assert "changes only the text encoder" in refusal(client, stack(style_text=1.0, clip=False))


def test_a_lora_with_only_text_encoder_layers_works(client: Client, folder: Path) -> None:
    expected = latent_of(client, one_after_another(style_text=0.8))
    assert distance(latent_of(client, stack(style_text=0.8)), expected) < TOLERANCE


def test_the_suggested_strength_ends_the_overlap_warning(client: Client, folder: Path) -> None:
    report, run = report_of(client, stack(style_fights=1.0))
    flash, style = (common_names(read_lora(path).modules) for path in (SHIPPED, folder / "style_fights.safetensors"))
    met = overlap(flash, style)
    assert f"shares {len(style)} of its {len(style)} layers" in report
    assert (
        f"its update is {met.size:.2f} times as large as the Flash LoRA's, 100% of it in the Flash LoRA's directions"
        in report
    )
    assert "WARNING: style_fights.safetensors outweighs" in report
    assert run.texts[prompts.LORA].startswith("WARNING: style_fights.safetensors outweighs")
    suggested = float(report.split("Suggested strength: ")[1].split("\n")[0])
    assert 0 < suggested < 1
    calm, run = report_of(client, stack(style_fights=suggested))
    assert "WARNING" not in calm
    assert run.texts[prompts.LORA] == "2 LoRAs, no conflict"


def test_styles_that_only_together_outweigh_the_flash_lora_give_a_warning(client: Client, folder: Path) -> None:
    flash, strengths = common_names(read_lora(SHIPPED).modules), {}
    for name, seed in (("style_c", 6), ("style_d", 7)):
        save_style(folder / f"{name}.safetensors", seed, 0.15)
        style = common_names(read_lora(folder / f"{name}.safetensors").modules)
        strengths[name] = 0.8 / overlap(flash, style).size  # alone smaller than the Flash LoRA, together larger
    report, _ = report_of(client, stack(**strengths))
    assert report.count("WARNING") == 1
    assert "WARNING: the styles together outweigh flash_demo.safetensors" in report
    found = re.search(r"Suggested strengths: style_c.safetensors (\S+), style_d.safetensors (\S+)", report)
    calm, _ = report_of(client, stack(style_c=float(found[1]), style_d=float(found[2])))
    assert "WARNING" not in calm


def test_styles_that_add_up_or_cancel_give_a_warning(client: Client, folder: Path) -> None:
    (folder / "style_twin.safetensors").write_bytes((folder / "style_a.safetensors").read_bytes())
    report, _ = report_of(client, stack("none", style_a=1.0, style_twin=1.0))
    # Twice the same: each at 1 / sqrt(2), and they are as large as two unrelated ones.
    assert (
        "style_a.safetensors and style_twin.safetensors change the model in the same direction (cosine +1.00)" in report
    )
    assert "Suggested strengths: 0.71 and 0.71" in report
    report, _ = report_of(client, stack("none", style_a=1.0, style_opposed=1.0))
    assert "style_a.safetensors and style_opposed.safetensors work against each other (cosine -1.00)" in report


def test_the_report_mentions_a_flash_lora_of_another_loader(client: Client, folder: Path) -> None:
    prompt = stack("none", style_b=1.0)
    prompt["loader"] = prompts.node("FlashLoraLoader", model=[prompts.MODELS, 0], lora_name=FLASH, strength=1.0)
    prompt[prompts.LORA]["inputs"]["model"] = ["loader", 0]
    report, run = report_of(client, prompt)
    assert "Choose it in flash_lora instead" in report
    assert distance(client.latent(run, "latent"), latent_of(client, stack(style_b=1.0))) < TOLERANCE
