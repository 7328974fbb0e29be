"""Read many damaged files of every kind: each must give a value or our own error, in bounded time.

    python -m benchmarks.fuzz --cases 10000                      # every kind
    python -m benchmarks.fuzz --cases 10000 --kinds lora recipe  # some of them

hypothesis changes, inserts, removes and cuts bytes of valid files. A case fails by any other exception than UserError
(LoraError for LoRA files), or when it takes longer than 30 seconds. hypothesis then prints the smallest such file.
Checkpoints come in two kinds: with the checksums of the undamaged files, and with checksums that fit the damage.
Needs a clone, and a system with SIGALRM.
"""

from __future__ import annotations

import argparse
import logging
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from flash_diffusion.flash_core.lora import LoraError, LoraModule, read_lora, write_lora
from flash_diffusion.tests.trainer.odd_data import decoded, raw_samples, section
from flash_diffusion.tests.trainer.test_any_bytes import mutated, tar_bytes
from flash_diffusion.trainer.data.batches.trajectories import FACTS, check_recorded
from flash_diffusion.trainer.data.cache.store import Store, as_keys, key_of
from flash_diffusion.trainer.data.reading import open_source
from flash_diffusion.trainer.distill import checkpoint
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.export.training_state import TrainingState
from flash_diffusion.trainer.recipes import read_recipe

SECONDS = 30  # of one case; a hang is a failure too
RECIPES = Path(__file__).resolve().parents[1] / "trainer" / "recipes"


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        seeds: contents of valid files.
        read: reads a file's content in an empty folder.
        errors: our own errors.
    """

    seeds: list[bytes]
    read: Callable[[Path, bytes], object]
    errors: tuple[type[Exception], ...] = (UserError,)


def recipe(folder: Path, content: bytes) -> None:
    """Read a recipe as ``flash-diffusion distill`` does."""
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    read_recipe(str(path))


def a_shard(folder: Path, content: bytes) -> None:
    """Read and decode all samples of a shard."""
    (folder / "a.tar").write_bytes(content)
    for sample in raw_samples(open_source(section("webdataset", folder / "a.tar"))):
        decoded(sample)


KEYS = [key_of("fuzz", number) for number in range(3)]


def cache_file() -> bytes:
    """A file of the cache with three rows."""
    with tempfile.TemporaryDirectory() as root:
        rows = {"latent": torch.arange(12.0).view(3, 1, 2, 2), "length": torch.tensor([1, 2, 3])}
        return Store(Path(root)).write(KEYS, rows).read_bytes()


def cache(folder: Path, content: bytes) -> None:
    """Find and read the rows of a file of the cache."""
    (folder / "a.safetensors").write_bytes(content)
    store = Store(folder)
    places = store.find(as_keys(KEYS))
    store.read(places.part(np.flatnonzero(~places.missing)))


def trajectories(folder: Path, content: bytes) -> None:
    """Check and read recorded trajectories whose facts and whose file hold ``content``."""
    (folder / FACTS).write_bytes(content)
    cache(folder, content)
    (folder / "b.safetensors").write_bytes(content)
    check_recorded(folder, "fingerprint")


def trained() -> checkpoint.Trained:
    """A part that trains, with moments."""
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return checkpoint.Trained({"student": {"weight": weight}}, {"student": optimizer}, {"weight": torch.ones(2, 3)})


def write_checkpoint(run: Path) -> Path:
    """Write a checkpoint of :func:`trained`."""
    folder = checkpoint.checkpoint_path(run, 1)
    folder.mkdir(parents=True)
    checkpoint.write_shared(folder, trained(), TrainingState(update=1, processes=1, samples=2), "digest")
    checkpoint.write_own(folder, 0, {"training": torch.Generator()}, {"means/count/total": torch.tensor(1)})
    (folder / checkpoint.CHECKSUMS).write_text(checkpoint.checksums(folder), encoding="utf-8")
    return folder


FILES = (checkpoint.TENSORS, checkpoint.FACTS, "random-0.safetensors", checkpoint.CHECKSUMS)


def checkpoint_files() -> list[bytes]:
    """The contents of a checkpoint's files."""
    with tempfile.TemporaryDirectory() as root:
        folder = write_checkpoint(Path(root))
        return [(folder / name).read_bytes() for name in FILES]


def checkpoints(folder: Path, content: bytes) -> None:
    """Resume from a checkpoint one of whose files holds ``content``; which one, the content decides."""
    written = write_checkpoint(folder)
    (written / FILES[len(content) % len(FILES)]).write_bytes(content)
    if sum(content[:64]) % 2:  # as if the damage had come before the checksums
        (written / checkpoint.CHECKSUMS).write_text(checkpoint.checksums(written), encoding="utf-8")
    last = checkpoint.last_intact(folder)
    if last is not None:
        checkpoint.read_facts(last)
        checkpoint.restore_shared(last, trained())
        checkpoint.restore_own(last, 0, {"training": torch.Generator()})


def lora_file() -> bytes:
    """A LoRA file of one layer."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "lora.safetensors"
        write_lora(path, {layer: LoraModule(layer, torch.ones(2, 4), torch.ones(4, 2), 2.0)}, None)
        return path.read_bytes()


def lora(folder: Path, content: bytes) -> None:
    """Read a LoRA file."""
    (folder / "lora.safetensors").write_bytes(content)
    read_lora(folder / "lora.safetensors")


def kinds() -> dict[str, Kind]:
    """Return all kinds of files."""
    return {
        "recipe": Kind([path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))], recipe),
        "shard": Kind([tar_bytes("w"), tar_bytes("w:gz")], a_shard),
        "cache": Kind([cache_file()], cache),
        "trajectories": Kind([cache_file(), b'{"fingerprint": "fingerprint", "indices": [0, 8]}\n'], trajectories),
        "checkpoint": Kind(checkpoint_files(), checkpoints),
        "lora": Kind([lora_file()], lora, (LoraError,)),
    }


class Hang(Exception):
    """A case took too long."""


def _hang(_number: int, _frame: FrameType | None) -> None:
    raise Hang(f"a case took more than {SECONDS} seconds")


def fuzz(kind: Kind, cases: int) -> Counter[str]:
    """Read ``cases`` damaged files and return how often each outcome came.

    Raises:
        Exception: what a reader raised, if it is none of our errors.
    """
    outcomes = Counter[str]()

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutated(kind.seeds))
    def case(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as root:
            signal.alarm(SECONDS)
            try:
                kind.read(Path(root), content)
                outcomes["read"] += 1
            except kind.errors as error:
                outcomes[type(error).__name__] += 1
            finally:
                signal.alarm(0)

    case()
    return outcomes


def main() -> None:
    """Fuzz the chosen kinds and print the outcomes."""
    found = kinds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="damaged files of each kind (default 10000)")
    parser.add_argument("--kinds", nargs="+", choices=found, default=list(found), help="default: all")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _hang)
    for name in arguments.kinds:
        begin = time.monotonic()
        outcomes = fuzz(found[name], arguments.cases)
        text = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
        print(f"{name}: {sum(outcomes.values())} cases in {time.monotonic() - begin:.0f} s: {text}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
