"""Write and read checkpoints: the parts that train and every random state, but no frozen weights.

A checkpoint is a folder of safetensors and JSON. It appears by one rename, so it is complete or absent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from ..export.training_state import TrainingState
from ..files import partial_path, publish_folder

TENSORS = "state.safetensors"
FACTS = "state.json"


@dataclass(frozen=True)
class Trained:
    """The parts that train.

    Attributes:
        parameters: part (student, discriminator, critic) -> name -> parameter.
        optimizers: part -> optimiser.
        average: the exponential moving average of the student's parameters.
    """

    parameters: Mapping[str, Mapping[str, nn.Parameter]]
    optimizers: Mapping[str, torch.optim.Optimizer]
    average: Mapping[str, Tensor]


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir()) if folder.is_dir() else []


def checkpoint_path(run: Path, update: int) -> Path:
    """Return the folder of the checkpoint after ``update`` updates."""
    return run / "checkpoints" / f"{update:08d}"


def collect(trained: Trained) -> dict[str, Tensor]:
    """Return name -> tensor of a checkpoint, without the random states."""
    tensors: dict[str, Tensor] = {}
    for part, parameters in trained.parameters.items():
        tensors |= {f"{part}/{name}": value.detach() for name, value in parameters.items()}
    tensors |= {f"average/{name}": value for name, value in trained.average.items()}
    for part, optimizer in trained.optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{part}/{index}/{key}": torch.as_tensor(value) for key, value in moments.items()}
    return tensors


def write_shared(partial: Path, trained: Trained, state: TrainingState, digest: str) -> None:
    """Write the tensors and facts that all processes share into the folder ``partial``."""
    tensors = {name: value.cpu().contiguous() for name, value in collect(trained).items()}
    save_file(tensors, partial / TENSORS)
    (partial / FACTS).write_text(json.dumps({**asdict(state), "recipe": digest}, indent=2) + "\n")


def write_random(partial: Path, rank: int, generators: Mapping[str, torch.Generator]) -> None:
    """Write one process's random states into the folder ``partial``."""
    states = {f"generator/{name}": generator.get_state() for name, generator in generators.items()}
    states["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, partial / f"random-{rank}.safetensors")


def save(
    run: Path,
    trained: Trained,
    state: TrainingState,
    digest: str,
    generators: Mapping[str, torch.Generator],
    accelerator: Accelerator,
    keep: int,
) -> Path:
    """Write a checkpoint together with all other processes, and remove the oldest ones.

    Args:
        run: the run's folder.
        digest: of the recipe.
        generators: this process's random streams, by name.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    final = checkpoint_path(run, state.update)
    partial = partial_path(final)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_shared(partial, trained, state, digest)
    accelerator.wait_for_everyone()
    write_random(partial, accelerator.process_index, generators)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish_folder(partial, final)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    return final


def read_facts(folder: Path) -> tuple[TrainingState, str]:
    """Return the state of the run, and the digest of its recipe.

    Raises:
        UserError: the folder is not a readable checkpoint.
    """
    try:
        facts = json.loads((folder / FACTS).read_text())
        digest = facts.pop("recipe")
        return TrainingState(**facts), digest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a readable checkpoint ({error}); remove it and resume again") from error


def restore_shared(folder: Path, trained: Trained) -> None:
    """Read what :func:`write_shared` wrote, and copy it into ``trained``.

    Raises:
        UserError: the checkpoint has other parameters than ``trained``.
    """
    tensors = load_file(folder / TENSORS)
    expected = {(name, value.shape) for name, value in collect(trained).items() if not name.startswith("optimizer/")}
    present = {(name, value.shape) for name, value in tensors.items() if not name.startswith("optimizer/")}
    if expected != present:
        different = sorted({name for name, _ in expected ^ present})
        raise UserError(
            f"{folder} does not fit this recipe: {len(different)} tensors differ, such as {different[0]}; resume with "
            "the recipe the run was started with, or choose another --output"
        )
    with torch.no_grad():
        for part, parameters in trained.parameters.items():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"{part}/{name}"])
        for name, value in trained.average.items():
            value.copy_(tensors[f"average/{name}"])
    for part, optimizer in trained.optimizers.items():
        moments: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimizer/{part}/"
        for name, value in tensors.items():
            if name.startswith(prefix):
                index, key = name.removeprefix(prefix).split("/")
                moments.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_random(folder: Path, rank: int, generators: Mapping[str, torch.Generator]) -> None:
    """Read and set the random states of one process.

    Raises:
        UserError: the checkpoint was written by fewer processes.
    """
    path = folder / f"random-{rank}.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has no random state for process {rank}; resume with as many processes as before")
    states = load_file(path)
    for name, generator in generators.items():
        generator.set_state(states[f"generator/{name}"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def read_average(folder: Path) -> dict[str, Tensor]:
    """Return the averaged student of a checkpoint, which is exported."""
    return {
        name.removeprefix("average/"): value
        for name, value in load_file(folder / TENSORS).items()
        if name.startswith("average/")
    }
