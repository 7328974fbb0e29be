"""Distil the demo inside ComfyUI with Flash Distill's presets, and measure each LoRA with Flash Evaluate.

    python -m flash_diffusion.benchmarks.distil_in_comfyui --output out/distil_in_comfyui

Through the real server: one prompt to distil, then one for each set of captions. A third of the measured captions were
trained on. Written: the nodes' reports as pictures and texts, ``results.json``, and a table on the output. Run it again
after a stop: distillations go on where they were, and what is measured stays. Needs the runtime
(``comfy_runtime.py fetch``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
# General captions stand for many pictures of the demo's, names for one each.
GENERAL = ("smiley face", "fantasy creature", "cartoon cat", "cartoon monkey", "small animal", "tasty snack")
NAMES = (
    *("red apple", "unicorn", "smiling face with sunglasses", "fox", "tangerine", "sunflower", "cat face", "dog face"),
    *("penguin", "dolphin", "octopus", "blue heart", "kiwi fruit", "polar bear", "cow face", "alien"),
)
# The measured captions, and pictures of each.
SETS = {
    "new general captions": (("animal face", "heart", "fresh fruit", "garden plant"), 24),
    "new names": (("pear", "tiger face", "grinning face", "wolf"), 24),
    "trained": (("small animal", "tasty snack", "fox", "red apple"), 24),
}
STEPS = "1, 2, 4"
TEACHER_STEPS = 8
PRESETS = ("quick try", "standard")


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


def distillation(preset: str) -> dict[str, dict[str, Any]]:
    """Return the graph that distils."""
    return {
        "models": node("FlashDemoModels"),
        "distil": node(
            "FlashDistill",
            **{"model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2]},
            **{"prompts": "\n".join((*GENERAL, *NAMES)), "name": f"benchmark {preset}", "preset": preset},
            **{"width": 0, "height": 0, "guidance": 0.0, "seed": 0, "preview_every": 0},
        ),
        "picture": node("SaveImage", images=["distil", 2], filename_prefix="distil"),
        "text": node("PreviewAny", source=["distil", 3]),
    }


def evaluation(preset: str, captions: tuple[str, ...], pictures: int) -> dict[str, dict[str, Any]]:
    """Return the graph that measures; ComfyUI takes the LoRA from its cache, or from the run's finished state."""
    graph = distillation(preset)
    graph["evaluate"] = node(
        "FlashEvaluate",
        **{"model": ["models", 0], "flash_model": ["distil", 0], "clip": ["models", 1], "vae": ["models", 2]},
        **{"prompts": "\n".join(captions), "per_prompt": pictures, "flash_steps": STEPS, "seed": 1000},
        **{"teacher_steps": TEACHER_STEPS},
    )
    graph["picture"] = node("SaveImage", images=["evaluate", 0], filename_prefix="evaluate")
    graph["text"] = node("PreviewAny", source=["evaluate", 1])
    return graph


class Measuring:
    """One session: a server, and the results of this session and of earlier ones.

    Args:
        folder: of all results.
        server: of ``comfy_runtime.serve``.
        client: connected to it.
    """

    def __init__(self, folder: Path, server: Any, client: Any) -> None:
        self.folder, self.server, self.client = folder, server, client
        self.file = folder / "results.json"
        self.found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def run(self, name: str, graph: dict[str, dict[str, Any]]) -> None:
        """Run a graph, unless an earlier session has its result; keep text, picture and CPU seconds.

        Raises:
            SystemExit: the graph failed or was interrupted.
        """
        if name in self.found:
            return
        begin = self.seconds()
        run = self.client.run(graph)
        if run.interrupted:
            raise SystemExit(f"{name} was interrupted. Run the command again to go on.")
        if not run.succeeded:
            raise SystemExit(f"{name} failed: {run.error}")
        self.client.images(run, "picture")[0].save(self.folder / f"{name}.png")
        text = run.outputs["text"]["text"][0]
        (self.folder / f"{name}.md").write_text(text + "\n")
        self.found[name] = {"text": text, "cpu_seconds": round(self.seconds() - begin)}
        self.file.write_text(json.dumps(self.found, indent=1))

    def seconds(self) -> float:
        """Return the CPU seconds of the server so far."""
        times = psutil.Process(self.server.process.pid).cpu_times()
        return float(times.user + times.system)


def distances(text: str) -> dict[tuple[str, str, str], str]:
    """Return {(run, steps, guidance): distance with its interval} of Flash Evaluate's table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {(row[0], row[1], row[2]): row[4] for row in rows[2:]}


def main() -> None:
    """Distil, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/distil_in_comfyui"))
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    runtime, client_module = imported(ROOT / "scripts" / "comfy_runtime.py"), imported(ROOT / "tests/comfy/client.py")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with runtime.serve(arguments.output / "base") as server, client_module.Client(server) as client:
        measuring = Measuring(arguments.output, server, client)
        for preset in arguments.presets:
            measuring.run(preset, distillation(preset))
        for name, measured in SETS.items():
            for preset in arguments.presets:
                measuring.run(f"{preset}, {name}", evaluation(preset, *measured))
    sys.stdout.write("| Preset | CPU seconds | Captions | Steps | LoRA | without | as many passes, guided |\n")
    sys.stdout.write("|---|---:|---|---:|---:|---:|---:|\n")
    for preset in arguments.presets:
        seconds = measuring.found[preset]["cpu_seconds"]
        for name in SETS:
            row = distances(measuring.found[f"{preset}, {name}"]["text"])
            guidance = next(key[2] for key in row if key[0] == "model" and key[2] != "1")
            for steps in STEPS.split(", "):
                guided = row.get(("model", str(int(steps) // 2), guidance), "-")
                cells = (row["Flash", steps, "1"], row["model", steps, "1"], guided)
                sys.stdout.write(f"| {preset} | {seconds} | {name} | {steps} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
