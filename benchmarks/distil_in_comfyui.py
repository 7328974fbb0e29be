"""Distil the demo inside ComfyUI with Flash Distill, and measure how near the LoRA is to the teacher.

    python -m flash_diffusion.benchmarks.distil_in_comfyui --output out/distil_in_comfyui

The distance is measured by other nodes than the one that trains: KSampler draws the teacher's latents, Flash Sampler
draws with the model without and with the LoRA, from the same noise. Noise and seeds are new; half of the prompts were
trained on. Written: ``report.png`` (the node's), ``sheet.png`` (teacher, 1 and 2 steps
without the LoRA, 4, 2 and 1 steps with it) and a table on the output. Needs the runtime (``comfy_runtime.py fetch``).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
TRAINED = (
    *("red apple", "unicorn", "smiling face with sunglasses", "fox", "tangerine", "sunflower", "cat face", "dog face"),
    *("penguin", "dolphin", "octopus", "blue heart", "kiwi fruit", "polar bear", "cow face", "alien"),
)
NEW = ("pear", "tiger face", "grinning face", "wolf")
PICTURES = 4  # of each measured prompt
STEPS = (4, 2, 1)
TEACHER = {"steps": 16, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "simple", "denoise": 1.0}


def imported(path: Path) -> ModuleType:
    """Import a script that is no part of the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Return a node in API format."""
    return {"class_type": kind, "inputs": inputs}


def workflow(distil: dict[str, Any], measured: list[str]) -> dict[str, dict[str, Any]]:
    """Return the graph: distil, then draw every measured prompt in every way, and save latents and pictures."""
    graph = {
        "models": node("FlashDemoModels"),
        "empty": node("CLIPTextEncode", clip=["models", 1], text=""),
        "noise": node("EmptyLatentImage", width=128, height=128, batch_size=PICTURES),
        "distil": node(
            "FlashDistill",
            **{"model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2], "prompts": "\n".join(TRAINED)},
            **{"name": "benchmark", "width": 0, "height": 0, "guidance": 0.0, "seed": 0, **distil},
        ),
        "report": node("SaveImage", images=["distil", 2], filename_prefix="report"),
        "text": node("PreviewAny", source=["distil", 3]),
    }
    for number, prompt in enumerate(measured):
        graph[f"{number} text"] = node("CLIPTextEncode", clip=["models", 1], text=prompt)
        shared = {"positive": [f"{number} text", 0], "latent_image": ["noise", 0], "seed": 1000 + number}
        ways = {
            "teacher": node("KSampler", model=["models", 0], negative=["empty", 0], **shared, **TEACHER),
        }
        for kind, model in (("without", "models"), ("with", "distil")):
            for steps in STEPS:
                ways[f"{kind} {steps}"] = node(
                    "FlashSampler",
                    **{"model": [model, 0], "steps": steps, "guidance": 1.0, "denoise": 1.0, "stochasticity": 0.0},
                    **shared,
                )
        for name, way in ways.items():
            graph[f"{number} {name}"] = way
            graph[f"{number} {name} latent"] = node(
                "SaveLatent", samples=[f"{number} {name}", 0], filename_prefix="latent"
            )
            graph[f"{number} {name} decoded"] = node("VAEDecode", samples=[f"{number} {name}", 0], vae=["models", 2])
            graph[f"{number} {name} picture"] = node(
                "SaveImage", images=[f"{number} {name} decoded", 0], filename_prefix="picture"
            )
    return graph


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Return pictures in rows."""
    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * len(rows[0]), height * len(rows)), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            whole.paste(picture, (column * width, row * height))
    return whole


def main() -> None:
    """Distil, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/distil_in_comfyui"))
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--updates", type=int, default=0, help="0: the preset's")
    parser.add_argument("--trajectories", type=int, default=0, help="0: the preset's")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    runtime, client_module = imported(ROOT / "scripts" / "comfy_runtime.py"), imported(ROOT / "tests/comfy/client.py")
    measured = [*TRAINED[:4], *NEW]
    distil = {"preset": arguments.preset, "preview_every": 0}
    distil |= {"updates": arguments.updates, "trajectories": arguments.trajectories}
    arguments.output.mkdir(parents=True, exist_ok=True)
    with runtime.serve(arguments.output / "base") as server, client_module.Client(server) as client:
        begin = time.monotonic()
        run = client.run(workflow(distil, measured))
        if not run.succeeded:
            raise SystemExit(f"the run failed: {run.error}")
        seconds = time.monotonic() - begin
        client.images(run, "report")[0].save(arguments.output / "report.png")
        latents = {
            (number, way): client.latent(run, f"{number} {way} latent")
            for number in range(len(measured))
            for way in ("teacher", *(f"{kind} {steps}" for kind in ("without", "with") for steps in STEPS))
        }
        columns = ("teacher", "without 1", "without 2", "with 4", "with 2", "with 1")
        rows = [
            [client.images(run, f"{number} {way} picture")[0] for way in columns] for number in range(len(measured))
        ]
        sheet(rows).save(arguments.output / "sheet.png")
        sys.stdout.write(f"{run.outputs['text']['text'][0]}\n\n")
    sys.stdout.write(
        f"all nodes together: {seconds:.0f} s\n\n| steps | prompts | without | with |\n|---|---|---:|---:|\n"
    )
    for steps in STEPS:
        for name, numbers in (("trained", range(4)), ("new", range(4, len(measured)))):
            figures = [distance(latents, list(numbers), f"{kind} {steps}") for kind in ("without", "with")]
            sys.stdout.write(f"| {steps} | {name} | {figures[0]:.3f} | {figures[1]:.3f} |\n")


def distance(latents: dict[tuple[int, str], Tensor], numbers: list[int], way: str) -> float:
    """Return the mean squared distance to the teacher's latents / their variance, over some prompts."""
    teacher = torch.cat([latents[number, "teacher"] for number in numbers])
    drawn = torch.cat([latents[number, way] for number in numbers])
    return float((drawn - teacher).square().mean() / teacher.var())


if __name__ == "__main__":
    main()
