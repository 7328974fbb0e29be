"""Watch the memory of a run over many updates: it must stay flat.

    python -m benchmarks.memory_over_time --updates 2000 --output out/memory

A tiny random model trains with every loss term, a moving average, the critic's memory, previews and checkpoints, in a
process of its own. Its resident memory is read every second, beside the number of its updates. Needs a clone and Linux.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from flash_diffusion.tests.trainer.models import picture_folder, tiny_recipe, tiny_stable_diffusion
from flash_diffusion.tests.trainer.test_resume import ALL_TERMS

PARTS = 10  # of the run, each with its median


def recipe_of(root: Path, updates: int) -> dict[str, Any]:
    """Return the recipe: all terms from the first update on."""
    phase = {**ALL_TERMS["phases"][1], "updates": updates}
    return {
        **tiny_recipe(root / "model", root / "pictures"),
        **ALL_TERMS,
        "phases": [phase],
        "preview": {"every": max(1, updates // 8), "prompts": ["red ball"], "steps": [1]},
        "checkpoint": {"every": max(1, updates // 20), "keep": 2},
        "log_every": 1,
    }


def resident(pid: int) -> float:
    """Return a process's resident memory in MB, 0 after its end."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return 0.0
    return int(found[1]) / 1000 if found else 0.0


def updates_of(run: Path) -> int:
    """Return how many updates a run has made."""
    try:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["update"]) if lines else 0
    except (OSError, ValueError):
        return 0


def main() -> None:
    """Run, watch, and print the median of each part of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000, help="updates of the run (default 2000)")
    parser.add_argument("--output", type=Path, default=Path("out/memory"), help="folder (default out/memory)")
    arguments = parser.parse_args()
    root = arguments.output.resolve()
    shutil.rmtree(root, ignore_errors=True)
    tiny_stable_diffusion(root / "model")
    picture_folder(root / "pictures")
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(root, arguments.updates)), encoding="utf-8")
    run = root / "run"
    command = [
        sys.executable,
        "-m",
        "flash_diffusion.trainer",
        "distill",
        str(root / "recipe.yaml"),
        "--output",
        str(run),
    ]
    process = subprocess.Popen(command)
    seen: list[tuple[int, float]] = []
    while process.poll() is None:
        if (made := updates_of(run)) and (memory := resident(process.pid)):
            seen.append((made, memory))
        time.sleep(1)
    if process.returncode:
        raise SystemExit(process.returncode)
    for part in range(PARTS):
        first, end = (arguments.updates * at // PARTS for at in (part, part + 1))
        if within := [memory for made, memory in seen if first < made <= end]:
            text = f"median {statistics.median(within):.0f} MB, most {max(within):.0f} MB"
            print(f"updates {first + 1:5d} to {end:5d}: {text}")  # noqa: T201


if __name__ == "__main__":
    main()
