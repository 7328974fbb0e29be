"""LoRAs with changes of whole weights and biases: ours beside ComfyUI's loader (see ``test_lora_differences.py``).

python lora_differences.py COMFYUI ROOT FOLDER FAMILY...

FOLDER holds each family's network, as for ``sampling_families.py``. Written there are ``facts.json``, the number of
weights that differ between the loaders by case, and ``said.json``, reports and errors.
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
from torch import Tensor

STRENGTH = 0.7
RANK = 4


def changed(patcher: Any, seed: int) -> Any:
    """Clone a patcher with random changes of all its weights and biases."""
    generator = torch.Generator().manual_seed(seed)
    clone = patcher.clone()
    noise = {
        name: ("diff", (0.1 * torch.randn(value.shape, generator=generator),))
        for name, value in patcher.model.state_dict().items()
        if value.is_floating_point() and name.endswith((".weight", ".bias"))
    }
    clone.add_patches(noise, 1.0)
    return clone


def patched_weights(patcher: Any) -> dict[str, Tensor]:
    """Return the weights with the patches applied."""
    patcher.patch_model()
    try:
        return {name: value.clone() for name, value in patcher.model.state_dict().items()}
    finally:
        patcher.unpatch_model()


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, int]:
    """Count the tensors that differ between two loaders, and those that the second one changed."""
    return {
        "differ": sum(not torch.equal(ours[name], value) for name, value in theirs.items()),
        "changed": sum(not torch.equal(base[name], value) for name, value in theirs.items()),
        "biases": sum(not torch.equal(base[n], value) for n, value in theirs.items() if n.endswith(".bias")),
    }


def extract(patcher: Any, prefix: str, lora_prefix: str, kind: str, seed: int) -> dict[str, Tensor]:
    """Make the file of core's "Extract and Save LoRA" with bias_diff on, from a model and its change."""
    import comfy.model_management
    import comfy_extras.nodes_lora_extract as core

    other = changed(patcher, seed)
    subtracted = other.clone()  # ModelSubtract
    for name, patch in patcher.get_key_patches(prefix).items():
        subtracted.add_patches({name: patch}, -1.0, 1.0)
    made = core.calc_lora_model(subtracted, RANK, prefix, lora_prefix, {}, core.LORA_TYPES[kind], bias_diff=True)
    comfy.model_management.unload_all_models()  # or the shared weights would stay subtracted
    return made


def refusal(call: Any) -> str:
    """Return the error's words."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def of_family(family: str, folder: Path, facts: dict[str, Any], said: dict[str, str]) -> None:
    """Load an extracted LoRA with both loaders."""
    import comfy.sd
    from dropped_in.flash_core.lora import read_lora
    from dropped_in.nodes.lora.patches import apply_lora

    model = load(family, folder)
    base = patched_weights(model)
    file = folder / f"{family}_extracted.safetensors"
    save_file(extract(model, "diffusion_model.", "diffusion_model.", "standard", 3), file)
    ours, report = apply_lora(read_lora(file), model, STRENGTH)
    core, _ = comfy.sd.load_lora_for_models(model, None, load_file(file), STRENGTH, 0.0)
    facts[family] = differing(patched_weights(ours), patched_weights(core), base)
    said[f"{family}, report"] = report.text()
    whole = folder / f"{family}_whole.safetensors"
    save_file(extract(model, "diffusion_model.", "diffusion_model.", "full_diff", 3), whole)
    said[f"{family}, whole weights alone"] = refusal(lambda: read_lora(whole))
    # A bias of another size, and one of a layer that the model lacks.
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(".diff_b"))
    save_file({**weights, name: torch.zeros(3), "diffusion_model.nowhere.diff_b": torch.zeros(3)}, file)
    said[f"{family}, unfit"] = refusal(lambda: apply_lora(read_lora(file), model, STRENGTH))
    _, report = apply_lora(read_lora(file), model, STRENGTH, allow_partial=True)
    said[f"{family}, a part"] = report.text()


def of_slices(folder: Path, facts: dict[str, Any]) -> None:
    """Change the bias of one of SD3's projections, which ComfyUI fuses to one layer."""
    from dropped_in.flash_core.lora import read_lora
    from dropped_in.nodes.lora.patches import apply_lora

    model = load("sd3", folder)
    base = patched_weights(model)
    fused = "diffusion_model.joint_blocks.0.x_block.attn.qkv.bias"
    width = len(base[fused]) // 3
    values = torch.randn(width, generator=torch.Generator().manual_seed(6))
    layer = "transformer.transformer_blocks.0.attn.to_k"
    halves = {f"{layer}.lora_A.weight": torch.zeros(2, width), f"{layer}.lora_B.weight": torch.zeros(width, 2)}
    save_file({**halves, f"{layer}.diff_b": values}, folder / "slice.safetensors")
    patched, _ = apply_lora(read_lora(folder / "slice.safetensors"), model, 0.5)
    change = (patched_weights(patched)[fused] - base[fused]).reshape(3, width)
    expected = torch.stack([torch.zeros(width), 0.5 * values, torch.zeros(width)])
    facts["slice"] = float((change - expected).abs().max())


def of_text_encoder(folder: Path, facts: dict[str, Any], said: dict[str, str]) -> None:
    """Load an extracted LoRA of the demo and its text encoder with Flash LoRA Stack."""
    import comfy.sd
    import folder_paths
    from dropped_in.nodes.demo.models import build_demo
    from dropped_in.nodes.lora.loader import FlashLoraLoader
    from dropped_in.nodes.lora.stack import FlashLoraStack

    model, clip, _ = build_demo()
    file = folder / "demo_extracted.safetensors"
    weights = extract(model, "diffusion_model.", "diffusion_model.", "standard", 4)
    weights |= extract(clip.patcher, "", "text_encoders.", "standard", 5)
    save_file({name: value for name, value in weights.items() if value.ndim}, file)
    folder_paths.add_model_folder_path("loras", str(folder))
    base = patched_weights(clip.patcher)
    _, core = comfy.sd.load_lora_for_models(model, clip, load_file(file), STRENGTH, STRENGTH)
    styles = {"style_1": file.name, "style_1_strength": STRENGTH}
    _, ours, report = FlashLoraStack.execute(model, "none", 1.0, clip=clip, **styles).args
    facts["text encoder"] = differing(patched_weights(ours.patcher), patched_weights(core.patcher), base)
    said["text encoder, stack"] = report
    said["text encoder, stack without clip"] = FlashLoraStack.execute(model, "none", 1.0, **styles).args[2]
    said["text encoder, loader"] = FlashLoraLoader.execute(model, file.name, 1.0).args[1]


def main(comfyui: Path, root: Path, folder: Path, *families: str) -> None:
    """Run every case."""
    boot(comfyui, root)
    torch.set_num_threads(1)
    facts: dict[str, Any] = {}
    said: dict[str, str] = {}
    with torch.inference_mode():
        for family in families:
            of_family(family, folder, facts, said)
        of_slices(folder, facts)
        of_text_encoder(folder, facts, said)
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), *sys.argv[4:])
