"""The figures of Flash Evaluate on given numbers (see ``test_flash_evaluate.py``).

python flash_evaluate.py COMFYUI ROOT GIVEN

GIVEN is a safetensors file with "twin" and "other", (N, D), the features of two sets, four pictures a prompt. The last
line on the output is a JSON object of figures.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from boot import boot

PER_PROMPT = 4


def main(comfyui: Path, root: Path, given: Path) -> None:
    """Measure sets whose figures can be worked out by hand."""
    boot(comfyui, root)
    import torch
    from dropped_in.nodes.evaluate.figures import Figures, PictureSet
    from safetensors.torch import load_file

    values = load_file(given)
    twin, other = values["twin"], values["other"]
    prompts = [f"prompt {row // PER_PROMPT}" for row in range(len(twin))]

    def pictures(features: Any, look: float = 1.0) -> Any:
        return PictureSet(features, torch.full((len(features),), look), torch.full((len(features),), 2 * look))

    figures = Figures(pictures(twin), pictures(other), prompts)
    sets = {
        "twin": pictures(twin),
        "other": pictures(other),
        "half": pictures((twin + twin.mean(0)) / 2, 0.5),
        "far": pictures(twin + 3 * twin.std(0)),
    }
    found: dict[str, Any] = {name: asdict(figures.of(made)) for name, made in sets.items()}
    found["directions"] = figures.directions
    found["nearer"] = {
        "twin than far": asdict(figures.nearer(sets["twin"], sets["far"])),
        "far than twin": asdict(figures.nearer(sets["far"], sets["twin"])),
        "twin than twin": asdict(figures.nearer(sets["twin"], sets["twin"])),
    }
    sys.stdout.write("\n" + json.dumps(found))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
