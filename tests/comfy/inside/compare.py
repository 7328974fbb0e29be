"""The parts of Flash Compare in ComfyUI's process (see ``test_compare.py``).

python compare.py COMFYUI ROOT GIVEN RESULTS

GIVEN is a safetensors file with the weights of tiny networks ("<family>.*"); RESULTS gets a JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from boot import boot
from safetensors import safe_open


def refusal(function: Any, *arguments: Any) -> str | None:
    """Return the message of a function's ValueError, or None."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return None


def timing() -> list[str]:
    """Record the order of waiting for the device and of the work."""
    from dropped_in.nodes.sampling import compare

    events: list[str] = []
    kept, torch.cuda.synchronize = torch.cuda.synchronize, lambda *_: events.append("wait")
    try:
        compare.timed(torch.device("cuda"), lambda: events.append("work"))
    finally:
        torch.cuda.synchronize = kept
    compare.timed(torch.device("cpu"), lambda: events.append("work"))
    return events


def main() -> None:
    """Run all parts."""
    comfyui, root, given, results = map(Path, sys.argv[1:])
    boot(comfyui, root)
    from dropped_in.nodes.sampling import compare
    from dropped_in.nodes.sampling.contact_sheet import GAP, LEAST_COLUMN, draw_grid
    from tiny import tiny_model

    models = {}
    with safe_open(given, "pt") as file:
        configs = json.loads(file.metadata()["configs"])
        for family, config in configs.items():
            prefix = f"{family}."
            weights = {key[len(prefix) :]: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
            models[family] = tiny_model(family, weights, config)
    found: dict[str, Any] = {
        "families": refusal(compare.check_models, models["sd15"], models["sdxl"]),
        "clone": refusal(compare.check_models, models["sd15"], models["sd15"].clone()),
        "events": timing(),
        "steps": {text: compare.parse_steps(text) for text in ("1, 2, 4", "4;1 ,", "2,2,2", "8")},
        "bad_steps": {text: refusal(compare.parse_steps, text) for text in ("", "1, 9", "0", "two", "1.5", "-1", "²")},
    }
    grids = {}
    for name, (batch, height, width, colour) in {
        "pixel": (1, 1, 1, 0.5),
        "black": (2, 64, 200, 0.0),
        "white": (1, 512, 512, 1.0),
    }.items():
        pictures = [torch.full((batch, height, width, 3), colour) for _ in range(3)]
        grid = draw_grid(pictures, ["teacher, 30 steps\nguidance 7\n60 NFE, 12.34 s", "Flash", "Flash, 4 steps"])
        top = grid.shape[1] - batch * (height + GAP)
        column = max(width, LEAST_COLUMN)
        labels = [grid[0, :top, (left := GAP + index * (column + GAP)) : left + column] for index in range(3)]
        gaps = [grid[0, :top, index * (column + GAP) :][:, :GAP] for index in range(4)]
        grids[name] = {
            "shape": list(grid.shape),
            "top": top,
            "darkest": [float(label.min()) for label in labels],
            "ink": [float((label < 0.5).float().mean()) for label in labels],
            "gaps": min(float(gap.min()) for gap in gaps),
            "last_row": float(grid[0, -GAP - 1, GAP + (column - 1) // 2].mean()),
        }
    results.write_text(json.dumps({**found, "grids": grids}))


if __name__ == "__main__":
    main()
