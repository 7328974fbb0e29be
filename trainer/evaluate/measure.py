"""An evaluation at work: it draws samples, has them made, shows them to the feature network and keeps the time."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..metrics.distances import paired_distance
from .generate import PictureMaker, SamplingSetting, decode_pictures, sample_latents
from .reference import Draw, FeatureSet, Origin, Reference, draw

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from ...flash_core.solvers import Solver

FEW_STEPS = (4, 2, 1)
# Features of pictures made again may differ from the stored ones by this share of the set's spread: arithmetic differs
# a little between machines, and by far more where anything else has changed.
LIVE_TOLERANCE = 0.02


class FeatureNetwork(Protocol):
    """What sees the pictures for the metrics."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] to embeddings (B, D) and class scores (B, C)."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """What it can tell apart, in the order of the scores: "red heart", "blue heart"."""
        ...

    @property
    def general(self) -> Sequence[str]:
        """A more general caption of each class: "heart"."""
        ...


@dataclass(frozen=True)
class Options:
    """What an evaluation costs and compares.

    Attributes:
        samples: pictures of each run.
        times: pictures in the set that runs are measured against, for each one in a run.
        seed: of prompts and noise.
        steps: of the teacher in the reference.
        guidance: the teacher's scale, ``uncond + w (cond - uncond)``.
        solver: the teacher's; None is the one it is trained against.
        batch_size: pictures made at once; changes no picture.
        pictures: how many prompts the report shows.
    """

    samples: int = 256
    times: int = 2
    seed: int = 0
    steps: int = 32
    guidance: float = 3.0
    solver: Solver | None = None
    batch_size: int = 8
    pictures: int = 8


@dataclass(frozen=True)
class Measured:
    """A run's pictures as the metrics see them, the first of them as (K, 3, H, W) in [0, 1], and their cost."""

    set: FeatureSet
    pictures: Tensor
    seconds_per_image: float


def few_step_runs(guidance: float) -> list[SamplingSetting]:
    """The undistilled teacher in as few steps as the student, with guidance and without."""
    return [SamplingSetting("teacher", steps, scale) for scale in (guidance, 1.0) for steps in FEW_STEPS]


class Evaluation:
    """A model under evaluation: makes pictures, shows them to the feature network, keeps the time."""

    def __init__(
        self,
        generator: PictureMaker,
        network: FeatureNetwork,
        prompts: Sequence[str],
        options: Options,
        progress: Progress,
    ) -> None:
        """Draw the samples; nothing is generated yet. ``progress`` gets one task, counted in passes.

        ``self.samples`` is what every run is generated from, ``self.independent`` the set it is measured against.
        """
        self.generator = generator
        self.network = network
        self.options = options
        self.many = SamplingSetting("teacher", options.steps, options.guidance)
        self.teacher_runs = list(dict.fromkeys([self.many, *few_step_runs(options.guidance)]))
        seed, samples = options.seed, options.samples
        self.independent = draw(prompts, samples, seed, 0, options.times)
        self.samples = draw(prompts, samples, seed, 1)
        self.progress = progress
        self.task = progress.add_task("", total=0, unit="passes")

    def shown(self) -> list[int]:
        """The samples whose pictures the report shows: the first of each of the first prompts, none chosen.

        Where prompts are fewer than pictures, others follow; two at least, since distances are measured on them.
        """
        prompts = self.samples.prompts
        first = [row for row, prompt in enumerate(prompts) if prompt not in prompts[:row]]
        others = [row for row in range(len(prompts)) if row not in first]
        return [*first, *others][: max(2, self.options.pictures)]

    def expect(self, passes: int) -> None:
        """Announce work to the progress bar."""
        task = self.progress.tasks[self.task]
        self.progress.update(self.task, total=(task.total or 0) + passes)

    def measure(
        self, run: SamplingSetting, samples: Draw, shown: Sequence[int] = (), name: str | None = None
    ) -> Measured:
        """Generate ``samples``, look at all of them, keep the pictures at ``shown``.

        The time counts text encoder, network and decoder, not the metrics.
        """
        import torch

        self.progress.update(self.task, description=name or run.name)
        features, predicted, pictures, seconds = [], [], [], 0.0
        options, size = self.options, self.options.batch_size
        for begin in range(0, len(samples), size):
            batch = samples.rows(range(begin, min(begin + size, len(samples))))
            start = time.perf_counter()
            latents = sample_latents(self.generator, run, batch.prompts, batch.seeds, options.solver)
            images = decode_pictures(self.generator, latents)
            seconds += time.perf_counter() - start
            with torch.inference_mode():
                embedding, scores = self.network(images.to(self.generator.device))
            features.append(embedding.float().cpu())
            predicted.append(scores.argmax(1).cpu())
            pictures += [images[row - begin] for row in shown if begin <= row < begin + size]
            self.progress.advance(self.task, run.nfe * len(batch))
        return Measured(
            FeatureSet(torch.cat(features), torch.cat(predicted)),
            torch.stack(pictures) if pictures else torch.empty(0),
            seconds / len(samples),
        )

    def warm_up(self) -> None:
        """Make one picture untimed: a first call allocates memory and loads kernels."""
        one = self.samples.rows([0])
        decode_pictures(
            self.generator, sample_latents(self.generator, SamplingSetting("teacher", 1), one.prompts, one.seeds)
        )

    def make_reference(self, origin: Origin) -> Reference:
        """All of the teacher's sets, at the full price."""
        self.expect(
            self.many.nfe * len(self.independent) + sum(run.nfe for run in self.teacher_runs) * len(self.samples)
        )
        first = self.measure(self.many, self.independent, name="teacher, independent set").set
        made = {run: self.measure(run, self.samples).set for run in self.teacher_runs}
        second = made.pop(self.many)
        return Reference(origin, first, second, {run.name: features for run, features in made.items()})

    def not_reproduced(
        self, reference: Reference, live: Mapping[SamplingSetting, Measured], rows: Sequence[int]
    ) -> str | None:
        """Why stored sets are not what this machine makes, in words, or None.

        Args:
            live: the teacher's runs, made again at ``rows`` of the second set.
        """
        for run, made in live.items():
            if (stored := self.stored(reference, run)) is None:
                return f"{run.name} is not in it"
            spread = (stored.features - stored.features.mean(0)).norm(dim=1).mean().item()
            off = paired_distance(made.set.features, stored.features[list(rows)])
            if off > LIVE_TOLERANCE * spread:
                return f"{run.name} made again lies {off:.3g} from the stored set, whose spread is {spread:.3g}"
        return None

    def stored(self, reference: Reference, run: SamplingSetting) -> FeatureSet | None:
        """What a reference holds of one of the teacher's runs."""
        return reference.second if run == self.many else reference.few.get(run.name)


def progress_bar(console: Console | None) -> Progress:
    """Work done and to come, each task with its ``unit``; drawn on ``console``, or nowhere."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console is None,
    )


def environment(device: torch.device | str) -> dict[str, Any]:
    """Where the seconds were measured."""
    import torch

    from ... import __version__

    return {
        "flash_diffusion": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
