"""What the node's inputs become: a recipe of the trainer, and the folder of its run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distil.training.settings import FIRST_STEP, PresetName, in_stages
from ..distil.training.state import safe_name
from .models import Teacher
from .runner import RECIPE

PROMPTS = "prompts.txt"
CACHE = "cache"  # the encoded data of all runs, in the folder of all runs
LOGGED = 20  # lines of the log, at least, for a short run
PREVIEW_PROMPTS = 6
CHECKPOINT_UPDATES = 100  # at most so many updates are lost where the process is killed
KEY_LENGTH = 12  # hexadecimal digits in a folder's name

# Updates and recorded trajectories. An update has 32 samples on the demo and 16 on large models, Flash Distill's 8.
BUDGETS: dict[PresetName, tuple[int, int]] = {
    "quick try": (100, 128),
    "standard": (300, 512),
    "thorough": (2000, 4096),
}


# Fields of a recipe that the trainer's errors name, and the inputs that they come from.
INPUTS = {
    "model.path": "model",
    "model.config": "config",
    "data.path": "dataset",
    "data.resolution": "resolution",
    "method.guidance": "guidance",
    "lora.rank": "rank",
    "optimizer.lr": "learning_rate",
    "trajectories.count": "trajectories",
    "batch_size": "at_once",
}


def inputs_named_in(words: str) -> str:
    """Return a sentence that says which inputs the fields in a trainer's error are; empty where it names none."""
    named = [
        f"{field} is the input '{name}'"
        for field, name in INPUTS.items()
        if re.search(rf"(?<![\w.]){re.escape(field)}(?![\w.]\w)", words)
    ]
    return f"In this node {', '.join(named)}." if named else ""


@dataclass(frozen=True)
class Request:
    """What to distil, and how.

    Attributes:
        teacher: the model.
        config: the folder with a single file's configuration; None for the family's own.
        prompts: the lines of the text box.
        dataset: a folder of pictures with captions; None to train from the prompts alone.
        preset: how much work: one of Flash Distill's presets, or of the trainer's.
        resolution: width and height in pixels.
        guidance: the teacher's scale.
        rank, learning_rate: of the LoRA.
        updates: of the LoRA.
        trajectories: solutions of the teacher that are recorded and learnt from.
        at_once: samples that the model takes at once.
        seed: of the LoRA, the order and all noise.
        preview_every: updates between two previews; 0 for one at the end.
        name: of the LoRA, as :func:`~..distil.lora_output.lora_path` returns it.

    0 stands for what the preset says, but for seed and preview_every.
    """

    teacher: Teacher
    config: Path | None
    prompts: Sequence[str]
    dataset: Path | None
    preset: str
    resolution: int
    guidance: float
    rank: int
    learning_rate: float
    updates: int
    trajectories: int
    at_once: int
    seed: int
    preview_every: int
    name: str

    def check(self) -> None:
        """Raise ValueError for inputs that do not belong together."""
        if not self.prompts and self.dataset is None:
            raise ValueError("There is no prompt. Write prompts, one a line, or choose a dataset.")
        for name, value in (("updates", self.updates), ("trajectories", self.trajectories)):
            if value and self.preset not in BUDGETS:
                raise ValueError(
                    f"{name} is {value}, but the preset {self.preset} decides it by the sizes of model and data. Set "
                    f"{name} to 0, or choose one of {', '.join(BUDGETS)}."
                )

    def folder(self, runs: Path) -> Path:
        """Return the run's folder: of its name, and of a key of everything that decides its result."""
        content = {
            **self.recipe(Path(PROMPTS), Path(CACHE)),
            "prompts": list(self.prompts),
            "files": [*_stamps(self.teacher.path), *_stamps(self.config), *_stamps(self.dataset)],
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
        return runs / f"{safe_name(self.name)}-{key}"

    def write(self, folder: Path) -> None:
        """Write the recipe and the prompts into the run's folder."""
        import yaml

        folder.mkdir(parents=True, exist_ok=True)
        (folder / PROMPTS).write_text("".join(f"{line}\n" for line in self.prompts), encoding="utf-8")
        text = yaml.safe_dump(self.recipe(folder / PROMPTS, folder.parent / CACHE), sort_keys=False, width=110)
        (folder / RECIPE).write_text(text, encoding="utf-8")

    def recipe(self, prompts: Path, cache: Path) -> dict[str, Any]:
        """Return the recipe's fields.

        Args:
            prompts: the file with the prompts.
            cache: the folder of encoded data.
        """
        model: dict[str, Any] = {"family": self.teacher.family}
        if self.teacher.path is not None:
            model["path"] = str(self.teacher.path)
        if self.config is not None:
            model["config"] = str(self.config)
        data: dict[str, Any] = {"source": "prompts", "path": str(prompts), "cache": str(cache)}
        if self.dataset is not None:
            data |= {"source": "folder", "path": str(self.dataset)}
        if self.resolution:
            data["resolution"] = self.resolution
        return {"model": model, "data": data, "seed": self.seed, **self._training()}

    def _training(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"preview": {"every": self.preview_every, "prompts": self._preview_prompts()}}
        budget = next((budget for name, budget in BUDGETS.items() if name == self.preset), None)
        if budget is not None:
            updates, trajectories = self.updates or budget[0], self.trajectories or budget[1]
            fields |= {
                "preset": "best",
                "phases": _phases(updates),
                "trajectories": {"count": trajectories, "split": False},
                "log_every": max(1, min(10, updates // LOGGED)),
                "checkpoint": {"every": CHECKPOINT_UPDATES},
            }
        else:
            fields |= {"preset": self.preset}
        if self.guidance:
            fields["method"] = {"guidance": [self.guidance, self.guidance]}
        if self.rank:
            fields["lora"] = {"rank": self.rank}
        if self.learning_rate:
            fields["optimizer"] = {"lr": self.learning_rate}
        if self.at_once:
            fields["batch_size"] = self.at_once
        return fields

    def _preview_prompts(self) -> list[str]:
        """Return the prompts of the previews; none where the dataset's first captions are taken."""
        return list(self.prompts[:PREVIEW_PROMPTS])


def _phases(updates: int) -> list[dict[str, Any]]:
    """Return the phases of a preset with a number of updates: those of *Flash Distill*."""
    return [
        {
            "name": stage.name,
            "updates": stage.updates,
            "modes": list(stage.phase.modes),
            "learning_rate": stage.rate,
            "first_step_distillation": stage.phase.first_step_distillation,
            "dmd": stage.phase.dmd,
        }
        for stage in in_stages(updates, FIRST_STEP)
    ]


def _stamps(place: Path | None) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of a file, or of the files of a folder: a replaced file makes another run."""
    if place is None:
        return
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    for path in files:
        facts = path.stat()
        name = path.name if path == place else path.relative_to(place).as_posix()
        yield name, facts.st_size, facts.st_mtime_ns
