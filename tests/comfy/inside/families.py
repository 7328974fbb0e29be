"""LoRA files against ComfyUI's models of other families (see ``test_lora_families.py``).

python families.py COMFYUI ROOT REQUESTS

REQUESTS is a JSON file, {family: {"shapes": {key: shape}, "lora": path}} with diffusers' keys or the original ones; the
answer goes to stdout, one JSON object {family: {"base", "model", "side", and "error" or "matched", "total", "patches",
"scales", "complete", "published"}}. The models are built without memory. "--disable-mmap" has the option's effect.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from boot import boot


def main(comfyui: Path, root: Path, requests: Path) -> None:
    """Build each model from its shapes and load its LoRA."""
    boot(comfyui, root)
    import comfy.model_detection
    import comfy.model_patcher
    import torch
    from dropped_in.flash_core.lora import describe_base, read_lora
    from dropped_in.nodes.lora.patches import LoraMismatch, apply_lora
    from dropped_in.nodes.shared.model_facts import describe_model, native_side

    meta = torch.device("meta")
    answers = {}
    for family, request in json.loads(requests.read_text()).items():
        weights = {key: torch.empty(shape, device=meta) for key, shape in request["shapes"].items()}
        converted = comfy.model_detection.convert_diffusers_mmdit(dict(weights), "")
        if converted is not None:
            config = comfy.model_detection.model_config_from_unet(converted, "")
        elif "input_blocks.0.0.weight" in weights:  # the original names, which ComfyUI's own files have
            config = comfy.model_detection.model_config_from_unet(weights, "")
        else:
            config = comfy.model_detection.model_config_from_diffusers_unet(weights)
        config.set_inference_dtype(torch.float32, None)
        model = comfy.model_patcher.ModelPatcher(config.get_model(converted or weights, "", device=meta), meta, meta)
        file = read_lora(request["lora"])
        answer = {"base": describe_base(file), "model": describe_model(model), "side": native_side(model)}
        try:
            patched, report = apply_lora(file, model, 1.0)
            weights = [patch[1].weights for patches in patched.patches.values() for patch in patches]
            scales = Counter(alpha / down.shape[0] for _, down, alpha, *_ in weights)
            answer |= {"matched": report.matched, "total": report.layers, "patches": len(weights), "scales": scales}
            answer |= {"complete": report.complete, "published": report.published}
        except LoraMismatch as error:
            answer["error"] = str(error)
        answers[family] = answer
        if family == "sd15":
            answers["--disable-mmap"] = mapped_reads(model, Path(request["lora"]))
    sys.stdout.write(json.dumps(answers) + "\n")


def mapped_reads(model: Any, path: Path) -> dict[str, list[bool]]:
    """Record for each LoRA node whether it maps its file: first as usual, then with ComfyUI's ``--disable-mmap``."""
    import comfy.utils
    import folder_paths
    from dropped_in.flash_core.lora import files
    from dropped_in.nodes.lora.loader import FlashLoraLoader
    from dropped_in.nodes.lora.stack import FlashLoraStack

    folder_paths.add_model_folder_path("loras", str(path.parent))
    mapped: list[bool] = []
    usual = files.open_container

    def recorded(*arguments: Any, **options: bool) -> Any:
        mapped.append(options["mapped"])
        return usual(*arguments, **options)

    files.open_container = recorded
    found = {}
    for node in (FlashLoraLoader, FlashLoraStack):
        for disabled in (False, True):
            comfy.utils.DISABLE_MMAP = disabled
            node.execute(model, path.name, 1.0)
        found[node.__name__], mapped = mapped, []
    return found


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
