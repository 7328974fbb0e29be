"""LoRA files of every dialect on tiny MODELs of every family (see ``test_lora_matrix.py``).

python lora_matrix.py COMFYUI ROOT FOLDER FAMILY...

FOLDER holds for each family ``FAMILY.safetensors`` (the diffusers network's weights), ``FAMILY.json`` (its
configuration), ``FAMILY.given.safetensors`` (the network's inputs) and a folder ``FAMILY`` of LoRA files; and
``crosses.json``, files for other models: {name: [FAMILY, path, whether a part may be loaded]}. Written are
``FAMILY.results.safetensors`` (the MODEL's output under each file), ``answers.json`` (what was matched, or the error),
the LoRA ``fused`` of each family in the native spelling, and ``names.json``, ComfyUI's names of the true UNets' layers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from boot import boot

# Transformer blocks at each level of the published UNets.
UNET_DEPTHS = {"sd15": [1, 1, 1, 0], "sd21": [1, 1, 1, 0], "sdxl": [0, 2, 10]}


def main(comfyui: Path, root: Path, folder: Path, *families: str) -> None:
    """Load every file into its family's model."""
    boot(comfyui, root)
    import comfy.utils
    import torch
    from safetensors.torch import load_file, save_file
    from tiny import tiny_model

    torch.set_num_threads(1)
    answers = {}
    crosses = json.loads((folder / "crosses.json").read_text())
    with torch.inference_mode():
        for family in families:
            config = json.loads((folder / f"{family}.json").read_text())
            model = tiny_model(family, load_file(folder / f"{family}.safetensors"), config)
            given = load_file(folder / f"{family}.given.safetensors")
            write_native(model, folder / family)
            results = {"base": forward(model, given)}
            for path in sorted((folder / family).iterdir()):
                output, answers[f"{family}/{path.name}"] = apply(model, path, given)
                if output is not None:
                    results[path.name] = output
            for name, (on, file, partial) in crosses.items():
                if on == family:
                    _, answers[name] = apply(model, folder / file, given, partial)
            results["base again"] = forward(model, given)
            save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{family}.results")
    names = {
        family: comfy.utils.unet_to_diffusers(
            {
                "channel_mult": [1] * len(depths),
                "num_res_blocks": [2] * len(depths),
                "transformer_depth": [depth for depth in depths for _ in range(2)],
                "transformer_depth_output": [depth for depth in depths for _ in range(3)],
                "transformer_depth_middle": max(depths),
            }
        )
        for family, depths in UNET_DEPTHS.items()
    }
    (folder / "names.json").write_text(json.dumps(names))
    (folder / "answers.json").write_text(json.dumps(answers))


def forward(model, given):
    """The diffusion model's own output."""
    extras = {name: given[name] for name in ("y", "guidance") if name in given}
    return model.model.diffusion_model(given["z"], given["t"], given["context"], **extras).clone()


def apply(model, path, given, allow_partial=False):
    """Return the output with the LoRA, and the loader's report or error."""
    from dropped_in.flash_core.lora import LoraError, read_lora
    from dropped_in.nodes.lora.patches import LoraMismatch, apply_lora

    try:
        patched, report = apply_lora(read_lora(path), model, 1.0, allow_partial)
    except (LoraError, LoraMismatch) as error:
        return None, {"error": str(error)}
    patched.patch_model()
    try:
        output = forward(patched, given)
    finally:
        patched.unpatch_model()
    patches = sum(len(values) for values in patched.patches.values())
    return output, {"patches": patches, "complete": report.complete, "text": report.text(), **report.as_json()}


def write_native(model, folder):
    """Write the LoRA ``fused`` under ComfyUI's own names: fused layers share their down half and become one."""
    import comfy.utils
    import torch
    from safetensors.torch import load_file, save_file

    tables = {
        "SD3": comfy.utils.mmdit_to_diffusers,
        "PixArtAlpha": comfy.utils.pixart_to_diffusers,
        "PixArtSigma": comfy.utils.pixart_to_diffusers,
        "Flux": comfy.utils.flux_to_diffusers,
    }
    config = model.model.model_config
    names = tables.get(type(config).__name__, comfy.utils.unet_to_diffusers)(config.unet_config)
    tensors = load_file(folder / "fused")
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    native = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removesuffix(".lora_A.weight").partition(".")[2]
        target = names[f"{path}.weight"]
        up = tensors[key.replace("lora_A", "lora_B")]
        name, where, reorder = (target, None, None) if isinstance(target, str) else (*target, None, None)[:3]
        parts.setdefault(name, []).append((where[1] if where else 0, up if reorder is None else reorder(up)))
        native[f"diffusion_model.{name.removesuffix('.weight')}.lora_A.weight"] = tensors[key]
    for name, ups in parts.items():
        up = torch.cat([value for _, value in sorted(ups, key=lambda part: part[0])])
        native[f"diffusion_model.{name.removesuffix('.weight')}.lora_B.weight"] = up
    save_file(native, folder / "native")
    kohya = {}
    for key, value in native.items():
        layer, half, _ = key.removeprefix("diffusion_model.").rsplit(".", 2)
        name = f"lora_unet_{layer.replace('.', '_')}"
        kohya[f"{name}.lora_{'down' if half == 'lora_A' else 'up'}.weight"] = value
        kohya[f"{name}.alpha"] = torch.tensor(float(native[f"diffusion_model.{layer}.lora_A.weight"].shape[0]))
    save_file(kohya, folder / "kohya native")


if __name__ == "__main__":
    comfyui, root, folder = (Path(argument) for argument in sys.argv[1:4])
    main(comfyui, root, folder, *sys.argv[4:])
