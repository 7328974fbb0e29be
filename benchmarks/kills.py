"""Kill small runs at random moments with SIGKILL, resume them, and compare their LoRAs with a run that was not killed.

    python -m benchmarks.kills --kills 50 --runs 10 --output out/kills

Each run computes every loss term from trajectories, with a moving average, previews and checkpoints, and with a cache
of its own. Every other run refreshes its trajectories while it trains; the others record them first. A third of the
kills come after a random time, a third just before a random operation on a file of the run or of its cache (opening,
renaming, removing), and a third before the first or second operation on a file of one kind: a checkpoint, a trajectory,
a preview, the cache, or what the export writes. Needs a clone and a system with fork; the model is a tiny random one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from flash_diffusion.tests.trainer.models import picture_folder, tiny_recipe, tiny_stable_diffusion
from flash_diffusion.tests.trainer.test_resume import ALL_TERMS
from flash_diffusion.trainer.config import Recipe, parse_recipe

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
PLACES = ("checkpoints", "trajectories", "previews", "-cache", "lora.safetensors", "README.md", "base.json")
# Of a line of the log: what the clock decides, and passes for trajectories, which a killed session may have made.
VARYING = ("seconds", "images_per_second", "unconditional")


@dataclass(frozen=True)
class Kill:
    """When a session is killed: after so many seconds, or before its n-th operation on a file of the run.

    Attributes:
        place: count only operations on paths that contain this text.
    """

    seconds: float | None = None
    operation: int | None = None
    place: str = ""


def recipe_of(root: Path, cache: Path, refreshed: bool) -> Recipe:
    """Return the recipe of a run: all terms, on the tiny model in ``root``."""
    content: dict[str, Any] = tiny_recipe(root / "model", root / "pictures")
    content |= ALL_TERMS
    content |= {
        "method": {**ALL_TERMS["method"], "states": {"student": 0.5}},  # recorded trajectories are the path's states
        "trajectories": {"count": 6, "batch": 2, "reuse": 2 if refreshed else None},
        "log_every": 2,
        "ema": 0.9,
        "preview": {"every": 2, "prompts": ["red ball"], "steps": [1]},
        "checkpoint": {"every": 1, "keep": 2},
    }
    content["data"] = {**content["data"], "cache": str(cache)}
    return parse_recipe(content)


def session(root: Path, run: Path, refreshed: bool, kill: Kill | None) -> tuple[bool, float, str]:
    """Run or resume in a process of its own.

    Args:
        refreshed: whether the run refreshes its trajectories.

    Returns:
        Whether the session came to its end, how many seconds it took, and the file operation at which it was killed.
    """
    reader, writer = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(root, run, refreshed, kill, writer)
    os.close(writer)
    timer = None
    if kill is not None and kill.seconds is not None:
        timer = threading.Timer(kill.seconds, os.kill, (child, signal.SIGKILL))
        timer.start()
    with os.fdopen(reader) as told:
        where = told.read()
    _, status = os.waitpid(child, 0)
    if timer is not None:
        timer.cancel()
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False, time.monotonic() - begin, where
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a session in {run} failed: see {run.with_suffix('.txt')}")
    return True, time.monotonic() - begin, where


def _child(root: Path, run: Path, refreshed: bool, kill: Kill | None, writer: int) -> None:
    """Run a session in a forked process, and end the process."""
    code = 1
    log = os.open(run.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        operations = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal operations
            if event not in FILE_EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
                return
            path = os.fsdecode(arguments[0])
            if not path.startswith(str(run)) or (kill is not None and kill.place not in path.removeprefix(str(run))):
                return
            operations += 1
            if kill is not None and operations == kill.operation:
                os.write(writer, f"{event} {Path(path).relative_to(run.parent)}".encode())
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        from flash_diffusion.trainer.distill.loop import distil

        distil(recipe_of(root, run.with_name(f"{run.name}-cache"), refreshed), run, resume=True)
        os.write(writer, str(operations).encode())
        code = 0
    except BaseException:
        logging.exception("the session failed")
    finally:
        os._exit(code)


def different(one: Path, other: Path) -> list[str]:
    """Return what differs between two runs: tensors and header of their LoRAs, lines of their logs."""
    ours, theirs = (load_file(run / "lora.safetensors") for run in (one, other))
    found = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or ours[name].numpy().tobytes() != theirs[name].numpy().tobytes()
    ]
    with safe_open(one / "lora.safetensors", "pt") as first, safe_open(other / "lora.safetensors", "pt") as second:
        found += [] if first.metadata() == second.metadata() else ["the LoRA's header"]
    return found + ([] if logged(one) == logged(other) else ["the log"])


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log without what varies."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.get("passes", {}).pop("trajectories", None)
    return [{name: value for name, value in line.items() if name not in VARYING} for line in lines]


def main() -> None:
    """Kill, resume and compare; end with an error if a LoRA differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs in all (default 50)")
    parser.add_argument("--runs", type=int, default=10, help="runs among which the kills are shared (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    parser.add_argument("--output", type=Path, default=Path("out/kills"), help="folder (default out/kills)")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    root = arguments.output.resolve()
    tiny_stable_diffusion(root / "model")
    picture_folder(root / "pictures")
    draws = random.Random(arguments.seed)
    import flash_diffusion.trainer.distill.loop  # noqa: F401 - before the fork, so that a session begins at once

    wholes = {False: root / "whole-recorded", True: root / "whole-refreshed"}
    for refreshed, whole in wholes.items():
        _, seconds, told = session(root, whole, refreshed, None)
        operations = int(told)
        print(f"{whole.name}: {seconds:.1f} s, {operations} operations on files")  # noqa: T201
    killed, wrong, places = 0, 0, Counter[str]()
    number = 0
    while killed < arguments.kills:
        run, refreshed, ended, here = root / f"run-{number}", number % 2 == 1, False, 0
        share = -(-arguments.kills // arguments.runs)
        while not ended:
            kill = None
            if here < share and killed < arguments.kills:
                # Most of a session's work stays, so a later session is shorter: aim at its first part.
                kill = (
                    Kill(seconds=draws.uniform(0.0, seconds * 0.6)),
                    Kill(operation=draws.randint(1, max(2, operations * 2 // 3))),
                    Kill(operation=draws.randint(1, 2), place=draws.choice(PLACES)),
                )[killed % 3]
            ended, _, where = session(root, run, refreshed, kill)
            if not ended:
                killed, here = killed + 1, here + 1
                places[
                    where.split("/")[0 if "-cache" in where else 1] if "/" in where else where or "by the clock"
                ] += 1
        if problems := different(run, wholes[refreshed]):
            wrong += 1
            print(f"{run}: differs in {', '.join(problems[:3])}")  # noqa: T201
        left = [path.relative_to(run).as_posix() for path in run.rglob(".*.partial")]
        print(f"run {number}: {here} kills, {len(problems)} differences, {len(left)} partial files left")  # noqa: T201
        number += 1
    print(f"{killed} kills in {number} runs; {number - wrong} LoRAs have the bits of the whole run's")  # noqa: T201
    print("killed at:", ", ".join(f"{place} {count}" for place, count in places.most_common()))  # noqa: T201
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
