"""ControlNets and T2I-adapters in few steps: equal to diffusers' stock pipelines, in exactly the chosen steps.

The same tiny networks, prompts, hints and noise on both sides. Flash Adapter Apply and Flash Sampler run in a process
with ComfyUI (``inside/adapters.py``), diffusers' pipelines here.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..families.adapters import save_weights, tiny_controlnet, tiny_t2i_adapter, tiny_unet
from ..families.networks import POOLED_WIDTH, TEXT_WIDTH, tiny_network
from . import prompts
from .client import Client
from .inside_comfyui import relative, run_inside

pytestmark = pytest.mark.comfy

SEED = 2024
TOLERANCE = 1e-4  # of the latent's standard deviation
SAME = 1e-5  # of it: convolutions round differently where numbers lie differently in memory
TIMESTEPS = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]}  # round(1000 (N - i) / N) - 1
SIZE = (1, 4, 16, 24)
ODD_SIZE = (1, 4, 15, 21)

ADAPTERS: dict[str, Any] = {
    "sd15_full_adapter": lambda: tiny_t2i_adapter("full_adapter", seed=1),
    "sd15_full_adapter2": lambda: tiny_t2i_adapter("full_adapter", seed=2),
    "sd15_grey_adapter": lambda: tiny_t2i_adapter("full_adapter", seed=3, in_channels=1),
    "sd15_light_adapter": lambda: tiny_t2i_adapter("light_adapter", seed=4),
    "sd15_controlnet": lambda: tiny_controlnet(tiny_unet("sd15"), seed=5),
    "sd15_controlnet2": lambda: tiny_controlnet(tiny_unet("sd15"), seed=6),
    "sdxl_full_adapter_xl": lambda: tiny_t2i_adapter("full_adapter_xl", seed=7),
    "sdxl_full_adapter_xl2": lambda: tiny_t2i_adapter("full_adapter_xl", seed=8),
    "sdxl_controlnet": lambda: tiny_controlnet(tiny_unet("sdxl"), seed=9),
    "sdxl_controlnet2": lambda: tiny_controlnet(tiny_unet("sdxl"), seed=10),
}


# Steps of a run, the first and the last that are steered.
WINDOWS = {
    "first": (4, 1, 1),
    "first half": (4, 1, 2),
    "middle": (4, 2, 3),
    "last": (4, 4, 4),
    "first of two": (2, 1, 1),
    "second of two": (2, 2, 2),
}


@dataclass(frozen=True)
class Case:
    """A run. ``adapters``: file, hint, strength, and the first and the last step."""

    model: str
    adapters: tuple[tuple[str, str, float, int, int], ...]
    steps: int = 4
    guidance: float = 1.0
    size: tuple[int, ...] = SIZE


def make_cases() -> dict[str, Case]:
    cases = {}
    for file in ADAPTERS:
        if not file.endswith("2"):
            hint = "grey" if "grey" in file else "hint"
            for steps in TIMESTEPS:
                cases[f"{file}, {steps}"] = Case(file.split("_")[0], ((file, hint, 0.8, 1, steps),), steps)
            cases[f"{file}, guided"] = Case(file.split("_")[0], ((file, hint, 0.8, 1, 8),), guidance=3.0)
            pair = ((file, hint, 0.8, 1, 8), (f"{file}2", "hint2", 0.5, 1, 8))
            if f"{file}2" in ADAPTERS:
                cases[f"{file}, two"] = Case(file.split("_")[0], pair)
    for family in ("sd15", "sdxl"):
        for window, (steps, start, end) in WINDOWS.items():
            cases[f"{family}_controlnet, {window}"] = Case(
                family, ((f"{family}_controlnet", "hint", 0.8, start, end),), steps
            )
    for file in ("sd15_full_adapter", "sdxl_full_adapter_xl"):
        for window, (steps, start, end) in WINDOWS.items():
            cases[f"{file}, {window}"] = Case(file.split("_")[0], ((file, "hint", 0.8, start, end),), steps)
    cases["sd15_full_adapter, odd"] = Case("sd15", (("sd15_full_adapter", "odd", 0.8, 1, 8),), size=ODD_SIZE)
    cases["sd15_light_adapter, odd"] = Case("sd15", (("sd15_light_adapter", "odd", 0.8, 1, 8),), size=ODD_SIZE)
    cases["both kinds"] = Case(
        "sdxl", (("sdxl_full_adapter_xl", "hint", 0.8, 1, 2), ("sdxl_controlnet", "hint2", 0.5, 1, 8))
    )
    return cases


CASES = make_cases()


def make_given() -> dict[str, Tensor]:
    """Prompts, and pictures of edges: mostly 0, some 1."""
    generator = torch.Generator().manual_seed(9)
    height, width = (8 * side for side in SIZE[2:])
    hints = (torch.rand(2, 3, height, width, generator=generator) > 0.8).float()
    odd = (torch.rand(1, 3, 8 * ODD_SIZE[2], 8 * ODD_SIZE[3], generator=generator) > 0.8).float()
    return {
        "positive": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "negative": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "positive.pooled": torch.randn(1, POOLED_WIDTH, generator=generator),
        "negative.pooled": torch.randn(1, POOLED_WIDTH, generator=generator),
        "hint": hints[:1],
        "hint2": hints[1:],
        "grey": hints[:1].mean(1, keepdim=True).expand(-1, 3, -1, -1).clone(),
        "odd": odd,
    }


@pytest.fixture(scope="module")
def adapters() -> dict[str, nn.Module]:
    return {name: build() for name, build in ADAPTERS.items()}


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, adapters: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files, run the script in ComfyUI's process, and return the folder with its results."""
    folder = tmp_path_factory.mktemp("adapters")
    for family in ("sd15", "sdxl", "sd3"):
        network = tiny_network("sd3") if family == "sd3" else tiny_unet(family)
        save_weights(network, folder / f"{family}.safetensors")
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
    for name, network in adapters.items():
        save_weights(network, folder / f"{name}.safetensors")
    save_file(make_given(), folder / "given.safetensors")
    four_levels = T2IAdapter(channels=[32, 64, 128, 128])
    save_weights(four_levels, folder / "four_levels.safetensors")
    # The layout of the original repository, in which the residual blocks are counted through.
    original = {}
    for name, value in adapters["sdxl_full_adapter_xl"].state_dict().items():
        renamed = re.sub(r"body\.(\d)\.resnets\.(\d)", lambda found: f"body.{2 * int(found[1]) + int(found[2])}", name)
        renamed = re.sub(r"body\.(\d)\.in_conv", lambda found: f"body.{2 * int(found[1])}.in_conv", renamed)
        original[renamed.removeprefix("adapter.")] = value
    save_file(original, folder / "original.safetensors")
    spoil(adapters, folder)
    (folder / "cases.json").write_text(json.dumps({name: asdict(case) for name, case in CASES.items()}))
    run_inside(runtime, "adapters.py", folder)
    return folder


def spoil(adapters: dict[str, nn.Module], folder: Path) -> None:
    """Write files that must raise an error."""
    weights = adapters["sd15_full_adapter"].state_dict()
    torch.save(weights, folder / "pickle.pth")
    (folder / "broken.safetensors").write_bytes((folder / "sd15_controlnet.safetensors").read_bytes()[:1000])
    save_file({name: value for name, value in weights.items() if ".body.1." not in name}, folder / "half.safetensors")
    controlnet = adapters["sd15_controlnet"].state_dict()
    half = {name: value for name, value in controlnet.items() if not name.startswith("mid_block.resnets.1")}
    save_file(half, folder / "half_controlnet.safetensors")
    wide = {
        name: torch.zeros(len(value), 2 * TEXT_WIDTH)
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        else value
        for name, value in controlnet.items()
    }
    save_file(wide, folder / "wide_text.safetensors")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "results")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "said.json").read_text())


# -- diffusers' side -------------------------------------------------------------------------------------------------


def scheduler() -> LCMScheduler:
    return LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)


def stock_run(case: Case, networks: dict[str, nn.Module]) -> Tensor:
    """Run diffusers' stock pipeline for this kind of adapter."""
    given = make_given()
    xl = case.model == "sdxl"
    chosen = [networks[file] for file, *_ in case.adapters]
    hints = [given[name] for _, name, *_ in case.adapters]
    scales = [strength for _, _, strength, *_ in case.adapters]
    *_, start, end = case.adapters[0]
    end = min(end, case.steps)
    several = len(chosen) > 1
    parts = {
        "vae": None,
        "tokenizer": None,
        "text_encoder": None,
        "unet": tiny_unet(case.model),
        "scheduler": scheduler(),
    }
    parts |= {"feature_extractor": None}
    parts |= {"tokenizer_2": None, "text_encoder_2": None} if xl else {"safety_checker": None}
    height, width = (8 * side for side in case.size[2:])
    arguments: dict[str, Any] = {}
    if isinstance(chosen[0], T2IAdapter):
        hints = [
            hint.mean(1, keepdim=True) if net.config.in_channels == 1 else hint
            for hint, net in zip(hints, chosen, strict=True)
        ]
        parts["adapter"] = MultiAdapter(chosen) if several else chosen[0]
        kind = StableDiffusionXLAdapterPipeline if xl else StableDiffusionAdapterPipeline
        arguments["adapter_conditioning_scale"] = scales if several else scales[0]
        assert start == 1
        if xl:
            arguments["adapter_conditioning_factor"] = end / case.steps
    else:
        assert isinstance(chosen[0], ControlNetModel)
        parts["controlnet"] = MultiControlNetModel(chosen) if several else chosen[0]
        kind = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
        arguments["controlnet_conditioning_scale"] = scales if several else scales[0]
        arguments["control_guidance_start"] = (start - 1) / case.steps
        arguments["control_guidance_end"] = end / case.steps
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    if xl:
        arguments |= {"pooled_prompt_embeds": given["positive.pooled"]}
        if case.guidance > 1:
            arguments |= {"negative_pooled_prompt_embeds": given["negative.pooled"]}
    return pipeline(
        prompt_embeds=given["positive"],
        negative_prompt_embeds=given["negative"] if case.guidance > 1 else None,
        image=hints if several else hints[0],
        height=height,
        width=width,
        timesteps=TIMESTEPS[case.steps],
        guidance_scale=case.guidance,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **arguments,
    ).images


def has_stock_pipeline(case: Case) -> bool:
    """Return whether diffusers has this range of steps: T2I-adapters end early only for SDXL, and never start late."""
    (file, _, _, start, end), *_ = case.adapters
    if "controlnet" in file or (start == 1 and end >= case.steps):
        return True
    return case.model == "sdxl" and start == 1


@torch.no_grad()
def t2i_window(case: Case, networks: dict[str, nn.Module]) -> Tensor:
    """Run the stock pipeline's networks and scheduler in a loop, with a T2I-adapter in some steps."""
    given, unet = make_given(), tiny_unet(case.model)
    ((file, hint, strength, start, end),) = case.adapters
    prompt: dict[str, Any] = {"encoder_hidden_states": given["positive"]}
    if case.model == "sdxl":
        height, width = (8.0 * side for side in SIZE[2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]])
        prompt["added_cond_kwargs"] = {"text_embeds": given["positive.pooled"], "time_ids": sizes}
    maps = [strength * value for value in networks[file](given[hint])]
    generator = torch.Generator().manual_seed(SEED)
    z = torch.randn(SIZE, generator=generator)
    lcm = scheduler()
    lcm.set_timesteps(timesteps=TIMESTEPS[case.steps])
    for step, t in enumerate(lcm.timesteps, 1):
        steered = [value.clone() for value in maps] if start <= step <= end else None
        output = unet(z, t, down_intrablock_additional_residuals=steered, **prompt).sample
        z = lcm.step(output, t, z, generator=generator).prev_sample
    return z


@torch.no_grad()
def both_kinds(networks: dict[str, nn.Module]) -> Tensor:
    """Run the networks in a loop: a T2I-adapter in steps 1 and 2, a ControlNet in all. No stock pipeline has both."""
    given, unet = make_given(), tiny_unet("sdxl")
    generator = torch.Generator().manual_seed(SEED)
    z = torch.randn(SIZE, generator=generator)
    lcm = scheduler()
    lcm.set_timesteps(timesteps=TIMESTEPS[4])
    height, width = (8.0 * side for side in SIZE[2:])
    added = {
        "text_embeds": given["positive.pooled"],
        "time_ids": torch.tensor([[height, width, 0, 0, height, width]]),
    }
    maps = [0.8 * value for value in networks["sdxl_full_adapter_xl"](given["hint"])]
    for step, t in enumerate(lcm.timesteps):
        prompt = {"encoder_hidden_states": given["positive"], "added_cond_kwargs": added}
        down, middle = networks["sdxl_controlnet"](
            z, t, controlnet_cond=given["hint2"], conditioning_scale=0.5, return_dict=False, **prompt
        )
        adapter = [value.clone() for value in maps] if step < 2 else None
        output = unet(
            z,
            t,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            down_intrablock_additional_residuals=adapter,
            **prompt,
        ).sample
        z = lcm.step(output, t, z, generator=generator).prev_sample
    return z


# -- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_adapters_equal_diffusers_stock_pipelines(
    results: dict[str, Tensor], adapters: dict[str, nn.Module], name: str
) -> None:
    if name == "both kinds":
        theirs = both_kinds(adapters)
    elif has_stock_pipeline(CASES[name]):
        theirs = stock_run(CASES[name], adapters)
    else:
        theirs = t2i_window(CASES[name], adapters)
    assert relative(results[name], theirs) < TOLERANCE


def test_adapters_change_the_picture(results: dict[str, Tensor]) -> None:
    for name in ADAPTERS:
        if not name.endswith("2"):
            plain = results["plain sdxl" if name.startswith("sdxl") else "plain"]
            assert relative(results[f"{name}, 4"], plain) > 100 * TOLERANCE, name
    assert relative(results["sdxl_full_adapter_xl, 4"], results["sdxl_full_adapter_xl, first"]) > 10 * TOLERANCE


def test_adapters_equal_those_of_comfyuis_own_loader(results: dict[str, Tensor]) -> None:
    assert relative(results["core's T2I-adapter"], results["sdxl_full_adapter_xl, 4"]) < SAME
    assert relative(results["the original layout"], results["sdxl_full_adapter_xl, 4"]) < SAME
    assert relative(results["core's and ours"], results["sdxl_full_adapter_xl, two"]) < SAME


def test_a_hint_is_resized_to_a_multiple_of_the_unshuffle_factor(results: dict[str, Tensor]) -> None:
    """120 x 168 pixels, factor 16: ComfyUI would skip maps of another size, with only a line in its log."""
    assert relative(results["sdxl, odd"], results["plain sdxl, odd"]) > 100 * TOLERANCE


def test_the_adapter_works_exactly_from_start_step_to_end_step(said: dict[str, Any]) -> None:
    windows = said["windows"]
    assert len(windows) > 6 * 150
    for name, (count, start, end, asked) in windows.items():
        assert asked == [start <= step <= end for step in range(1, count + 1)], name


# -- what a user may connect -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "same"),
    [
        ("RGBA", "steered"),
        ("grey", "three greys"),
        ("mask", "three greys"),
        ("one pixel", "a plain colour"),
        ("half the size", "half the size, enlarged"),
        ("huge", "steered"),
        ("three hints for two", "two hints"),
        ("two hints for three", "three hints"),
        ("negative from elsewhere", "negative from here"),
        ("a loaded ControlNet", "core's node"),
    ],
)
def test_two_ways_give_the_same_latent(results: dict[str, Tensor], ours: str, same: str) -> None:
    assert relative(results[ours], results[same]) < SAME


def test_strength_0_equals_no_adapter_bit_for_bit(results: dict[str, Tensor]) -> None:
    assert torch.equal(results["strength 0"], results["plain"])


@pytest.mark.parametrize("guided", ["", ", guided"])
def test_each_picture_of_a_batch_has_its_own_hint(results: dict[str, Tensor], guided: str) -> None:
    two = results[f"two hints{guided}"]
    assert relative(two[0], results[f"the first for both{guided}"][0]) < SAME
    assert relative(two[1], results[f"the second for both{guided}"][1]) < SAME


def test_the_inputs_are_not_changed_in_place(results: dict[str, Tensor]) -> None:
    assert bool(results["nothing is changed in place"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("T2I-adapter of SD 1.5 on SDXL", ["sd15_full_adapter", "T2I-adapter", "32, 64, 64", "the model is SDXL"]),
        ("T2I-adapter of SDXL on SD 1.5", ["sdxl_full_adapter_xl", "at 1/16, 1/16, 1/32", "the model is SD 1.5"]),
        ("T2I-adapter on SD3", ["T2I-adapter", "the model is SD3"]),
        ("ControlNet of SD 1.5 on SDXL", ["ControlNet", "the model is SDXL", "a vector of 72"]),
        ("ControlNet of SDXL on SD 1.5", ["a vector of 72", "the model is SD 1.5"]),
        ("ControlNet on SD3", ["ControlNet", "the model is SD3"]),
        ("another text width", ["text of width 64", "text of width 32"]),
        ("a loaded one on SDXL", ["The adapter at control_net", "the model is SDXL"]),
        ("a pickle", ["pickle.pth is not a .safetensors file", "convert"]),
        ("a broken file", ["broken.safetensors is broken", "again"]),
        ("a model", ["no ControlNet or T2I-adapter", "Load Checkpoint"]),
        ("half an adapter", ["half.safetensors", "do not fit together"]),
        ("half a ControlNet", ["half_controlnet.safetensors", "mid"]),
        ("neither", ["no adapter", "adapter_name", "control_net"]),
        ("both", ["two adapters", "'none'"]),
        ("no CONTROL_NET", ["a str", "expected a ControlNet"]),
        ("the end before the start", ["end_step is 2", "start_step is 3"]),
        ("denoise 0", ["denoise is 0", "above 0"]),
        ("beyond the run", ["start_step is 5", "4 evaluations"]),
        ("beyond a shortened run", ["start_step is 3", "2 evaluations"]),
        ("two channels", ["(1, 128, 192, 2)", "1, 3 or 4 channels"]),
        ("no pictures", ["(0, 128, 192, 3)"]),
        ("not a number", ["finite"]),
        ("a ControlNet that reads latents", ["as a latent", "VAE to 'vae'"]),
    ],
)
def test_wrong_input_raises_a_readable_error(said: dict[str, Any], name: str, parts: list[str]) -> None:
    assert name in said["refused"], f"{name}: no error was raised"
    for part in parts:
        assert part in said["refused"][name]


# -- published sizes -------------------------------------------------------------------------------------------------


def test_maps_are_added_at_the_blocks_of_comfyuis_own_adapters(said: dict[str, Any]) -> None:
    """By hand, from the lists that ComfyUI's adapter class makes for SD 1.5 and SDXL: block, channels, scale."""
    stable = [[2, 320, 1], [5, 640, 2], [8, 1280, 4], [11, 1280, 8], [None, 1280, 8]]
    places = said["published"]["places"]
    assert places == {
        "SD 1.5": stable,
        "SD 2": stable,
        "SDXL": [[3, 320, 2], [5, 640, 2], [8, 1280, 4], [None, 1280, 4]],
    }
    assert said["published"]["same lists"]
    assert said["published"]["largest difference"] < 1e-5


FITTING = {
    "ControlNet of SD 1.5": {"SD 1.5"},
    "ControlNet of SD 2": {"SD 2"},
    "ControlNet of SDXL": {"SDXL"},
    "small ControlNet of SDXL": {"SDXL"},
    "ControlNet of SD3": {"SD3"},
    "Control-LoRA of SDXL": {"SDXL"},
    "T2I-adapter of SD 1.5": {"SD 1.5", "SD 2"},  # it reads no text, in which alone they differ
    "T2I-adapter of SDXL": {"SDXL"},
}


@pytest.mark.parametrize("adapter", FITTING)
@pytest.mark.parametrize("model", ["SD 1.5", "SD 2", "SDXL", "SD3"])
def test_a_published_adapter_for_another_model_raises_an_error_with_both_names(
    said: dict[str, Any], adapter: str, model: str
) -> None:
    kind, made_for = adapter.removeprefix("small ").split(" of ")
    outcome = said["published"]["matrix"][f"{adapter} on {model}"]
    if model in FITTING[adapter]:
        assert outcome == kind
    else:
        kind = "ControlNet" if kind == "Control-LoRA" else kind
        assert outcome.startswith(f"refused: {adapter} is a {kind} for {made_for} (")
        assert f"the model is {model} (" in outcome


# -- on the page -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_adapter(server: Any) -> str:
    """Make a random T2I-adapter for the demo's UNet, whose first level has no attention, as in SDXL."""
    torch.manual_seed(3)
    path = server.base / "models" / "controlnet" / "for_the_demo.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_weights(T2IAdapter(channels=[64, 128, 128, 128], downscale_factor=16, adapter_type="full_adapter_xl"), path)
    return path.name


def demo_graph(server: Any, adapter: str, **settings: Any) -> prompts.Prompt:
    """Make the shipped workflow with an adapter on its prompt."""
    Image.fromarray(np.eye(128, dtype=np.uint8) * 255).save(server.base / "input" / "diagonal.png")
    lora = prompts.shipped()[prompts.LORA]["inputs"]["lora_name"]
    prompt = prompts.latents(lora, seed=3, steps=2, pictures=1)
    prompt["hint"] = prompts.node("LoadImage", image="diagonal.png")
    inputs = {"strength": 0.8, "steps": 2, "start_step": 1, "end_step": 8, **settings}
    prompt["adapter"] = prompts.node(
        "FlashAdapterApply",
        model=[prompts.LORA, 0],
        positive=[prompts.TEXT, 0],
        image=["hint", 0],
        adapter_name=adapter,
        **inputs,
    )
    prompt[prompts.SAMPLER]["inputs"]["positive"] = ["adapter", 0]
    return prompt


def test_the_node_runs_on_the_demo(client: Client, server: Any, demo_adapter: str) -> None:
    latents = {}
    for strength in (0.0, 0.8):
        run = client.run(demo_graph(server, demo_adapter, strength=strength))
        assert run.succeeded, run.error
        latents[strength] = client.latent(run, "latent")
    assert not torch.equal(latents[0.0], latents[0.8])
    assert run.texts["adapter"] == "T2I-adapter: steps 1 to 2 of 2 (t = 999, 499), x 0.8"


def test_errors_are_shown_on_the_page(client: Client, server: Any, demo_adapter: str) -> None:
    run = client.run(demo_graph(server, demo_adapter, start_step=3))
    assert run.error is not None
    assert "start_step is 3, but this run has 2 evaluations" in run.error["exception_message"]
