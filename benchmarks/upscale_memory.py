"""Peak memory of Flash Upscale on the embedded demo, beside what its pictures themselves take.

    python benchmarks/upscale_memory.py [SIDE ...]

Needs the runtime (``scripts/comfy_runtime.py fetch``). Each side is measured in a process of its own: a picture of
SIDE / 4 pixels is enlarged 4 times in one evaluation a tile. Peak resident memory is read before, when a single tile
has been enlarged (so that everything is loaded), and after.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIDES = (512, 1024, 2048, 4096)
MIB = 2**20
SCALE = 4
NATIVE = 128  # pixels, of the demo


def peak() -> int:
    """The most resident memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(comfyui: str, side: int) -> dict[str, float]:
    """Enlarge one picture in this process; sizes in MiB."""
    sys.path.insert(0, str(ROOT / "tests" / "comfy" / "inside"))
    from boot import boot

    boot(Path(comfyui), ROOT)
    import torch
    from dropped_in.nodes.demo.models import build_demo
    from dropped_in.nodes.picture.upscale import FlashUpscale

    torch.set_num_threads(1)
    with torch.inference_mode():
        model, clip, vae = build_demo()
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize(""))

        def enlarge(size: int) -> torch.Tensor:
            picture = torch.rand(1, size // SCALE, size // SCALE, 3)
            settings = {"seed": 0, "steps": 4, "denoise": 0.25, "guidance": 1.0, "tile_size": 0, "overlap": 0.25}
            node = FlashUpscale.execute(model, vae, prompt, picture, SCALE, **settings, noise_augmentation=0.0)
            return node.args[0]

        enlarge(SIDES[0])  # as large as a tile of the VAE: from here on only the picture grows
        before, start = peak(), time.process_time()
        result = enlarge(side)
        seconds = time.process_time() - start  # the machine may be busy with others
    pictures = result.nbytes * (1 + 1 / SCALE**2)
    return {"side": side, "pictures": pictures / MIB, "above": (peak() - before) / MIB, "seconds": seconds}


def main(arguments: list[str]) -> int:
    """Print a table, a row for each side."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import comfy_runtime

    if arguments and arguments[0] == "--inside":
        sys.stdout.write(json.dumps(measure(arguments[1], int(arguments[2]))) + "\n")
        return 0
    sys.stdout.write("| side | pictures, MiB | peak above a 512-pixel run, MiB | times the pictures | CPU seconds |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for side in [int(argument) for argument in arguments] or SIDES:
        command = [sys.executable, __file__, "--inside", str(comfy_runtime.comfyui_folder()), str(side)]
        environment = {**comfy_runtime.environment(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.stderr.write(done.stderr)
            return done.returncode
        row = json.loads(done.stdout.splitlines()[-1])
        ratio = row["above"] / row["pictures"]
        sys.stdout.write(
            f"| {side} | {row['pictures']:.0f} | {row['above']:.0f} | {ratio:.2f} | {row['seconds']:.0f} |\n"
        )
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
