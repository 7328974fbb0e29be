"""Control-LoRAs under a Flash LoRA, and the demo's adapters (see ``test_control_lora.py``).

python control_lora.py COMFYUI ROOT FOLDER

FOLDER holds tiny UNets (``UNET.safetensors`` and ``UNET.json``), the demo's adapters (``canny_t2i_adapter``,
``canny_control_lora`` and, the same as a whole, ``canny_controlnet``), and ``given.safetensors``. The tiny models'
Control-LoRAs are made here, in Stability's layout. Written there are ``results`` and ``said.json``.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from adapters import apply, prompt, sample
from boot import boot
from safetensors.torch import load_file, save_file
from sampling_families import load
from torch import Tensor

RANK = 4
SPREAD = 0.05  # of an update, beside weights of about the same size
FLASH_SPREAD = 0.3  # of a Flash LoRA's change, relative to each weight's own deviation


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Sample tiny models and the demo with Control-LoRAs."""
    boot(comfyui, root)
    import folder_paths

    torch.set_num_threads(1)
    folder_paths.add_model_folder_path("controlnet", str(folder))
    given = load_file(folder / "given.safetensors")
    results: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    with torch.inference_mode():
        for family in ("sd15", "sdxl"):
            steer(family, load(family, folder), given, folder, results, said)
        demo(given, folder, results)
        said |= refused(load("sd15", folder), given, folder)
    save_file({name: value.contiguous() for name, value in results.items()}, folder / "results")
    (folder / "said.json").write_text(json.dumps(said))


def empty_network(model: Any) -> torch.nn.Module:
    """ComfyUI's ControlNet of the model's sizes."""
    import comfy.cldm.cldm
    import comfy.ops

    config = dict(model.model.model_config.unet_config)
    config.pop("out_channels")
    config |= {"hint_channels": 3, "operations": comfy.ops.disable_weight_init, "dtype": torch.float32}
    network = comfy.cldm.cldm.ControlNet(**config)
    for parameter in network.parameters():  # ComfyUI leaves them as the memory was
        parameter.zero_()
    return network


def control_lora(model: Any, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make a random Control-LoRA in Stability's layout, and the equal whole ControlNet.

    Layers that the model also has get an update; layers of the ControlNet alone are stored whole.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return SPREAD * torch.randn(*shape, generator=generator)

    base = model.model.diffusion_model.state_dict()
    file: dict[str, Tensor] = {"lora_controlnet": torch.zeros(1)}
    whole = {}
    for name, value in empty_network(model).state_dict().items():
        if name not in base:
            file[name] = whole[name] = draw(*value.shape)
            continue
        whole[name] = base[name].clone()
        if value.ndim == 1:
            continue
        layer = name.removesuffix(".weight")
        rank = min(RANK, len(value))
        inner = (1, 1) if value.ndim == 4 else ()
        up, down = draw(len(value), rank, *inner), draw(rank, *value.shape[1:])
        file |= {f"{layer}.up": up, f"{layer}.down": down}
        whole[name] += (up.flatten(1) @ down.flatten(1)).view_as(value)
    return file, whole


def flash_lora(model: Any, strength: float) -> Any:
    """Patch random changes into the model's attention and one norm, as a LoRA does."""
    generator = torch.Generator().manual_seed(11)
    patches = {}
    for name, value in model.model.state_dict().items():
        if (".attn" in name and name.endswith("weight")) or name.endswith("in_layers.0.weight"):
            noise = torch.randn(value.shape, generator=generator)
            patches[name] = ("diff", (FLASH_SPREAD * value.std().clamp_min(0.01) * noise,))
    patched = model.clone()
    added = patched.add_patches(patches, strength)
    assert len(added) == len(patches) > 8
    return patched


def steer(
    family: str, model: Any, given: dict[str, Tensor], folder: Path, results: dict[str, Tensor], said: dict[str, Any]
) -> None:
    """Sample with our Control-LoRA, ComfyUI's own and the whole ControlNet, without and with a Flash LoRA."""
    import comfy.controlnet

    positive, hint = prompt(given, family, "positive"), given["hint"].movedim(1, -1)
    weights, whole = control_lora(model, seed=7)
    save_file(weights, folder / f"{family}_control_lora.safetensors")
    network = empty_network(model)
    network.load_state_dict(whole)
    full = comfy.controlnet.ControlNet(network, load_device=model.load_device)
    core = comfy.controlnet.ControlLora(weights)
    before = {name: value.clone() for name, value in model.model.diffusion_model.state_dict().items()}

    def run(chosen: Any, adapter: str = "none", **settings: Any) -> Tensor:
        steered = apply(chosen, positive, hint, adapter, strength=1.0, **settings)[0]
        return sample(chosen, steered, (1, 4, 16, 24), 2, 1.0, None)

    for strength in (0.0, 0.5, 1.0):
        chosen = flash_lora(model, strength) if strength else model
        results[f"{family}, {strength}, unsteered"] = sample(chosen, positive, (1, 4, 16, 24), 2, 1.0, None)
        results[f"{family}, {strength}, whole"] = run(chosen, control_net=full)
        results[f"{family}, {strength}, core"] = run(chosen, control_net=core)
        results[f"{family}, {strength}, ours"] = run(chosen, f"{family}_control_lora.safetensors")
    # The model is moved, partly unloaded and patched on the fly, as with little memory.
    control = apply(model, positive, hint, f"{family}_control_lora.safetensors", strength=1.0)[0][0][1]["control"]
    wholes = apply(model, positive, hint, control_net=full, strength=1.0)[0][0][1]["control"]
    patched = flash_lora(model, 1.0)
    state = residuals(patched, wholes, given, family)
    results[f"{family}, residuals, whole"] = state
    for name, memory in {"loaded": 0, "patched on the fly": 64, "half": patched.model_size() * 9 // 10}.items():
        patched.unpatch_model(patched.offload_device)
        patched.load(patched.load_device, lowvram_model_memory=memory, full_load=memory == 0)
        said[f"{family}, {name}"] = len(patched.backup)
        results[f"{family}, residuals, {name}"] = residuals(patched, control, given, family)
    patched.unpatch_model(patched.offload_device)
    # Nothing is left behind: neither a network nor a changed weight.
    control.pre_run(patched.model, patched.get_model_object("model_sampling").percent_to_sigma)
    network_alive = weakref.ref(control.control_model)
    control.cleanup()
    gc.collect()
    after = model.model.diffusion_model.state_dict()
    said[f"{family}, nothing is left"] = network_alive() is None and all(
        torch.equal(value, after[name]) for name, value in before.items()
    )


def residuals(patched: Any, control: Any, given: dict[str, Tensor], family: str) -> Tensor:
    """Return a control's outputs at one evaluation of the loaded model, all maps in one row."""
    patched.pre_run()
    control.pre_run(patched.model, patched.get_model_object("model_sampling").percent_to_sigma)
    cond: dict[str, Any] = {"c_crossattn": given["positive"]}
    width = patched.model.model_config.unet_config["adm_in_channels"]
    if width is not None:
        cond["y"] = torch.full((1, width), 0.3)
    z = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(3))
    made = control.get_control(z, torch.tensor([2.0]), cond, 1, {})
    control.cleanup()
    patched.cleanup()
    return torch.cat(
        [value.flatten() for part in ("input", "middle", "output") for value in made[part] if value is not None]
    )


def demo(given: dict[str, Tensor], folder: Path, results: dict[str, Tensor]) -> None:
    """Sample the demo with its Flash LoRA and with the demo's adapters in their formats."""
    import comfy.controlnet
    from dropped_in.flash_core.lora import read_lora
    from dropped_in.nodes.demo.models import SHIPPED_LORAS, build_demo
    from dropped_in.nodes.lora.patches import apply_lora

    model, clip, _ = build_demo()
    flash, _ = apply_lora(read_lora(SHIPPED_LORAS / "flash_demo.safetensors"), model, 1.0, False)
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("red apple"))
    hint = given["square"].movedim(1, -1)

    def run(adapter: str = "none", **settings: Any) -> Tensor:
        steered = apply(flash, positive, hint, adapter, strength=1.0, **settings)[0]
        return sample(flash, steered, (1, 16, 16, 16), 2, 1.0, None)

    results["demo, plain"] = sample(flash, positive, (1, 16, 16, 16), 2, 1.0, None)
    weights = load_file(folder / "canny_control_lora.safetensors")
    results["demo, whole"] = run("canny_controlnet.safetensors")
    results["demo, core"] = run(control_net=comfy.controlnet.ControlLora(weights))
    results["demo, ours"] = run("canny_control_lora.safetensors")
    results["demo, T2I-adapter"] = run("canny_t2i_adapter.safetensors")


def refused(model: Any, given: dict[str, Tensor], folder: Path) -> dict[str, str]:
    """Collect the errors for broken Control-LoRAs, and for one of another model."""
    whole = load_file(folder / "sd15_control_lora.safetensors")
    hint = given["hint"].movedim(1, -1)
    broken = {
        "without a hint": {name: value for name, value in whole.items() if "hint_block" not in name},
        "without down halves": {name: value for name, value in whole.items() if not name.endswith(".down")},
        "without zero convolutions": {name: value for name, value in whole.items() if "zero_convs" not in name},
        "without one zero convolution": {name: value for name, value in whole.items() if "zero_convs.2." not in name},
        "without a middle": {name: value for name, value in whole.items() if "middle_block_out" not in name},
        "without a hint layer": {name: value for name, value in whole.items() if "hint_block.4." not in name},
        "of SDXL": load_file(folder / "sdxl_control_lora.safetensors"),
    }
    said = {}
    for name, weights in broken.items():
        save_file(weights, folder / "broken_control_lora.safetensors")
        try:
            apply(model, prompt(given, "sd15", "positive"), hint, "broken_control_lora.safetensors")
        except ValueError as error:
            said[name] = str(error)
    import comfy.controlnet

    core = comfy.controlnet.ControlLora(broken["without zero convolutions"])
    try:
        apply(model, prompt(given, "sd15", "positive"), hint, control_net=core)
    except ValueError as error:
        said["core's, without zero convolutions"] = str(error)
    return said


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
