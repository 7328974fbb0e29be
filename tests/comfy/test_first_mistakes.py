"""Mistakes of a first evening, through the real server, with the texts that a user reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from . import prompts
from .client import Client, Run
from .loras import save_random_lora, save_sd15_lora

pytestmark = pytest.mark.comfy

FLASH, TWIN, SD15, NO_LORA = (f"first_evening_{name}.safetensors" for name in ("flash", "twin", "sd15", "no_lora"))
BROKEN, FOUR_CHANNELS = "first_evening_nan.latent", "first_evening_4.latent"
Change = Callable[[prompts.Prompt], None]
node = prompts.node


@pytest.fixture(scope="module")
def files(server) -> Path:
    """Save LoRAs and a broken latent where ComfyUI lists them."""
    loras: Path = server.base / "models" / "loras"
    for name in (FLASH, TWIN):
        save_random_lora(loras / name, prompts.TEACHER)
    save_sd15_lora(loras / SD15)
    save_file({"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}, loras / NO_LORA)
    for name, tensor in {
        BROKEN: torch.full((1, 16, 16, 16), torch.nan),
        FOUR_CHANNELS: torch.ones(1, 4, 16, 16),
    }.items():
        save_file({"latent_tensor": tensor, "latent_format_version_0": torch.tensor([])}, server.base / "input" / name)
    return loras


def graph() -> prompts.Prompt:
    """Return the demo's text-to-image workflow with the Flash LoRA and a negative prompt that is not connected."""
    prompt = prompts.latents(FLASH, seed=1, steps=1, pictures=1)
    prompt["negative"] = node("CLIPTextEncode", clip=[prompts.MODELS, 1], text="")
    del prompt[prompts.SAVE], prompt[prompts.DECODE]
    return prompt


def sampler(**inputs: object) -> Change:
    return lambda prompt: prompt[prompts.SAMPLER]["inputs"].update(inputs)


def lora(name: str) -> Change:
    return lambda prompt: prompt[prompts.LORA]["inputs"].update(lora_name=name)


def no_lora(prompt: prompts.Prompt) -> None:
    prompt[prompts.SAMPLER]["inputs"]["model"] = [prompts.MODELS, 0]


def two_flash_loras(prompt: prompts.Prompt) -> None:
    prompt["twin"] = node("FlashLoraLoader", model=[prompts.LORA, 0], lora_name=TWIN, strength=1.0)
    prompt[prompts.SAMPLER]["inputs"]["model"] = ["twin", 0]


def latent_file(name: str) -> Change:
    def change(prompt: prompts.Prompt) -> None:
        prompt["file"] = node("LoadLatent", latent=name)
        prompt[prompts.SAMPLER]["inputs"]["latent_image"] = ["file", 0]

    return change


def face_swap_model(prompt: prompts.Prompt) -> None:
    no_lora(prompt)
    prompt[prompts.MODELS]["inputs"]["task"] = "face-swap"


def inpaint(prompt: prompts.Prompt, mask: float, vae: list) -> None:
    prompt["picture"] = node("EmptyImage", width=128, height=128, batch_size=1, color=0)
    prompt["mask"] = node("SolidMask", value=mask, width=128, height=128)
    prompt["prepare"] = node(
        "FlashInpaintPrepare",
        **{"model": [prompts.LORA, 0], "vae": vae, "positive": [prompts.TEXT, 0], "image": ["picture", 0]},
        **{"mask": ["mask", 0], "size": 0, "context": 1.5, "grow": 4, "feather": 16},
        **{f"pad_{side}": 0 for side in ("left", "top", "right", "bottom")},
    )
    prompt[prompts.SAMPLER]["inputs"].update(positive=["prepare", 0], latent_image=["prepare", 2])


def no_adapter(prompt: prompts.Prompt) -> None:
    prompt["picture"] = node("EmptyImage", width=128, height=128, batch_size=1, color=0)
    prompt["adapter"] = node(
        "FlashAdapterApply",
        **{"model": [prompts.LORA, 0], "positive": [prompts.TEXT, 0], "image": ["picture", 0]},
        **{"adapter_name": "gone.safetensors", "strength": 0.8, "steps": 4, "start_step": 1, "end_step": 4},
    )
    prompt[prompts.SAMPLER]["inputs"]["positive"] = ["adapter", 0]


def empty_mask(prompt: prompts.Prompt) -> None:
    inpaint(prompt, 0.0, [prompts.MODELS, 2])


def pixel_vae(prompt: prompts.Prompt) -> None:
    prompt["vae"] = node("VAELoader", vae_name="pixel_space")
    inpaint(prompt, 1.0, ["vae", 0])


def distil_without_prompts(prompt: prompts.Prompt) -> None:
    for name in (prompts.SAMPLER, "latent"):
        del prompt[name]
    prompt["distil"] = node(
        "FlashDistill",
        **{"model": [prompts.MODELS, 0], "clip": [prompts.MODELS, 1], "prompts": " \n", "name": "none"},
        **{"preset": "quick try", "width": 0, "height": 0, "guidance": 0.0, "seed": 0},
    )
    prompt["text"] = node("PreviewAny", source=["distil", 3])


# ComfyUI itself refuses a value that a widget does not offer, before the graph runs.
REFUSED: dict[str, tuple[Change, str]] = {
    "50 steps": (sampler(steps=50), "Value 50 bigger than max of 16"),
}

ERRORS: dict[str, tuple[Change, str]] = {
    "a LoRA that is not there": (
        lora("gone.safetensors"),
        "There is no LoRA 'gone.safetensors' in models/loras. Put the file there and press R to read the list again, "
        "or choose another LoRA.",
    ),
    "an adapter that is not there": (
        no_adapter,
        "There is no adapter 'gone.safetensors' in models/controlnet. Put the file there and press R to read the list "
        "again, or choose another adapter.",
    ),
    "a LoRA of another family": (
        lora(SD15),
        "This LoRA does not fit this model. It is for SD 1.5 (attn2 reads 768 channels); the model is the Flash demo "
        "(attn2 reads 128 channels). 0 of its 3 layers fit. These do not: layers that have another shape in the model: "
        "3, e.g. down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q. Load the checkpoint that the LoRA was "
        "made for, or a LoRA that was made for this model.",
    ),
    "a file that is no LoRA": (
        lora(NO_LORA),
        f"{NO_LORA} holds no LoRA layers, but 2 other tensors, e.g. 'bias'; expected pairs such as "
        "'<layer>.lora_down.weight' and '<layer>.lora_up.weight'. It may be a checkpoint, a VAE or an embedding. "
        "Choose a LoRA file",
    ),
    "two Flash LoRAs": (
        two_flash_loras,
        f"These are two Flash LoRAs: 'Flash LoRA' (already in the model) and {TWIN}. A model works with only one. Keep "
        "one, and set the other to 'none' (or remove its loader).",
    ),
    "cfg 7 without a negative prompt": (
        sampler(guidance=7.0),
        "guidance is 7. Above 1 it needs a negative prompt, but 'negative' is not connected. Connect a CLIP Text "
        "Encode (its text may be empty) to 'negative', or set guidance to 1.",
    ),
    "a latent of another VAE": (
        latent_file(FOUR_CHANNELS),
        "This latent has 4 channels; the model works on 16. Encode the picture with the VAE that belongs to this "
        "model.",
    ),
    "a NaN latent": (
        latent_file(BROKEN),
        "This latent holds NaN or infinite values; expected finite numbers. Check the node that makes it. The usual "
        "cause is a VAE or a model that overflows in half precision: start ComfyUI with --fp32-vae or --force-fp32.",
    ),
    "a face-swap model without pictures": (
        face_swap_model,
        "This model reads 33 channels beside its latent, but the prompt at 'positive' brings none. Attach them with "
        "Flash Concat Conditioning (a face-swap model: Flash Face Swap Prepare), or load an ordinary model.",
    ),
    "an empty mask": (
        empty_mask,
        "There is nothing to inpaint: the mask is empty. Paint a mask (right-click the picture of Load Image: Open in "
        "MaskEditor) and connect it to 'mask', or set a padding to extend the picture. White is redrawn; use Invert "
        "Mask for an inverted mask.",
    ),
    "a VAE of another kind": (
        pixel_vae,
        "This VAE makes latents of 3 channels; the model works on 16. Connect the VAE that belongs to the model.",
    ),
    "distilling without prompts": (
        distil_without_prompts,
        "There is no prompt. Write prompts, one a line, or connect encoded prompts to 'positive'.",
    ),
    "custom timesteps without a list": (
        sampler(grid="custom"),
        "The list of custom timesteps is empty. Write whole numbers of 0 to 999, separated by commas.",
    ),
    "a stochasticity that is no number": (
        sampler(stochasticity="high"),
        "stochasticity is 'high'; expected auto (the LoRA's own value), or a number from 0 (deterministic) to 1 (fresh "
        "noise at every step). Write auto, or correct the number.",
    ),
}

# The picture is drawn, and the node says what is odd.
TOLD: dict[str, tuple[Change, str]] = {
    "cfg 7 with a Flash LoRA": (
        sampler(guidance=7.0, negative=["negative", 0]),
        "WARNING: guidance 7; the Flash LoRA has guidance built in. Set guidance to 1.",
    ),
    "no few-step LoRA": (
        no_lora,
        "NOTE: no few-step LoRA is known in this model. Load it with Flash LoRA Loader, or choose its preset. A "
        "few-step checkpoint needs neither.",
    ),
    "more steps than the LoRA knows": (
        sampler(steps=12),
        "WARNING: 12 steps; the LoRA was trained for at most 4",
    ),
    "a preset of another family": (
        sampler(preset="SDXL-Lightning"),
        "WARNING: SDXL-Lightning is for SDXL; the model is the Flash demo",
    ),
}


def run(client: Client, change: Change) -> Run:
    prompt = graph()
    change(prompt)
    return client.run(prompt)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", REFUSED)
def test_comfyui_refuses_it(client: Client, name: str) -> None:
    change, words = REFUSED[name]
    with pytest.raises(Exception, match=re.escape(words)):
        run(client, change)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", ERRORS)
def test_the_error_says_what_to_do(client: Client, name: str) -> None:
    change, words = ERRORS[name]
    done = run(client, change)
    assert done.error is not None
    assert done.error["exception_message"].strip() == words


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", TOLD)
def test_the_node_says_what_is_odd(client: Client, name: str) -> None:
    change, words = TOLD[name]
    done = run(client, change)
    assert done.succeeded, done.error
    assert words in done.texts[prompts.SAMPLER].splitlines()
