"""Few-step sampling of tiny models of every family (see ``test_sampling_families.py``).

python sampling_families.py COMFYUI ROOT FOLDER FAMILY...

FOLDER holds, for each family, the diffusers network's weights and configuration and what it is conditioned on:
``FAMILY.safetensors``, ``FAMILY.json`` and ``FAMILY.given.safetensors``. Written there are ``FAMILY.results``, latents
as the network sees them, and ``grids.json``: the timesteps, noise levels and text of each grid, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from boot import boot

SEED = 2024
STEPS = (1, 2, 3, 4, 6, 8)
FEATURE_FAMILIES = ("sd15", "sdxl", "pixart_sigma", "sd3")  # one of each kind of network
CUSTOM = {"vp": "999, 600, 123", "flow": "1000, 640, 123.5"}
GUIDANCE = 3.0


def main(comfyui: Path, root: Path, folder: Path, *families: str) -> None:
    """Sample each family's model, then describe grids of changed models and of LoRAs."""
    boot(comfyui, root)
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    models, grids = {}, {}
    with torch.inference_mode():
        for family in families:
            models[family] = load(family, folder)
            given = load_file(folder / f"{family}.given.safetensors")
            results = parity(family, models[family], given, grids)
            if family in FEATURE_FAMILIES:
                results |= features(family, models[family], given)
            save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{family}.results")
        special_grids(models, grids)
        grids["sizes"] = refused_sizes(models["pixart_sigma"], load_file(folder / "pixart_sigma.given.safetensors"))
        results = zero_terminal_snr(folder, load_file(folder / "sd21.given.safetensors"))
        save_file({name: value.contiguous() for name, value in results.items()}, folder / "zero_terminal_snr.results")
    (folder / "grids.json").write_text(json.dumps(grids))


def load(family, folder, **options):
    """The family's MODEL."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
    from safetensors.torch import load_file
    from tiny import tiny_model

    config = json.loads((folder / f"{family}.json").read_text())
    model = tiny_model(family, load_file(folder / f"{family}.safetensors"), config, **options)
    if family == "sdxl":
        model.model.embedder = Timestep(config["addition_time_embed_dim"])  # 256 in the published model
    return model


def conditioning(given, name, rows=slice(0, 1)):
    """A CONDITIONING of the family's text embeddings."""
    extras = {"pooled_output": given[f"{name}.pooled"][rows]} if f"{name}.pooled" in given else {}
    return [[given[name][rows], extras]]


def sample(model, positive, latent, *, seed=SEED, steps=4, guidance=1.0, denoise=1.0, **options):
    """Run Flash Sampler's ``execute`` and return the latent as the network sees it."""
    from dropped_in.nodes.sampling.nodes import FlashSampler

    result = FlashSampler.execute(model, positive, latent, seed, steps, guidance, denoise, **options)
    return model.model.process_latent_in(result.args[0]["samples"])


def describe(model, *arguments, metadata=None):
    """Describe a grid, or return its error."""
    from dropped_in.nodes.sampling.few_step import METADATA_KEY, flash_grid

    if metadata is not None:
        model = model.clone()
        model.set_attachments(METADATA_KEY, metadata)
    try:
        grid = flash_grid(model, *arguments)
    except ValueError as error:
        return {"error": str(error)}
    told = model.get_model_object("model_sampling").timestep(grid.sigmas[:-1])
    return {
        "timesteps": list(grid.timesteps),
        "sigmas": grid.sigmas.tolist(),
        "told": told.tolist(),
        "text": grid.text,
    }


def parity(family, model, given, grids):
    """Sample the cases that tests compare with diffusers, with a repetition, and with another place in a batch."""
    import torch

    positive, negative = conditioning(given, "positive"), conditioning(given, "negative")
    picture = given["picture"]
    flow = family.startswith("sd3")
    empty = {"samples": torch.zeros_like(picture)}
    results = {}
    for steps in STEPS:
        results[f"trained.{steps}"] = sample(model, positive, empty, steps=steps)
        results[f"reference.{steps}"] = sample(model, positive, empty, steps=steps, grid="reference")
        grids[f"{family}.{steps}"] = describe(model, steps)
        grids[f"{family}.reference.{steps}"] = describe(model, steps, 1.0, "reference")
    results["again"] = sample(model, positive, empty)
    custom = CUSTOM["flow" if flow else "vp"]
    results["custom"] = sample(model, positive, empty, grid="custom", timesteps=custom)
    results["deterministic"] = sample(model, positive, empty, stochasticity=0.0)
    results["guided"] = sample(model, positive, empty, guidance=GUIDANCE, negative=negative)
    known = {"samples": model.model.process_latent_out(picture.clone())}
    for denoise in (0.25, 0.5, 0.75):
        results[f"denoise.{denoise}"] = sample(model, positive, known, denoise=denoise)
    batch = {"samples": torch.zeros(4, *picture.shape[1:])}
    results["batch"] = sample(model, positive, batch)
    for place in range(4):
        alone = {"samples": torch.zeros_like(picture), "batch_index": [place]}
        results[f"alone.{place}"] = sample(model, positive, alone)
    return results


def features(family, model, given):
    """Try each of KSampler's features: Flash Sampler without fresh noise beside core's euler."""
    import comfy.sample
    import comfy.samplers
    import torch
    from dropped_in.nodes.sampling.few_step import flash_grid

    positive, negative = conditioning(given, "positive"), conditioning(given, "negative")
    flow = family.startswith("sd3")
    picture = model.model.process_latent_out(given["picture"].clone())
    height, width = picture.shape[2:]
    # No multiples of 8; PixArt's patches need an even number.
    odd = (height - 2, width - 6) if family.startswith("pixart") else (height - 3, width - 1)
    odd = torch.zeros(2, picture.shape[1], *odd)
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    mask[..., width // 2] = 0.5
    area = [
        [positive[0][0], positive[0][1] | {"area": (height * 3 // 4, width * 3 // 4, 0, width // 4), "strength": 0.8}]
    ]
    half = torch.zeros(1, height, width)
    half[:, : height // 2] = 1
    masked = [[positive[0][0], positive[0][1] | {"mask": half, "mask_strength": 1.0, "set_area_to_bounds": False}]]
    several = conditioning(given, "positive", slice(0, 2))
    late = [[positive[0][0], positive[0][1] | {"start_percent": 0.3, "end_percent": 1.0}]]
    cases = {
        "guidance": (positive, negative, {"samples": torch.zeros_like(picture)}, GUIDANCE, 1.0),
        # At denoise 1 core's euler starts from the picture's trace, Flash Sampler from pure noise (see
        # test_inpainting_parity.py); a flow model's noise has no trace of it.
        "mask": (positive, negative, {"samples": picture, "noise_mask": mask}, 1.0, 1.0 if flow else 0.75),
        "mask with denoise and guidance": (positive, negative, {"samples": picture, "noise_mask": mask}, 2.0, 0.5),
        "area": (negative + area, negative, {"samples": torch.zeros_like(picture)}, 2.0, 1.0),
        "masked conditioning": (negative + masked, negative, {"samples": torch.zeros_like(picture)}, 1.0, 1.0),
        "batch of two prompts": (several, negative, {"samples": picture.repeat(2, 1, 1, 1)}, 1.5, 0.75),
        "odd size": (positive, negative, {"samples": odd}, 2.0, 1.0),
        "a prompt for the later steps": (negative + late, negative, {"samples": torch.zeros_like(picture)}, 1.0, 1.0),
    }
    if family == "sd15":
        cases["ControlNet"] = (*controlled(model, given), {"samples": torch.zeros_like(picture)}, 2.0, 1.0)
    euler = comfy.samplers.sampler_object("euler")
    results = {}
    for name, (cond, uncond, latent, guidance, denoise) in cases.items():
        shared = {"guidance": guidance, "denoise": denoise, "negative": uncond}
        results[f"{name}.ours"] = sample(model, cond, latent, stochasticity=0.0, **shared)
        results[f"{name}.fresh"] = sample(model, cond, latent, **shared)
        plain = positive if cond is not positive else several
        results[f"{name}.without"] = sample(model, plain, {"samples": latent["samples"]}, stochasticity=0.0)
        core = comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(latent["samples"], SEED),
            guidance,
            euler,
            flash_grid(model, 4, denoise).sigmas,
            cond,
            uncond,
            latent["samples"],
            noise_mask=latent.get("noise_mask"),
            disable_pbar=True,
            seed=SEED,
        )
        results[f"{name}.core"] = model.model.process_latent_in(core)
    return results


def controlled(model, given):
    """Positive and negative conditioning with a random ControlNet on both, as ControlNetApplyAdvanced makes them."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops
    import torch

    from nodes import ControlNetApplyAdvanced

    config = dict(model.model.model_config.unet_config)
    for unused in ("out_channels", "transformer_depth_output", "use_temporal_attention"):
        config.pop(unused, None)
    torch.manual_seed(5)
    network = comfy.cldm.cldm.ControlNet(
        **{**config, "hint_channels": 3, "operations": comfy.ops.disable_weight_init, "dtype": torch.float32}
    )
    for parameter in network.parameters():
        parameter.copy_(0.05 * torch.randn_like(parameter))
    control = comfy.controlnet.ControlNet(network, load_device=model.load_device, manual_cast_dtype=None)
    height, width = given["picture"].shape[2:]
    image = torch.rand(1, height * 8, width * 8, 3)
    conds = (conditioning(given, name) for name in ("positive", "negative"))
    return ControlNetApplyAdvanced().apply_controlnet(*conds, control, image, 1.0, 0.0, 0.7)


def special_grids(models, grids):
    """Describe grids of models that core nodes have changed, and of LoRAs with metadata."""
    from comfy_extras import nodes_model_advanced as core
    from dropped_in.flash_core.grid import trailing_timesteps
    from dropped_in.flash_core.lora import FlashMetadata
    from dropped_in.flash_core.process import FlowProcess

    def metadata(base, prediction, timesteps):
        return FlashMetadata(base, prediction, "flow" if prediction == "flow" else "vp", timesteps)

    def discrete(model, sampling, zsnr=False):
        return core.ModelSamplingDiscrete().patch(model, sampling, zsnr)[0]

    sd15, sd21, sd3 = (models[family] for family in ("sd15", "sd21", "sd3"))
    trailing = {steps: tuple(trailing_timesteps(FlowProcess(3.0), steps)) for steps in (1, 2, 4)}
    unusual = {4: (999.0, 700.0, 400.0, 100.0)}
    shift5 = core.ModelSamplingSD3().patch(sd3, 5.0)[0]
    grids["shift 5"] = describe(shift5, 4)
    grids["shift 5, LoRA of shift 3"] = describe(shift5, 4, metadata=metadata("sd3", "flow", trailing))
    grids["shift 5, LoRA of shift 3, 3 steps"] = describe(shift5, 3, metadata=metadata("sd3", "flow", trailing))
    grids["AuraFlow"] = describe(core.ModelSamplingAuraFlow().patch_aura(sd3, 1.73)[0], 4)
    grids["Flux"] = describe(core.ModelSamplingFlux().patch(sd3, 1.15, 0.5, 1024, 1024)[0], 4)
    grids["Flux, reference"] = describe(
        core.ModelSamplingFlux().patch(sd3, 1.15, 0.5, 1024, 1024)[0], 4, 1.0, "reference"
    )
    grids["v by node"] = describe(discrete(sd15, "v_prediction"), 4, metadata=metadata("sd21", "v_prediction", {}))
    grids["x0 by node"] = describe(discrete(sd15, "x0"), 4, metadata=metadata("any", "sample", {}))
    grids["zero terminal SNR by node"] = describe(discrete(sd21, "v_prediction", zsnr=True), 4)
    grids["lcm by node"] = describe(discrete(sd15, "lcm"), 4)
    grids["lcm by node, reference"] = describe(discrete(sd15, "lcm"), 4, 1.0, "reference")
    grids["EDM by node"] = describe(core.ModelSamplingContinuousEDM().patch(sd15, "v_prediction", 120.0, 0.002)[0], 4)
    grids["Stable Cascade by node"] = describe(core.ModelSamplingStableCascade().patch(sd15, 2.0)[0], 4)
    grids["image to image by node"] = describe(discrete(sd15, "img_to_img"), 4)
    grids["LoRA for v on epsilon"] = describe(sd15, 4, metadata=metadata("sd21", "v_prediction", {}))
    grids["LoRA for flow on epsilon"] = describe(sd15, 4, metadata=metadata("sd3", "flow", trailing))
    grids["LoRA for epsilon on flow"] = describe(sd3, 4, metadata=metadata("sdxl", "epsilon", {}))
    grids["the LoRA's own"] = describe(sd15, 4, metadata=metadata("sd15", "epsilon", unusual))
    grids["the LoRA's own, half"] = describe(sd15, 4, 0.4, metadata=metadata("sd15", "epsilon", unusual))
    grids["the LoRA's own, 3 steps"] = describe(sd15, 3, metadata=metadata("sd15", "epsilon", unusual))
    grids["the LoRA's own, but reference"] = describe(
        sd15, 4, 1.0, "reference", metadata=metadata("sd15", "epsilon", unusual)
    )
    grids["a broken header"] = describe(sd15, 2, metadata=metadata("sd15", "epsilon", {2: (499.0, 1999.0)}))
    grids["no such grid"] = describe(sd15, 4, 1.0, "karras")
    grids["custom, half"] = describe(sd15, 4, 0.5, "custom", "999, 590, 400, 10")
    grids["custom, ascending"] = describe(sd15, 4, 1.0, "custom", "10, 999")


def refused_sizes(model, given):
    """Collect Flash Sampler's errors for sizes that ComfyUI's PixArt does not support."""
    import torch

    said = []
    for height, width in ((41, 48), (40, 47), (24, 32)):
        try:
            sample(model, conditioning(given, "positive"), {"samples": torch.zeros(1, 4, height, width)})
        except ValueError as error:
            said.append(str(error))
    return said


def zero_terminal_snr(folder, given):
    """A v model whose schedule ends in pure noise."""
    import torch

    model = load("sd21", folder, sampling_settings={"zsnr": True})
    empty = {"samples": torch.zeros_like(given["picture"])}
    return {str(steps): sample(model, conditioning(given, "positive"), empty, steps=steps) for steps in STEPS}


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), *sys.argv[4:])
