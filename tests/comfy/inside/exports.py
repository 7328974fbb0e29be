"""LoRAs as the trainer exports them, in ComfyUI's models of the same weights (see ``test_exports.py``).

python exports.py COMFYUI ROOT FOLDER

FOLDER holds, for each family, ``FAMILY.json`` (the diffusers network's configuration), ``FAMILY-weights.safetensors``,
``FAMILY-inputs.safetensors`` and ``FAMILY-lora.safetensors``. What each model makes of its inputs goes to
``FAMILY-outputs.safetensors``: ``bare``, with our loader's patches (``ours``) and with core's (``core``). Counts and
what ComfyUI logs go to stdout as one JSON object.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from boot import boot


class Listener(logging.Handler):
    """Keep the log's messages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Load every family's LoRA both ways and run the model."""
    boot(comfyui, root)
    import comfy.sd
    import comfy.utils
    import torch
    from dropped_in.flash_core.lora import read_lora
    from dropped_in.nodes.lora.patches import apply_lora
    from safetensors.torch import load_file, save_file
    from tiny import tiny_model

    answers = {}
    for path in sorted(folder.glob("*.json")):
        family = path.stem
        weights = load_file(folder / f"{family}-weights.safetensors")
        model = tiny_model(family, weights, json.loads(path.read_text()))
        inputs = load_file(folder / f"{family}-inputs.safetensors")
        z, t = inputs.pop("z"), inputs.pop("t")
        lora = folder / f"{family}-lora.safetensors"
        listener = Listener()
        logging.getLogger().addHandler(listener)
        ours, report = apply_lora(read_lora(lora), model, 1.0)
        core, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(lora)), 1.0, 0.0)
        logging.getLogger().removeHandler(listener)
        outputs = {}
        for name, patcher in (("bare", model), ("ours", ours), ("core", core)):
            patcher.patch_model()
            with torch.inference_mode():
                outputs[name] = patcher.model.diffusion_model(z, t, **inputs).clone()
            patcher.unpatch_model()
        save_file(outputs, folder / f"{family}-outputs.safetensors")
        answers[family] = {
            "matched": report.matched,
            "complete": report.complete,
            "ours": sum(len(patches) for patches in ours.patches.values()),
            "core": sum(len(patches) for patches in core.patches.values()),
            "log": listener.messages,
        }
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
