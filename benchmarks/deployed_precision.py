"""Distil for the precision that you deploy: LoRAs distilled on one storage of the base, drawn on each storage.

    python -m benchmarks.deployed_precision --output out/precision
    python -m benchmarks.deployed_precision --output out/precision --storages plain nf4 --set phases.0.updates=260

Short runs on the demo, equal in everything but ``model.storage``. Distance: mean square of the student's latents to
those of the plain teacher, from the same noise and prompts, over the latents' variance. A run that is finished is not
made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.trainer.config import Recipe
from flash_diffusion.trainer.demo.shards import load_pictures
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.evaluate.generate import SamplingSetting, sample_latents
from flash_diffusion.trainer.recipes import LORA_FILE, load_recipe
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

STORAGES = ("plain", "float8", "int8", "nf4")
STEPS = (1, 2, 4)
PHASES = "phases=[{name: all modes, updates: 100, modes: [0.55, 0.2, 0.15, 0.1]}]"  # the distillation alone
SHORT = ("trajectories.count=128", PHASES, "preview.steps=[1]", "checkpoint.every=0")


def recipe_of(storage: str, fields: list[str]) -> Recipe:
    """Return the demo's recipe with a short run on a base that is stored so."""
    stored = [] if storage == "plain" else [f"model.storage={storage}"]
    return load_recipe("demo", [*SHORT, *fields, *stored])


def latents(teacher: Teacher, setting: SamplingSetting, count: int) -> Tensor:
    """Return latents of ``count`` samples, which differ in noise and prompt: the names of the demo's first pictures."""
    prompts = [caption.name for caption in load_pictures().captions[:count]]
    return sample_latents(teacher, setting, prompts, list(range(count)))


def rows(output: Path, storages: list[str], count: int, fields: list[str]) -> Iterator[str]:
    """Distil on each storage, draw on each, and yield the lines of a Markdown table."""
    loras = {}
    for storage in storages:
        folder = output / storage
        done = (folder / LORA_FILE).is_file()
        loras[storage] = read_lora(folder / LORA_FILE if done else distil(recipe_of(storage, fields), folder))
    plain = recipe_of("plain", fields)
    guidance = sum(plain.method.guidance) / 2
    reference = latents(load_teacher(plain.model), SamplingSetting("teacher", 16, guidance), count)
    yield f"| distilled on | {' | '.join(f'drawn on {storage}' for storage in storages)} |"
    yield "|" + "---|" * (len(storages) + 1)
    for trained, lora in loras.items():
        cells = []
        for drawn in storages:
            teacher = load_teacher(recipe_of(drawn, fields).model)
            teacher.stochasticity = lora.metadata.stochasticity if lora.metadata is not None else {}
            teacher.denoiser.load_adapter("student", lora.modules)
            made = (latents(teacher, SamplingSetting("student", steps), count) for steps in STEPS)
            cells.append(
                " / ".join(f"{float((one - reference).square().mean() / reference.var()):.4f}" for one in made)
            )
        yield f"| {trained} | {' | '.join(cells)} |"
    errors = []
    for drawn in storages:
        made = latents(load_teacher(recipe_of(drawn, fields).model), SamplingSetting("teacher", 16, guidance), count)
        errors.append(f"{float((made - reference).square().mean() / reference.var()):.4f}")
    yield f"| the teacher, 16 steps | {' | '.join(errors)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--samples", type=int, default=64, help="pictures of each cell (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other fields of the recipe")
    args = parser.parse_args()
    torch.manual_seed(0)
    for line in rows(args.output, args.storages, args.samples, args.set):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
