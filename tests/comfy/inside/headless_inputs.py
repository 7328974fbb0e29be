"""What Flash Distill Headless makes of its inputs, without a server (see ``test_headless_inputs.py``).

python headless_inputs.py COMFYUI ROOT BASE

BASE is ComfyUI's base directory. Recipes are written into BASE/recipes. The last line on the output is a JSON object.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from boot import boot

SETTINGS: dict[str, dict[str, Any]] = {
    "quick try": {},
    "standard": {"resolution": 256, "guidance": 5.0, "rank": 4, "learning_rate": 1e-5, "at_once": 3},
    "thorough": {"updates": 7, "trajectories": 5},
    "best": {},
    "tdm": {},
    "paper": {},
}
NAMES = ("../up", "/absolute", "a/../../b", "", "C:\\x", "linked/x")
WORDS = (
    "model.config: the configuration of /models/model.path.safetensors is on the Hub; set model.config to a folder",
    "data.resolution: 60 is no multiple of 8, or lower batch_size.",
    "RuntimeError: of a library, in model.configuration",
)
DATASETS = ("..", "/", "../input/pictures", "linked", "pictures/../..", "missing")
MODELS = (
    *("checkpoints/../../secret.safetensors", "/etc/passwd", "diffusers/..", "loras/../checkpoints/sd15.safetensors"),
    "checkpoints/missing.safetensors",
)


def outcome(work: Callable[[], Any]) -> str:
    """Return what a call returns, or the message of its ValueError."""
    try:
        return str(work())
    except ValueError as error:
        return f"refused: {error}"


def queue_beside_an_ending_process(starting: Any, folder: Path) -> list[str]:
    """Queue a run while the last process of the queue still lives, but has let go of its lock for the last time."""
    started: list[str] = []
    starting.start_queue = lambda runs: started.append(runs.name)
    starting._started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    folder.mkdir()
    try:
        starting.queue_run(folder, "late")
    finally:
        starting._started.communicate(b"\n")
    return started


def main(comfyui: Path, root: Path, base: Path) -> None:
    """Try the inputs, and print what they give."""
    boot(comfyui, root)
    from comfy.cli_args import args

    args.base_directory = str(base)
    import os

    import folder_paths
    from dropped_in.nodes.distil.lora_output import lora_path
    from dropped_in.nodes.headless import starting
    from dropped_in.nodes.headless.following import remove
    from dropped_in.nodes.headless.models import Teacher, find_config, find_teacher, model_names
    from dropped_in.nodes.headless.nodes import datasets, find_dataset
    from dropped_in.nodes.headless.recipe import Request, inputs_named_in
    from dropped_in.nodes.headless.runner import TRAINER_LOCK, Job, write_job
    from filelock import FileLock

    folder_paths.set_output_directory(str(base / "output"))
    folder_paths.set_input_directory(str(base / "input"))

    def request(preset: str, teacher: Teacher, dataset: Path | None = None, **changes: Any) -> Request:
        given = {"resolution": 0, "guidance": 0.0, "rank": 0, "learning_rate": 0.0, "updates": 0, "trajectories": 0}
        given |= {"at_once": 0, "seed": 0, "preview_every": 25, "name": "mine/my flash"}
        prompts = ("red apple", "1.5e3: a [number]", "#hash")
        return Request(teacher, None, prompts, dataset, preset, **{**given, **changes})

    demo, checkpoint = find_teacher("Flash demo"), find_teacher("checkpoints/sd15.safetensors")
    for preset, changes in SETTINGS.items():
        request(preset, demo, **changes).write(base / "recipes" / preset)
    request("best", checkpoint, find_dataset("pictures")).write(base / "recipes" / "dataset")

    runs = starting.runs_folder()
    same = [request("standard", checkpoint, find_dataset("pictures"), name="a").folder(runs).name]
    same.append(request("standard", checkpoint, find_dataset("pictures"), name="a").folder(runs).name)
    other = [request("standard", checkpoint, find_dataset("pictures"), name="a", seed=1).folder(runs).name]
    (base / "input" / "pictures" / "2.txt").write_text("another caption")
    other.append(request("standard", checkpoint, find_dataset("pictures"), name="a").folder(runs).name)

    def with_python(program: str) -> str:
        os.environ[starting.PYTHON] = program
        told = outcome(starting.check_packages)
        del os.environ[starting.PYTHON]
        return told

    facts = {
        "models": {name: outcome(lambda name=name: find_teacher(name).family) for name in model_names()},
        "no models": {name: outcome(lambda name=name: find_teacher(name)) for name in MODELS},
        "no config": outcome(lambda: find_config("../diffusers/pixart")),
        "datasets": datasets(),
        "no datasets": {name: outcome(lambda name=name: find_dataset(name)) for name in DATASETS},
        "names": {name: outcome(lambda name=name: lora_path(name)) for name in NAMES},
        "same": same,
        "other": other,
        "folder": str(request("standard", demo).folder(runs)),
        "no prompts": outcome(replace(request("standard", demo), prompts=()).check),
        "no updates": outcome(request("paper", demo, updates=5).check),
        "inputs": [inputs_named_in(words) for words in WORDS],
        "packages": outcome(starting.check_packages),
        "empty python": with_python(str(base / "empty" / "bin" / "python")),
        "no python": with_python(str(base / "no-python")),
    }
    orphan = runs / "orphan"
    orphan.mkdir()
    write_job(orphan, Job("stopped", 1.0, "orphan"))
    with FileLock(orphan / TRAINER_LOCK):
        facts["removed at work"] = outcome(lambda: remove("orphan", runs, runs.parent / "none", alive=False))
    facts["removed"] = [outcome(lambda: remove("orphan", runs, runs.parent / "none", alive=False)), orphan.exists()]
    facts["queue that ends"] = queue_beside_an_ending_process(starting, runs / "late")
    shutil.rmtree(base / "output" / starting.RUNS)
    (base / "output" / starting.RUNS).symlink_to(base.parent)
    facts["runs elsewhere"] = outcome(starting.runs_folder)
    print(json.dumps(facts))  # noqa: T201


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
