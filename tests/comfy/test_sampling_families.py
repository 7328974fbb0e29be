"""Few-step sampling of every family in ComfyUI: equal to diffusers, to itself, and to core's own sampler.

Tiny networks of the true architectures with random weights; the same weights, conditioning and noise on both sides.
Flash Sampler runs in a process with ComfyUI (``inside/sampling_families.py``), diffusers' schedulers here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..families.networks import POOLED_WIDTH, SD3_POOLED_WIDTH, TEXT_WIDTH, tiny_network
from .inside_comfyui import relative, run_inside

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

FAMILIES = ("sd15", "sd21", "sdxl", "pixart_alpha", "pixart_sigma", "sd3", "sd35")
FEATURE_FAMILIES = ("sd15", "sdxl", "pixart_sigma", "sd3")  # one of each kind of network
STEPS = (1, 2, 3, 4, 6, 8)
SEED = 2024
TOLERANCE = 1e-4  # of the latent's standard deviation; measured: 5e-6, the target is 1e-3

# By hand: round(1000 (N - i) / N) - 1, and 1000 x 3 u / (1 + 2 u) at u = (N - i) / N.
TRAINED = {
    1: [999],
    2: [999, 499],
    3: [999, 666, 332],
    4: [999, 749, 499, 249],
    6: [999, 832, 666, 499, 332, 166],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
}
TRAINED_FLOW = {
    1: [1000],
    2: [1000, 750],
    3: [1000, 6000 / 7, 600],
    4: [1000, 900, 750, 500],
    6: [1000, 937.5, 6000 / 7, 750, 600, 375],
    8: [1000, 21000 / 22, 900, 15000 / 18, 750, 9000 / 14, 500, 300],
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PIXART_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


def is_flow(family: str) -> bool:
    return family.startswith("sd3")


def make_given(family: str) -> dict[str, Tensor]:
    """Make two prompts, a negative prompt, and a picture's latent."""
    # PixArt's position embeddings are equal on both sides at these sizes only (see tests/families/networks.py).
    height, width = (40, 48) if family.startswith("pixart") else (16, 24)
    generator = torch.Generator().manual_seed(9)
    given = {
        "positive": torch.randn(2, 7, TEXT_WIDTH, generator=generator),
        "negative": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "picture": torch.randn(1, 16 if is_flow(family) else 4, height, width, generator=generator),
    }
    pooled = {"sdxl": POOLED_WIDTH, "sd3": SD3_POOLED_WIDTH, "sd35": SD3_POOLED_WIDTH}.get(family)
    if pooled is not None:
        given["positive.pooled"] = torch.randn(2, pooled, generator=generator)
        given["negative.pooled"] = torch.randn(1, pooled, generator=generator)
    return given


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the networks, run the script in ComfyUI's process, and return the folder with its results."""
    folder = tmp_path_factory.mktemp("sampling_families")
    for family in FAMILIES:
        network = tiny_network(family)
        save_file(
            {key: value.contiguous() for key, value in network.state_dict().items()}, folder / f"{family}.safetensors"
        )
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
        save_file(make_given(family), folder / f"{family}.given.safetensors")
    run_inside(runtime, "sampling_families.py", folder, *FAMILIES)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def results(folder: Path, family: str) -> dict[str, Tensor]:
    return load_file(folder / f"{family}.results")


@pytest.fixture(scope="module")
def grids(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "grids.json").read_text())


@pytest.fixture(scope="module")
def network(family: str) -> nn.Module:
    return tiny_network(family)


# -- diffusers' side -------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(family: str, network: nn.Module, z: Tensor, t: Tensor, name: str) -> Tensor:
    """Return the diffusers network's output, conditioned as in its stock pipeline."""
    given = make_given(family)
    text, pooled = given[name][:1], given.get(f"{name}.pooled")
    t = t.reshape(1).to(z.dtype) if is_flow(family) else t.reshape(1)
    if is_flow(family):
        return network(z, encoder_hidden_states=text, pooled_projections=pooled[:1], timestep=t).sample
    height, width = (8.0 * side for side in z.shape[-2:])
    if family == "sdxl":
        size = torch.tensor([[height, width, 0, 0, height, width]])
        extras = {"added_cond_kwargs": {"text_embeds": pooled[:1], "time_ids": size}}
    elif family == "pixart_alpha":
        resolution, ratio = torch.tensor([[height, width]]), torch.tensor([[height / width]])
        extras = {"added_cond_kwargs": {"resolution": resolution, "aspect_ratio": ratio}}
    elif family == "pixart_sigma":
        extras = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    else:
        extras = {}
    if family.startswith("pixart"):
        return network(z, encoder_hidden_states=text, timestep=t, **extras).sample.chunk(2, 1)[0]
    return network(z, t, encoder_hidden_states=text, **extras).sample


def few_step_scheduler(family: str, timesteps: list[float] | None, steps: int = 4, **options: Any) -> Any:
    """Make diffusers' scheduler with these timesteps, or with its default timesteps."""
    if is_flow(family):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
        if timesteps is None:
            scheduler.set_timesteps(steps)
        else:
            unshifted = [t / 1000 / (3 - 2 * t / 1000) for t in timesteps]  # it shifts what it is given
            scheduler.set_timesteps(sigmas=unshifted)
        return scheduler
    betas = PIXART_BETAS if family.startswith("pixart") else BETAS
    prediction = "v_prediction" if family == "sd21" else "epsilon"
    scheduler = LCMScheduler(**betas, prediction_type=prediction, clip_sample=False, **options)
    scheduler.set_timesteps(**({"num_inference_steps": steps} if timesteps is None else {"timesteps": timesteps}))
    return scheduler


def diffusers_run(
    family: str, network: nn.Module, scheduler: Any, *, guidance: float = 1.0, picture: Tensor | None = None
) -> Tensor:
    """Run the loop of a stock pipeline with one generator; its first draw is the first noise."""
    generator = torch.Generator().manual_seed(SEED)
    z = torch.randn(make_given(family)["picture"].shape, generator=generator)
    if picture is not None and is_flow(family):
        z = scheduler.scale_noise(picture, scheduler.timesteps[:1], z)
    elif picture is not None:
        z = scheduler.add_noise(picture, z, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        output = predict(family, network, z, t, "positive")
        if guidance != 1:
            unconditional = predict(family, network, z, t, "negative")
            output = unconditional + guidance * (output - unconditional)
        z = scheduler.step(output, t, z, generator=generator).prev_sample
    return z


# -- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
def test_the_trained_grid_is_exact(grids: dict[str, Any], family: str, steps: int) -> None:
    grid = grids[f"{family}.{steps}"]
    expected = (TRAINED_FLOW if is_flow(family) else TRAINED)[steps]
    assert grid["timesteps"] == pytest.approx(expected)
    assert grid["told"] == pytest.approx(expected, rel=1e-6)  # what the network hears at these noise levels
    assert grid["sigmas"][-1] == 0


@pytest.mark.parametrize("steps", STEPS)
def test_flash_sampler_equals_diffusers_on_the_trained_grid(
    results: dict[str, Tensor], family: str, network: nn.Module, steps: int
) -> None:
    timesteps = (TRAINED_FLOW if is_flow(family) else TRAINED)[steps]
    expected = diffusers_run(family, network, few_step_scheduler(family, timesteps))
    assert relative(results[f"trained.{steps}"], expected) < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
def test_the_reference_grid_equals_diffusers_by_default(
    results: dict[str, Tensor], grids: dict[str, Any], family: str, network: nn.Module, steps: int
) -> None:
    scheduler = few_step_scheduler(family, None, steps)
    assert grids[f"{family}.reference.{steps}"]["timesteps"] == pytest.approx(scheduler.timesteps.tolist(), rel=1e-4)
    expected = diffusers_run(family, network, scheduler)
    assert relative(results[f"reference.{steps}"], expected) < TOLERANCE


def test_custom_timesteps_equal_diffusers(results: dict[str, Tensor], family: str, network: nn.Module) -> None:
    scheduler = few_step_scheduler(family, [1000, 640, 123.5] if is_flow(family) else [999, 600, 123])
    assert relative(results["custom"], diffusers_run(family, network, scheduler)) < TOLERANCE


def test_guidance_equals_diffusers(results: dict[str, Tensor], family: str, network: nn.Module) -> None:
    scheduler = few_step_scheduler(family, (TRAINED_FLOW if is_flow(family) else TRAINED)[4])
    assert relative(results["guided"], diffusers_run(family, network, scheduler, guidance=3.0)) < TOLERANCE
    assert relative(results["guided"], results["trained.4"]) > 0.1


def test_stochasticity_0_equals_ddim_or_euler(results: dict[str, Tensor], family: str, network: nn.Module) -> None:
    timesteps = (TRAINED_FLOW if is_flow(family) else TRAINED)[4]
    scheduler = few_step_scheduler(family, timesteps)
    if is_flow(family):
        scheduler.config.stochastic_sampling = False
    else:
        scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == timesteps
    assert relative(results["deterministic"], diffusers_run(family, network, scheduler)) < TOLERANCE


@pytest.mark.parametrize(("denoise", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_image_to_image_equals_diffusers_from_the_trained_timestep(
    results: dict[str, Tensor], family: str, network: nn.Module, denoise: float, kept: int
) -> None:
    timesteps = (TRAINED_FLOW if is_flow(family) else TRAINED)[4][-kept:]
    scheduler = few_step_scheduler(family, timesteps)
    expected = diffusers_run(family, network, scheduler, picture=make_given(family)["picture"])
    assert relative(results[f"denoise.{denoise}"], expected) < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
def test_zero_terminal_snr_is_close_to_diffusers(folder: Path, steps: int) -> None:
    """ComfyUI's last noise level is 4519 instead of infinity, so a v model's z0 keeps 1 / 4519 of the noise.

    In diffusers z0 keeps no noise. The later, finite noise levels reduce the difference.
    """
    scheduler = few_step_scheduler("sd21", TRAINED[steps], rescale_betas_zero_snr=True)
    expected = diffusers_run("sd21", tiny_network("sd21"), scheduler)
    got = load_file(folder / "zero_terminal_snr.results")[str(steps)]
    assert relative(got, expected) < (3e-3 if steps == 1 else 1e-3)


# -- noise -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_picture_bit_by_bit(results: dict[str, Tensor]) -> None:
    assert torch.equal(results["again"], results["trained.4"])
    assert torch.equal(results["alone.0"], results["trained.4"])


@pytest.mark.parametrize("place", range(4))
def test_a_picture_does_not_depend_on_its_place_in_the_batch(results: dict[str, Tensor], place: int) -> None:
    """Its noise does not depend on the place at all; networks only round differently for another batch size."""
    assert relative(results[f"alone.{place}"], results["batch"][place : place + 1]) < TOLERANCE
    other = results["batch"][(place + 1) % 4][None]
    assert relative(results[f"alone.{place}"], other) > 0.1


# -- what KSampler does ----------------------------------------------------------------------------------------------

FEATURES = (
    "guidance",
    "mask",
    "mask with denoise and guidance",
    "area",
    "masked conditioning",
    "batch of two prompts",
    "odd size",
    "a prompt for the later steps",
)


@pytest.mark.parametrize("family", FEATURE_FAMILIES, indirect=True)
@pytest.mark.parametrize("feature", FEATURES)
def test_masks_areas_and_the_like_work_as_in_cores_sampler(results: dict[str, Tensor], feature: str) -> None:
    assert relative(results[f"{feature}.ours"], results[f"{feature}.core"]) < TOLERANCE
    if feature != "odd size":
        assert relative(results[f"{feature}.without"], results[f"{feature}.core"]) > 0.01  # it does something


@pytest.mark.parametrize("family", FEATURE_FAMILIES, indirect=True)
@pytest.mark.parametrize("feature", FEATURES)
def test_fresh_noise_keeps_shapes_and_is_finite(results: dict[str, Tensor], feature: str) -> None:
    assert results[f"{feature}.fresh"].shape == results[f"{feature}.core"].shape
    assert bool(torch.isfinite(results[f"{feature}.fresh"]).all())


@pytest.mark.parametrize("family", FEATURE_FAMILIES, indirect=True)
@pytest.mark.parametrize("case", ["mask.fresh", "mask.ours", "mask with denoise and guidance.fresh"])
def test_a_mask_keeps_the_rest_of_the_picture(results: dict[str, Tensor], family: str, case: str) -> None:
    picture = make_given(family)["picture"]
    edge = picture.shape[-1] // 2 + 1
    assert relative(results[case][..., edge:], picture[..., edge:]) < 1e-5
    assert relative(results[case][..., : edge - 1], picture[..., : edge - 1]) > 0.5


def test_a_controlnet_works_as_in_cores_sampler(folder: Path) -> None:
    results = load_file(folder / "sd15.results")
    assert relative(results["ControlNet.ours"], results["ControlNet.core"]) < TOLERANCE
    assert relative(results["ControlNet.without"], results["ControlNet.core"]) > 0.01


# -- grids of models that other nodes have changed, and of LoRAs that say what they are ------------------------------


@pytest.mark.parametrize(
    ("name", "timesteps", "text"),
    [
        ("sd15.4", [999, 749, 499, 249], "t = 999, 749, 499, 249\n(4 evaluations, predicts epsilon)"),
        ("sd21.1", [999], "t = 999\n(1 evaluation, predicts v)"),
        ("sd3.4", [1000, 900, 750, 500], "t = 1000, 900, 750, 500\n(4 evaluations, flow shift 3)"),
        ("shift 5", [1000, 937.5, 2500 / 3, 625], "t = 1000, 937.5, 833.3, 625\n(4 evaluations, flow shift 5)"),
        (
            "shift 5, LoRA of shift 3",
            [1000, 900, 750, 500],
            "(4 evaluations, flow shift 3, from the LoRA; the model's shift 5 is not used)",
        ),
        ("shift 5, LoRA of shift 3, 3 steps", [1000, 6000 / 7, 600], "the LoRA was trained for 1, 2, 4 steps)"),
        ("AuraFlow", [1000, 838.449, 633.700, 365.750], "flow shift 1.73"),
        ("Flux", [1000, 904.530, 759.511, 512.844], "flow shift 3.158"),
        ("Flux, reference", [1000, 904.530, 759.511, 512.844], "flow shift 3.158"),
        ("v by node", [999, 749, 499, 249], "predicts v"),
        ("x0 by node", [999, 749, 499, 249], "predicts the clean latent"),
        ("zero terminal SNR by node", [999, 749, 499, 249], "predicts v"),
        ("lcm by node, reference", [999, 759, 499, 259], "predicts epsilon"),
        ("the LoRA's own", [999, 700, 400, 100], "t = 999, 700, 400, 100\n(4 evaluations, predicts epsilon)"),
        ("the LoRA's own, half", [400, 100], "2 evaluations"),
        ("the LoRA's own, 3 steps", [999, 666, 332], "the LoRA was trained for 4 steps)"),
        ("the LoRA's own, but reference", [999, 759, 499, 259], "predicts epsilon)"),
        ("custom, half", [590, 400, 10], "3 evaluations"),
    ],
)
def test_grids_follow_the_model_and_the_lora(
    grids: dict[str, Any], name: str, timesteps: list[float], text: str
) -> None:
    assert grids[name].get("error") is None
    assert grids[name]["timesteps"] == pytest.approx(timesteps, rel=1e-5)
    assert text in grids[name]["text"]
    scale = 1 / 1000 if name == "AuraFlow" else 1  # the one model that is told the noise level itself
    told = [t * scale for t in timesteps]
    if not name.startswith("Flux"):
        assert grids[name]["told"] == pytest.approx(told, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lcm by node", ["cannot be evaluated at t = 749", "'lcm'", "Remove this node", "'reference'"]),
        ("EDM by node", ["samples with ModelSamplingContinuousEDM", "remove a ModelSamplingContinuousEDM node"]),
        ("Stable Cascade by node", ["StableCascadeSampling", "no trained timesteps"]),
        ("image to image by node", ["IMG_TO_IMG", "no trained timesteps"]),
        ("LoRA for v on epsilon", ["predicts v (base SD 2)", "predicts epsilon", "set to 'v_prediction'"]),
        ("LoRA for flow on epsilon", ["predicts a velocity (flow) (base SD3)", "Load the checkpoint"]),
        ("LoRA for epsilon on flow", ["predicts epsilon (base SDXL)", "a velocity (flow)", "Load the checkpoint"]),
        ("a broken header", ["[499.0, 1999.0] for 2 steps", "whole numbers of 0 to 999, in descending order"]),
        ("no such grid", ["'karras'", "trained, reference, custom"]),
        ("custom, ascending", ["must descend"]),
    ],
)
def test_a_wrong_model_or_grid_raises_a_readable_error(grids: dict[str, Any], name: str, parts: list[str]) -> None:
    for part in parts:
        assert part in grids[name]["error"]


def test_wrong_pixart_sizes_raise_a_readable_error(grids: dict[str, Any]) -> None:
    assert len(grids["sizes"]) == 3
    assert "384 x 328 pixels" in grids["sizes"][0]
    assert all("multiples of 16 pixels and height + width of 528 pixels or more" in said for said in grids["sizes"])
