"""Distil a tiny MODEL as machines with little memory hold it (see ``test_low_memory.py``).

python low_memory.py COMFYUI ROOT FOLDER

The last line on the output is a JSON object of facts: of float8 weights, of packed weights, and of ComfyUI's states for
``--lowvram`` and ``--novram``. These flags change nothing on a CPU, so the states are set, and the CPU counts as a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from boot import boot

FAMILY = "chroma"
UPDATES = 9
SHAPE = (16, 8, 8)


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Run everything in inference mode, as ComfyUI runs nodes."""
    boot(comfyui, root)
    import folder_paths

    torch.set_num_threads(1)
    folder_paths.set_output_directory(str(folder / "output"))
    folder_paths.folder_names_and_paths["loras"] = ([str(folder / "loras")], {".safetensors"})
    facts = {}
    with torch.inference_mode():
        from tiny_native import native_model

        plain = native_model(FAMILY)
        weights = plain.model.diffusion_model.state_dict()
        facts["float8"] = distilled("float8", in_float8(weights))
        facts["packed"] = distilled("packed", in_packed(weights))
        facts["flags"] = flags(plain)
    sys.stdout.write("\n" + json.dumps(facts))


def in_float8(weights: dict[str, Any]) -> Any:
    """Return the MODEL as Load Diffusion Model makes it with weight_dtype fp8_e4m3fn."""
    import comfy.model_patcher
    from tiny_native import native_config

    model = native_config(FAMILY, torch.float8_e4m3fn).get_model({}, "")
    model.diffusion_model.load_state_dict(weights)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


def in_packed(weights: dict[str, Any]) -> Any:
    """Return the MODEL with packed linear layers."""
    from packed import packed
    from tiny_native import native_config

    return packed(native_config(FAMILY), weights)


def drawn(model: Any, positive: list, negative: list) -> Any:
    """Return a latent of core's sampler."""
    import comfy.sample

    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    return comfy.sample.sample(
        model, noise, 2, 3.0, "euler", "simple", positive[:1], negative, torch.zeros_like(noise), seed=1
    )


def distil(model: Any, name: str, positive: list, negative: list) -> tuple[Any, ...]:
    """Run Flash Distill for a few updates."""
    from dropped_in.nodes.distil.nodes import FlashDistill

    settings = {"prompts": "", "preset": "quick try", "width": 64, "height": 64, "guidance": 0.0, "seed": 0}
    settings |= {"rank": 4, "learning_rate": 1e-2, "updates": UPDATES, "trajectories": 8, "samples": 4}
    settings |= {"teacher_steps": 4, "preview_every": 0}
    return FlashDistill.train(model, name=name, positive=positive, negative=negative, **settings).args


def distilled(name: str, model: Any) -> dict[str, Any]:
    """Distil a MODEL, and load its LoRA again."""
    from dropped_in.nodes.distil.lora_output import FlashSaveLora
    from dropped_in.nodes.lora.loader import FlashLoraLoader
    from tiny_native import native_prompts

    positive, negative = native_prompts(2)
    before = drawn(model, positive, negative)
    trained, lora, _, _, losses = distil(model, name, positive, negative)
    (saved,) = FlashSaveLora.execute(lora, name).args
    loaded, report = FlashLoraLoader.execute(model, saved, 1.0).args
    expected = drawn(trained, positive, negative)
    _, again, _, text, _ = distil(model, name, positive, negative)
    distil(trained_without_flash(trained), name, positive, negative)
    runs = Path(sys.argv[3]) / "output" / "flash_distill"
    return {
        "losses": losses["loss"],
        "unchanged": torch.equal(drawn(model, positive, negative), before),
        "changed": float((expected - before).abs().max() / before.std()),
        "report": report,
        "layers": len([key for key in lora if key.endswith((".lora_down.weight", ".lora_A.weight"))]),
        "loaded": float((drawn(loaded, positive, negative) - expected).abs().max() / before.std()),
        "resumed": f"resumed at update {UPDATES}" in text and all(torch.equal(again[key], lora[key]) for key in lora),
        "runs": len(list(runs.glob(f"{name}-*"))),
    }


def trained_without_flash(model: Any) -> Any:
    """Return the model with its LoRA, as if it were a style LoRA."""
    clone = model.clone()
    clone.attachments.pop("flash_metadata")
    return clone


def flags(model: Any) -> dict[str, Any]:
    """Distil while ComfyUI moves weights in for each call, and while it would with less memory."""
    import comfy.model_management as management
    from tiny_native import native_prompts

    positive, negative = native_prompts(2)
    before = drawn(model, positive, negative)
    said = ""
    as_gpu = patch.object(management, "is_device_cpu", lambda _: False)
    management.unload_all_models()  # what is loaded stays, whatever the state
    with as_gpu, patch.object(management, "vram_state", management.VRAMState.NO_VRAM):
        try:
            distil(model, "novram", positive, negative)
        except ValueError as error:
            said = str(error)
        without = drawn(model, positive, negative)
    with as_gpu, patch.object(management, "vram_state", management.VRAMState.LOW_VRAM):
        losses = distil(model, "lowvram", positive, negative)[4]
    after = drawn(model, positive, negative)
    return {
        "novram": said,
        "lowvram": losses["loss"],
        "unchanged": torch.equal(before, without) and torch.equal(before, after),
    }


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
