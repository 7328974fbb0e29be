"""ControlNets and T2I-adapters in ComfyUI's process (see ``test_adapters.py``).

python adapters.py COMFYUI ROOT FOLDER

FOLDER holds the adapters' files, ``UNET.safetensors`` and ``UNET.json`` for each model, ``given.safetensors`` (prompts
and hints) and ``cases.json``. Written there are ``results``, latents as the network sees them, and ``said.json``: which
steps each window steers, and what is said where something is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from boot import boot
from safetensors.torch import load_file, save_file
from sampling_families import load
from torch import Tensor, nn

SEED = 2024


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Sample the cases, then try wrong inputs."""
    boot(comfyui, root)
    import folder_paths

    torch.set_num_threads(1)
    folder_paths.add_model_folder_path("controlnet", str(folder))
    given = load_file(folder / "given.safetensors")
    with torch.inference_mode():
        models = {name: load(name, folder) for name in ("sd15", "sdxl", "sd3")}
        results = {
            name: run(models[case["model"]], given, case)
            for name, case in json.loads((folder / "cases.json").read_text()).items()
        }
        results |= by_itself(models["sd15"], models["sdxl"], given, folder)
        said = {"windows": windows(models, folder), "refused": refused(models, given, folder)}
        said["published"] = published(folder)
    save_file({name: value.contiguous() for name, value in results.items()}, folder / "results")
    (folder / "said.json").write_text(json.dumps(said))


def prompt(given: dict[str, Tensor], model: str, name: str) -> list[Any]:
    """A CONDITIONING."""
    extras = {"pooled_output": given[f"{name}.pooled"]} if model == "sdxl" else {}
    return [[given[name], extras]]


def apply(model: Any, positive: Any, image: Tensor, adapter: str = "none", **settings: Any) -> tuple[Any, Any]:
    """The node's ``execute``."""
    from dropped_in.nodes.control.nodes import FlashAdapterApply

    defaults = {"strength": 1.0, "steps": 4, "start_step": 1, "end_step": 8}
    return FlashAdapterApply.execute(model, positive, image, adapter, **{**defaults, **settings}).args


def sample(model: Any, positive: Any, size: tuple[int, ...], steps: int, guidance: float, negative: Any) -> Tensor:
    from dropped_in.nodes.sampling.nodes import FlashSampler

    latent = {"samples": torch.zeros(size)}
    outcome = FlashSampler.execute(model, positive, latent, SEED, steps, guidance, 1.0, negative=negative)
    return model.model.process_latent_in(outcome.args[0]["samples"])


def run(model: Any, given: dict[str, Tensor], case: dict[str, Any]) -> Tensor:
    """Run one case: adapters, one after the other, then Flash Sampler."""
    positive, negative = (prompt(given, case["model"], name) for name in ("positive", "negative"))
    negative = negative if case["guidance"] > 1 else None
    for file, hint, strength, start, end in case["adapters"]:
        settings = {"strength": strength, "start_step": start, "end_step": end, "steps": case["steps"]}
        positive, negative = apply(
            model, positive, given[hint].movedim(1, -1), f"{file}.safetensors", negative=negative, **settings
        )
    return sample(model, positive, case["size"], case["steps"], case["guidance"], negative)


def by_itself(model: Any, sdxl: Any, given: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Sample pairs of cases that must agree with each other, or with ComfyUI's own nodes."""
    import comfy.controlnet

    import nodes as core_nodes

    positive, negative = prompt(given, "sd15", "positive"), prompt(given, "sd15", "negative")
    hint = given["hint"].movedim(1, -1)
    size, double = (1, 4, 16, 24), (2, 4, 16, 24)
    adapter = "sd15_full_adapter.safetensors"

    def made(image: Tensor, size: tuple[int, ...] = size, guidance: float = 1.0, prompts: Any = None, **settings: Any):
        steered, against = apply(model, prompts or positive, image, adapter, **settings)
        return sample(model, steered, size, 4, guidance, against if guidance == 1 else negative)

    plain = sample(model, positive, size, 4, 1.0, None)
    steered = made(hint)
    results = {"plain": plain, "steered": steered}
    results["strength 0"] = made(hint, strength=0.0)
    results["RGBA"] = made(torch.cat([hint, torch.rand(*hint.shape[:3], 1)], -1))
    grey = hint.mean(-1, keepdim=True)
    results["grey"], results["three greys"] = made(grey), made(grey.expand(-1, -1, -1, 3))
    results["mask"] = made(grey[..., 0])
    results["one pixel"] = made(hint[:, :1, :1])
    results["a plain colour"] = made(hint[:, :1, :1].expand_as(hint))
    half = torch.nn.functional.interpolate(hint.movedim(-1, 1), scale_factor=0.5).movedim(1, -1)
    results["half the size"] = made(half)
    results["half the size, enlarged"] = made(half.repeat_interleave(2, 1).repeat_interleave(2, 2))
    results["huge"] = made(hint.repeat_interleave(16, 1).repeat_interleave(16, 2))
    other = given["hint2"].movedim(1, -1)
    results["two hints"] = made(torch.cat([hint, other]), double)
    results["the first for both"] = made(hint, double)
    results["the second for both"] = made(other, double)
    results["three hints for two"] = made(torch.cat([hint, other, hint]), double)
    results["two hints, guided"] = made(torch.cat([hint, other]), double, guidance=3.0)
    results["the first for both, guided"] = made(hint, double, guidance=3.0)
    results["the second for both, guided"] = made(other, double, guidance=3.0)
    three = (3, *size[1:])
    results["two hints for three"] = made(torch.cat([hint, other]), three)
    results["three hints"] = made(torch.cat([hint, other, hint]), three)
    # Without a negative given here, the sampler's negative prompt is steered too.
    results["negative from elsewhere"] = made(hint, guidance=3.0)
    both = apply(model, positive, hint, adapter, negative=negative)
    results["negative from here"] = sample(model, both[0], size, 4, 3.0, both[1])

    results["plain sdxl"] = sample(sdxl, prompt(given, "sdxl", "positive"), size, 4, 1.0, None)
    # ComfyUI's own reader knows adapters of these sizes, too.
    theirs = comfy.controlnet.load_controlnet(str(folder / "sdxl_full_adapter_xl.safetensors"))
    steered = apply(sdxl, prompt(given, "sdxl", "positive"), hint, control_net=theirs, strength=0.8)
    results["core's T2I-adapter"] = sample(sdxl, steered[0], size, 4, 1.0, None)
    original = apply(sdxl, prompt(given, "sdxl", "positive"), hint, "original.safetensors", strength=0.8)
    results["the original layout"] = sample(sdxl, original[0], size, 4, 1.0, None)
    results["sdxl, odd"] = sample(sdxl, original[0], (1, 4, 15, 21), 4, 1.0, None)
    results["plain sdxl, odd"] = sample(sdxl, prompt(given, "sdxl", "positive"), (1, 4, 15, 21), 4, 1.0, None)
    # One of ours and one of ComfyUI's in a chain.
    both = apply(sdxl, steered[0], given["hint2"].movedim(1, -1), "sdxl_full_adapter_xl2.safetensors", strength=0.5)
    results["core's and ours"] = sample(sdxl, both[0], size, 4, 1.0, None)

    # A loaded ControlNet from elsewhere, ComfyUI's own class and node.
    control = comfy.controlnet.ControlNet(native_controlnet(model), load_device=model.load_device)
    theirs = core_nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, hint, 0.7, 0.0, 1.0)
    ours = apply(model, positive, hint, control_net=control, strength=0.7)
    results["core's node"] = sample(model, theirs[0], size, 4, 1.0, None)
    results["a loaded ControlNet"] = sample(model, ours[0], size, 4, 1.0, None)

    untouched = "control" not in positive[0][1] and control.cond_hint_original is None and control.strength == 1.0
    first = apply(model, positive, hint, adapter)[0][0][1]["control"]
    second = apply(model, [[positive[0][0], {"control": first}]], hint, adapter, strength=0.1)[0][0][1]["control"]
    untouched &= second.previous_controlnet is first and first.strength == 1.0 and first.previous_controlnet is None
    results["nothing is changed in place"] = torch.tensor(untouched)
    return results


def native_controlnet(model: Any) -> nn.Module:
    """A random ControlNet for the model, of ComfyUI's class."""
    import comfy.cldm.cldm
    import comfy.ops

    config = dict(model.model.model_config.unet_config)
    for unused in ("out_channels", "transformer_depth_output", "use_temporal_attention"):
        config.pop(unused, None)
    torch.manual_seed(5)
    network = comfy.cldm.cldm.ControlNet(
        **{**config, "hint_channels": 3, "operations": comfy.ops.disable_weight_init, "dtype": torch.float32}
    )
    for parameter in network.parameters():
        parameter.copy_(0.05 * torch.randn_like(parameter))
    return network


class Recorder(nn.Module):
    """Stands in for a T2I-adapter's network."""

    unshuffle_amount = 8

    def forward(self, image: Tensor) -> dict[str, list[Tensor]]:
        return {"input": [image]}


def windows(models: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Record the evaluations with the adapter, for each model, grid and pair of steps."""
    import comfy.controlnet
    from comfy_extras import nodes_model_advanced as core
    from dropped_in.nodes.control.nodes import step_window
    from dropped_in.nodes.sampling.few_step import flash_grid

    several = {
        "sd15": (models["sd15"], 1.0),
        "sd15, denoise 0.5": (models["sd15"], 0.5),
        "sd15, v with zero terminal SNR": (
            core.ModelSamplingDiscrete().patch(models["sd15"], "v_prediction", True)[0],
            1.0,
        ),
        "sd3": (models["sd3"], 1.0),
        "sd3, shift 1": (core.ModelSamplingSD3().patch(models["sd3"], 1.0)[0], 1.0),
        "flux": (core.ModelSamplingFlux().patch(models["sd3"], 1.15, 0.5, 1024, 1024)[0], 1.0),
    }
    found = {}
    for name, (model, denoise) in several.items():
        sampling = model.get_model_object("model_sampling")
        for steps in range(1, 9):
            grid = flash_grid(model, steps, denoise)
            count = len(grid.timesteps)
            for start in range(1, count + 1):
                for end in range(start, 9):
                    control = comfy.controlnet.T2IAdapter(Recorder(), 3, 8, "nearest-exact")
                    control.set_cond_hint(torch.zeros(1, 3, 8, 8), 1.0, step_window(model, grid, start, end))
                    control.pre_run(None, sampling.percent_to_sigma)
                    asked = [
                        control.get_control(torch.zeros(1, 4, 1, 1), sigma.reshape(1), {}, 1, {}) is not None
                        for sigma in grid.sigmas[:-1]
                    ]
                    found[f"{name}: {steps} steps, {start} to {end}"] = (count, start, end, asked)
    return found


def refused(models: dict[str, Any], given: dict[str, Tensor], folder: Path) -> dict[str, str]:
    """Collect the node's errors for wrong input."""
    hint = given["hint"].movedim(1, -1)
    sd15, sdxl, sd3 = models["sd15"], models["sdxl"], models["sd3"]
    loaded = apply(sd15, prompt(given, "sd15", "positive"), hint, "sd15_controlnet.safetensors")[0][0][1]["control"]
    latents = loaded.copy()
    latents.latent_format = sd15.get_model_object("latent_format")
    cases: dict[str, tuple[Any, Tensor, str, dict[str, Any]]] = {
        "T2I-adapter of SD 1.5 on SDXL": (sdxl, hint, "sd15_full_adapter.safetensors", {}),
        "T2I-adapter of SDXL on SD 1.5": (sd15, hint, "sdxl_full_adapter_xl.safetensors", {}),
        "T2I-adapter on SD3": (sd3, hint, "sd15_full_adapter.safetensors", {}),
        "ControlNet of SD 1.5 on SDXL": (sdxl, hint, "sd15_controlnet.safetensors", {}),
        "ControlNet of SDXL on SD 1.5": (sd15, hint, "sdxl_controlnet.safetensors", {}),
        "ControlNet on SD3": (sd3, hint, "sd15_controlnet.safetensors", {}),
        "another text width": (sd15, hint, "wide_text.safetensors", {}),
        "a loaded one on SDXL": (sdxl, hint, "none", {"control_net": loaded}),
        "a pickle": (sd15, hint, "pickle.pth", {}),
        "a broken file": (sd15, hint, "broken.safetensors", {}),
        "a model": (sd15, hint, "sd15.safetensors", {}),
        "half an adapter": (sd15, hint, "half.safetensors", {}),
        "half a ControlNet": (sd15, hint, "half_controlnet.safetensors", {}),
        "neither": (sd15, hint, "none", {}),
        "both": (sd15, hint, "sd15_controlnet.safetensors", {"control_net": loaded}),
        "no CONTROL_NET": (sd15, hint, "none", {"control_net": "a text"}),
        "the end before the start": (sd15, hint, "sd15_controlnet.safetensors", {"start_step": 3, "end_step": 2}),
        "denoise 0": (sd15, hint, "sd15_controlnet.safetensors", {"denoise": 0.0}),
        "beyond the run": (sd15, hint, "sd15_controlnet.safetensors", {"start_step": 5}),
        "beyond a shortened run": (sd15, hint, "sd15_controlnet.safetensors", {"start_step": 3, "denoise": 0.5}),
        "two channels": (sd15, hint[..., :2], "sd15_controlnet.safetensors", {}),
        "no pictures": (sd15, hint[:0], "sd15_controlnet.safetensors", {}),
        "a ControlNet that reads latents": (sd15, hint, "none", {"control_net": latents}),
        "not a number": (sd15, hint / 0 * 0, "sd15_controlnet.safetensors", {}),
    }
    said = {}
    for name, (model, image, adapter, settings) in cases.items():
        try:
            apply(model, prompt(given, "sd15", "positive"), image, adapter, **settings)
        except ValueError as error:
            said[name] = str(error)
    return said


def published(folder: Path) -> dict[str, Any]:
    """Collect the places of T2I-adapters' maps and the errors of wrong pairs, for published sizes without weights."""
    from types import SimpleNamespace

    import comfy.cldm.cldm
    import comfy.cldm.mmdit
    import comfy.controlnet
    import comfy.latent_formats
    import comfy.ops
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.t2i_adapter.adapter import Adapter
    from dropped_in.nodes.control.files import T2IAdapterNetwork
    from dropped_in.nodes.control.match import adapter_places, check_adapter

    def sizes(levels: list[int], depths: list[int], text: int, vector: int | None = None, width: int = 320):
        return {
            "image_size": 32,
            "in_channels": 4,
            "model_channels": width,
            "channel_mult": levels,
            "num_res_blocks": [2] * len(levels),
            "transformer_depth": [depth for depth in depths for _ in range(2)],
            "transformer_depth_middle": depths[-1] or 1,
            "context_dim": text,
            "num_head_channels": width // 5,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": text > 768,
            "legacy": False,
            "adm_in_channels": vector,
            "num_classes": None if vector is None else "sequential",
            "dtype": torch.float32,
            "device": "meta",
            "operations": comfy.ops.disable_weight_init,
        }

    def unet(config: dict[str, Any]) -> UNetModel:
        upward = [depth for depth in config["transformer_depth"][::2] for _ in range(3)]
        return UNetModel(**config, out_channels=4, transformer_depth_output=upward)

    def controlnet(config: dict[str, Any]) -> Any:
        network = comfy.cldm.cldm.ControlNet(**{**config, "hint_channels": 3})
        return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))

    def t2i(channels: int, xl: bool) -> Any:
        with torch.device("meta"):
            network = Adapter(cin=channels, nums_rb=2, ksize=1, sk=True, use_conv=False, xl=xl)
        return comfy.controlnet.T2IAdapter(network, 3, 8, "nearest-exact")

    def model(kind: Any, network: Any, config: dict[str, Any]) -> Any:
        return SimpleNamespace(get_model_object=lambda name: network, model=SimpleNamespace(model_config=kind(config)))

    supported = comfy.supported_models
    configs = {
        "SD 1.5": (supported.SD15, sizes([1, 2, 4, 4], [1, 1, 1, 0], 768)),
        "SD 2": (supported.SD20, sizes([1, 2, 4, 4], [1, 1, 1, 0], 1024)),
        "SDXL": (supported.SDXL, sizes([1, 2, 4], [0, 2, 10], 2048, 2816)),
    }
    models = {name: model(kind, unet(config), config) for name, (kind, config) in configs.items()}
    transformer = {"input_size": None, "depth": 2, "in_channels": 16, "adm_in_channels": 40, "pos_embed_max_size": 24}
    transformer |= {
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}}
    }
    transformer |= {"dtype": torch.float32, "device": "meta", "operations": comfy.ops.disable_weight_init}
    models["SD3"] = model(supported.SD3, MMDiT(**transformer), {})
    models["SD3"].model = comfy.model_base.SD3.__new__(comfy.model_base.SD3)
    nn.Module.__init__(models["SD3"].model)
    models["SD3"].model.model_config = supported.SD3({})

    adapters = {f"ControlNet of {name}": controlnet(config) for name, (_, config) in configs.items()}
    adapters["small ControlNet of SDXL"] = controlnet(
        configs["SDXL"][1] | {"transformer_depth": [0] * 6, "transformer_depth_middle": 0, "context_dim": 1}
    )
    adapters["ControlNet of SD3"] = comfy.controlnet.ControlNet(
        comfy.cldm.mmdit.ControlNet(num_blocks=1, control_latent_channels=16, **transformer),
        latent_format=comfy.latent_formats.SD3(),
        load_device=torch.device("cpu"),
    )
    adapters |= {"T2I-adapter of SD 1.5": t2i(192, False), "T2I-adapter of SDXL": t2i(768, True)}
    low_rank = {
        f"zero_convs.{index}.0.weight": torch.zeros(width, 1)
        for index, width in enumerate([320] * 4 + [640] * 3 + [1280] * 2)
    }
    own = (*(f"input_hint_block.{index}" for index in range(0, 15, 2)), "middle_block_out.0")
    low_rank |= {f"{layer}.weight": torch.zeros(1, 1) for layer in own}
    low_rank |= {
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.down": torch.zeros(8, 2048),
        "label_emb.0.0.down": torch.zeros(8, 2816),
    }
    adapters["Control-LoRA of SDXL"] = comfy.controlnet.ControlLora(low_rank)

    matrix = {}
    for adapter_name, adapter in adapters.items():
        for model_name in models:
            try:
                kind = check_adapter(adapter, models[model_name], adapter_name)
            except ValueError as error:
                kind = f"refused: {error}"
            matrix[f"{adapter_name} on {model_name}"] = kind

    # The maps themselves, at the places that ComfyUI's class has built in.
    theirs = comfy.controlnet.load_controlnet(str(folder / "four_levels.safetensors")).t2i_model
    weights = {
        key.removeprefix("adapter."): value for key, value in load_file(folder / "four_levels.safetensors").items()
    }
    ours = T2IAdapterNetwork(weights, unet(sizes([1, 2, 4, 4], [1, 1, 1, 0], 768, width=32)))
    image = torch.rand(2, 3, 128, 192)
    pairs = list(zip(ours(image)["input"], theirs(image)["input"], strict=True))
    return {
        "places": {name: adapter_places(models[name].get_model_object("diffusion_model")) for name in configs},
        "matrix": matrix,
        "same lists": all((own is None) == (other is None) for own, other in pairs),
        "largest difference": max(float((own - other).abs().max()) for own, other in pairs if own is not None),
    }


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
