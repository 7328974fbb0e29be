"""Start the processes of a run, keep every other run out of its folder, and explain what stops the processes."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, broadcast_object_list, is_mlu_available, is_npu_available, is_xpu_available
from filelock import FileLock, Timeout

from ..config import Recipe
from ..errors import UserError
from ..files import write_text_whole, writing
from .several.peers import Peers, go_on

LOCK = ".lock"
OWNER = ".lock-owner.json"  # beside the lock: some systems let nobody read a locked file
Result = TypeVar("Result")


def start_accelerator(precision: str) -> Accelerator:
    """Start accelerate with all processes that a launcher has started, on a CPU too.

    Args:
        precision: ``no`` or ``bf16``.

    Raises:
        UserError: accelerate or torch cannot start, or the processes do not find each other.
    """
    launched = _launched()
    _refuse_engines()
    # Without a device accelerate takes each process for a run of its own, unless it is told to stay on the CPU.
    on_cpu = launched > 1 and not _has_device()
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            # Weights cast under no_grad must not be found in autocast's cache by a step that needs their gradients.
            kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        )
    except (RuntimeError, ValueError, ImportError) as error:
        raise UserError(
            f"accelerate could not start with WORLD_SIZE {launched}: {error}. Check the options of `accelerate launch` "
            "or `torchrun`, and the environment variables WORLD_SIZE, RANK, MASTER_ADDR and ACCELERATE_..."
        ) from error
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but accelerate joined {accelerator.num_processes}: each would be a "
            "run of its own. Start with `accelerate launch`, or with one process"
        )
    return accelerator


# Engines that accelerate starts where its configuration says so, and what a run does in place of them.
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "its engine owns one optimiser and one backward pass, but a run has up to three optimisers, and its backward "
        "pass is split. ZeRO's saving is small here, because only the LoRAs train",
    ),
    "ACCELERATE_USE_FSDP": (
        "accelerate's FSDP plugin",
        "it shares the weights of models that are given to accelerate, with one forward and one backward pass a step; "
        "a run shares its base by itself",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "it replaces the model by one of its own"),
}


def _refuse_engines() -> None:
    """Raise UserError where accelerate is configured for an engine that would change nothing, or break the step."""
    for variable, (name, why) in ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on"):
            raise UserError(
                f"{name} does not work here: {why}. Run `accelerate config` again with multi-GPU (or multi-CPU) and "
                f"without {name}, or start with torchrun; for a base that leaves no room on a card set sharding: base"
            )


def _launched() -> int:
    """Return how many processes the launcher says it has started."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal():
        raise UserError(f"the environment variable WORLD_SIZE is {text!r}; expected the number of processes; unset it")
    return int(text)


def _has_device() -> bool:
    return torch.cuda.is_available() or is_xpu_available() or is_npu_available() or is_mlu_available()


def in_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Return the result of ``work``, done once in the main process, in all processes.

    Raises:
        UserError: ``work`` raised it, in all processes: none waits for another one that has left.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except UserError as error:
            outcome = [None, error]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    result: Result
    result, refused = outcome
    if isinstance(refused, UserError):
        raise refused
    return result


@contextmanager
def only_run_in(output: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make the folder of a run and hold its lock inside the ``with`` block.

    The system releases the lock of a killed process.

    Raises:
        UserError: ``output`` is no folder, can't be written, or another run holds its lock.
    """
    lock = FileLock(output / LOCK, timeout=0)
    try:
        in_main_process(accelerator, lambda: _acquire(lock, output))
        yield
    finally:
        if lock.is_locked:
            (output / OWNER).unlink(missing_ok=True)
            lock.release()


def _acquire(lock: FileLock, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; expected the run's folder. Choose another --output")
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{output} is in use by another run{_owner(output)}. Wait for it, stop it, or choose another --output"
            ) from None
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M}"}
    write_text_whole(output / OWNER, json.dumps(owner) + "\n")


def _owner(output: Path) -> str:
    """Return who holds the lock, as far as that is known."""
    try:
        owner = json.loads((output / OWNER).read_text(encoding="utf-8"))
        return f" (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def device_errors_explained(recipe: Recipe, output: Path, peers: Peers | None = None) -> Iterator[None]:
    """Turn errors of a full memory and of lost processes inside the ``with`` block into readable ones.

    Args:
        peers: the other processes, asked which of them has ended.

    torch tells of the end of a process that reads a stream wherever the main thread is.

    Raises:
        UserError: says what to lower, and from which checkpoint the run can go on.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in text:
            where = "the GPU's memory" if isinstance(error, torch.cuda.OutOfMemoryError) else "the memory"
            advice = [
                f"a lower batch_size than {recipe.batch_size}, with more gradient_accumulation"
                * (recipe.batch_size > 1),
                "gradient_checkpointing=true" * (not recipe.gradient_checkpointing),
                f"a lower data.resolution or lora.rank ({recipe.lora.rank})",
            ]
            raise UserError(f"{where} is full. Set {', or '.join(filter(None, advice))}; {go_on(output)}") from error
        if isinstance(error, getattr(torch.distributed, "DistError", ())) or "gloo/" in text:
            if gone := _gone(peers):
                raise UserError(f"the processes lost each other: {'; '.join(gone)}; {go_on(output)}") from error
            raise UserError(
                f"the processes lost each other: {text.splitlines()[0]}. Start one process for each GPU, and look for "
                f"the first error of the other processes; {go_on(output)}"
            ) from error
        if "DataLoader worker" in text:
            raise UserError(
                f"a process that reads the stream has ended ({text.splitlines()[0]}), perhaps because the memory was "
                f"full. Set data.workers ({recipe.data.workers}) or data.shuffle ({recipe.data.shuffle}) lower; "
                f"{go_on(output)}"
            ) from error
        raise


def _gone(peers: Peers | None) -> list[str]:
    """Return which other processes have ended; the system may need a moment to tell."""
    for _ in range(20 if peers else 0):
        assert peers is not None
        if gone := peers.gone():
            return gone
        time.sleep(0.25)
    return []
