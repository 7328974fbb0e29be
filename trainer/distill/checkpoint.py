"""Write and read checkpoints: the parts that train and every random state, but no frozen weights.

A checkpoint is a folder of safetensors and JSON. It appears by one rename, so it is complete or absent. Its checksums
find any byte that changed later; then the checkpoint before it is used.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from ..export.training_state import TrainingState
from ..files import partial_path, publish_folder, remove_folder, sha256, writing

TENSORS = "state.safetensors"
FACTS = "state.json"
CHECKSUMS = "checksums.sha256"  # as `sha256sum --check` reads them
LINE = re.compile(r"^([0-9a-f]{64})  (.+)$", re.MULTILINE)
DAMAGED = "damaged-"

logger = logging.getLogger(__name__)


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


def checksums(folder: Path) -> str:
    """Return a line ``SHA-256  name`` for each file of a checkpoint."""
    names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in names)


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, empty where every byte is as it was written.

    Version 0.1 wrote no checksums; its checkpoints are read as they are.
    """
    try:
        if not (folder / CHECKSUMS).is_file():
            return "" if _is_of_version_0_1(folder) else f"{CHECKSUMS} is missing"
        written, found = (folder / CHECKSUMS).read_bytes().decode(errors="backslashreplace"), checksums(folder)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if written == found:
        return ""
    before, now = ({name: digest for digest, name in LINE.findall(text)} for text in (written, found))
    if set(now) <= set(before):
        for name, digest in before.items():
            if now.get(name) != digest:
                return f"{name} {'has changed' if name in now else 'is missing'}"
    return f"{CHECKSUMS} has changed"


def _is_of_version_0_1(folder: Path) -> bool:
    try:
        with safe_open(folder / TENSORS, "pt"):
            return "processes" not in json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError):
        return False


def last_intact(run: Path) -> Path | None:
    """Return the last intact checkpoint of a run, None for a run without checkpoints. Name the damaged ones after it.

    Raises:
        UserError: all checkpoints are damaged.
    """
    found = checkpoints(run)
    damaged: list[str] = []
    for folder in reversed(found):
        reason = damage(folder)
        if not reason:
            for text in damaged:
                logger.warning("damaged checkpoint: %s. The checkpoint before it is used", text)
            return folder
        damaged.append(f"{folder}: {reason}")
    if found:
        raise UserError(
            f"no checkpoint of {run} is intact ({'; '.join(damaged)}). Copy one back from a backup, or remove "
            f"{run / 'checkpoints'} to begin again"
        )
    return None


def set_aside(run: Path, last: Path | None) -> None:
    """Rename the damaged checkpoints after ``last``, so that they don't count, and remove what killed sessions left."""
    for folder in checkpoints(run):
        if last is not None and folder.name > last.name:
            aside = folder.with_name(DAMAGED + folder.name)
            remove_folder(aside)
            os.replace(folder, aside)
    for left in (run / "checkpoints").glob(".[0-9]*"):
        shutil.rmtree(left)


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
    tensors = _apart({name: value.cpu().contiguous() for name, value in collect(trained).items()})
    save_file(tensors, partial / TENSORS)
    (partial / FACTS).write_text(json.dumps({**asdict(state), "recipe": digest}, indent=2) + "\n", encoding="utf-8")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which no two share memory, which safetensors refuses; 8-bit moments share a table."""
    seen: set[int] = set()
    apart = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if place in seen else value
        seen.add(place)
    return apart


def write_own(partial: Path, rank: int, generators: Mapping[str, torch.Generator], own: Mapping[str, Tensor]) -> None:
    """Write what each process has of its own into the folder ``partial``: random states, and ``own`` tensors."""
    states = {f"generator/{name}": generator.get_state() for name, generator in generators.items()}
    states |= {name: value.cpu().contiguous().clone() for name, value in own.items()}
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
    own: Mapping[str, Tensor],
    accelerator: Accelerator,
    keep: int,
) -> Path:
    """Write a checkpoint together with all other processes, and remove the oldest ones.

    Args:
        run: the run's folder.
        digest: of the recipe.
        generators: this process's random streams, by name.
        own: other tensors of this process, by name: the sums of the log's means, the critic's memory.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the checkpoint cannot be written; the older ones stay.
    """
    final = checkpoint_path(run, state.update)
    partial = partial_path(final)
    try:
        with writing(final):
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write_shared(partial, trained, state, digest)
            accelerator.wait_for_everyone()
            write_own(partial, accelerator.process_index, generators, own)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (partial / CHECKSUMS).write_text(checksums(partial), encoding="utf-8", newline="\n")
                publish_folder(partial, final)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        for old in checkpoints(run)[:-keep]:
            remove_folder(old)
    return final


def read_facts(folder: Path) -> tuple[TrainingState, str]:
    """Return the state of the run, and the digest of its recipe.

    Raises:
        UserError: the folder is not a readable checkpoint.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        digest = facts.pop("recipe")
        return TrainingState(**facts), digest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a readable checkpoint ({error}); remove it and resume again") from error


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn errors of a checkpoint's content inside the ``with`` block into a readable one.

    Checksums find damage that came after they were written, but not a file that was written wrong.

    Raises:
        UserError: names the folder.
    """
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} is not a readable checkpoint ({error}); remove it and resume again") from error


def restore_shared(folder: Path, trained: Trained) -> None:
    """Read what :func:`write_shared` wrote, and copy it into ``trained``.

    Raises:
        UserError: the checkpoint has other parameters than ``trained``.
    """
    with _reading(folder):
        tensors = load_file(folder / TENSORS)
    expected = {(name, value.shape) for name, value in collect(trained).items() if not name.startswith("optimizer/")}
    present = {(name, value.shape) for name, value in tensors.items() if not name.startswith("optimizer/")}
    if expected != present:
        different = sorted({name for name, _ in expected ^ present})
        raise UserError(
            f"{folder} does not fit this recipe: {len(different)} tensors differ, such as {different[0]}; resume with "
            "the recipe the run was started with, or choose another --output"
        )
    with _reading(folder), torch.no_grad():
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


def restore_own(folder: Path, rank: int, generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    """Read what :func:`write_own` wrote for one process, set the random states and return the other tensors.

    Raises:
        UserError: the checkpoint has no such process.
    """
    path = folder / f"random-{rank}.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has no random state for process {rank}; resume with as many processes as before")
    with _reading(folder):
        states = load_file(path)
        for name, generator in generators.items():
            generator.set_state(states[f"generator/{name}"])
        torch.set_rng_state(states["torch"])
        if torch.cuda.is_available() and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])
    random = ("generator/", "torch", "cuda")
    return {name: value for name, value in states.items() if not name.startswith(random)}


def count_processes(folder: Path, state: TrainingState) -> int:
    """Return how many processes wrote a checkpoint; version 0.1 wrote only one file for each."""
    return state.processes or len(list(folder.glob("random-*.safetensors")))


def read_average(folder: Path) -> dict[str, Tensor]:
    """Return the averaged student of a checkpoint, which is exported."""
    with _reading(folder):
        tensors = load_file(folder / TENSORS)
    return {name.removeprefix("average/"): value for name, value in tensors.items() if name.startswith("average/")}
