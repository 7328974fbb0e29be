"""Run Flash Distill on the demo with a given start of the LoRA (see ``test_same_losses.py``).

python same_losses.py COMFYUI ROOT FOLDER

FOLDER holds ``inputs.json``, the node's inputs, and ``start.safetensors``, the LoRA at the start: the node draws it in
another order of the layers than the trainer. The last line on the output is the list of losses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

from boot import boot


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Run the node in inference mode, as ComfyUI runs nodes."""
    boot(comfyui, root)
    import folder_paths
    import torch
    from dropped_in.flash_core.lora import read_lora
    from dropped_in.nodes.demo.models import build_demo
    from dropped_in.nodes.distil.denoiser import ModelDenoiser
    from dropped_in.nodes.distil.nodes import FlashDistill

    torch.set_num_threads(1)
    folder_paths.set_output_directory(str(folder / "output"))
    start = read_lora(folder / "start.safetensors").modules
    with torch.inference_mode():
        model, clip, _ = build_demo()
        with patch.object(ModelDenoiser, "add_adapter", lambda self, role, *_: self.load_adapter(role, start)):
            losses = FlashDistill.train(model, clip=clip, **json.loads((folder / "inputs.json").read_text())).args[4]
    sys.stdout.write("\n" + json.dumps(losses["loss"]))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
