"""Make the pictures of a comparison on a task, and describe them by features and scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from .....flash_core.measures.random_features import RandomFeatures
from ....metrics.pictures.teacher_states import TeacherStates
from ....tasks.figures import Scene
from ...generate import EncodedPrompts, SamplingSetting, decode_pictures, sample_latents
from .subjects import batches

if TYPE_CHECKING:
    from ....tasks.base import Task
    from ....teachers.base import Teacher
    from ...evaluator import SeesPictures
    from ...request import Options
    from ..runs import Entry
    from .sample_set import SampleSet
    from .subjects import Batch


@dataclass(frozen=True)
class AnswerMaker:
    """Makes answers to batches of samples.

    Attributes:
        network: describes pictures.
        many: the teacher's many steps.
        perceptual: LPIPS of pictures (B, 3, H, W) in [0, 1]; None leaves LPIPS out.
        of_sets: whether sets are compared, which needs all kinds of features.
    """

    teacher: Teacher
    task: Task
    network: SeesPictures
    options: Options
    many: SamplingSetting
    perceptual: Callable[[Tensor, Tensor], Tensor] | None
    of_sets: bool
    random: RandomFeatures = field(default_factory=RandomFeatures)

    def batches(self, sample_set: SampleSet) -> Iterator[Batch]:
        """Draw the samples of a set, a batch at a time."""
        options, size = self.options, self.teacher.resolution
        return batches(sample_set.subjects, self.task, size, options.samples, sample_set.seed, options.batch_size)

    def encode(self, batch: Batch) -> tuple[EncodedPrompts, Scene]:
        """Return the batch's captions and conditions as the model reads them, and what the task's figures need."""
        device = self.teacher.device
        drawn = {name: value.to(device) for name, value in batch.drawn.items()}
        conditioning = self.teacher.encode_prompts(batch.captions).joined(self.task.encode(drawn, self.teacher))
        rows = EncodedPrompts(self.teacher, self.task, batch.captions, conditioning)
        originals, others = batch.images / 2 + 0.5, batch.others / 2 + 0.5
        return rows, Scene(originals, others, batch.drawn, self.look, self.perceptual)

    def answer(self, sample_set: SampleSet, entry: Entry, rows: EncodedPrompts, scene: Scene, batch: Batch) -> None:
        """Make a run's pictures of a batch, and keep what is measured of them."""
        scene_rows = rows  # hidden states are those under the task's conditions, whatever the run has seen
        if not entry.conditioned:
            conditioning = self.task.conditions_without(rows.conditioning)
            assert conditioning is not None, f"{self.task.name} says what it is without, and can't be"
            rows = replace(rows, conditioning=conditioning)
        start = time.perf_counter()
        if entry.run is None:
            latents = self.teacher.encode((scene.originals * 2 - 1).to(self.teacher.device))
        else:
            latents = sample_latents(rows, entry.run, rows.prompts, batch.seeds, self.options.solver)
        made = decode_pictures(rows, latents)
        seen = sample_set.seen[entry.name]
        seen.seconds += time.perf_counter() - start
        finished = self.task.finished(made, scene)
        seen.keep(self._kinds(scene_rows, latents, finished), self.task.scores(made, scene))
        seen.show(finished, sample_set.shown)

    def answer_independently(self, sample_set: SampleSet, rows: EncodedPrompts, scene: Scene, batch: Batch) -> None:
        """Make the results that runs are measured against, and keep their features."""
        finished, latents = self.independent_results(rows, scene, batch)
        sample_set.independent.keep(self._kinds(rows, latents, finished))

    def independent_results(self, rows: EncodedPrompts, scene: Scene, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return results of the teacher's many steps with the same conditions and other noise, and their latents."""
        latents = sample_latents(rows, self.many, rows.prompts, batch.independent, self.options.solver)
        return self.task.finished(decode_pictures(rows, latents), scene), latents

    def warm_up(self, rows: EncodedPrompts, batch: Batch) -> None:
        """Make a pass that is not timed: a first call allocates memory and loads kernels."""
        sample_latents(rows, SamplingSetting("teacher", 1), rows.prompts, batch.seeds)

    def look(self, pictures: Tensor) -> Tensor:
        """Return the features (B, D) of pictures in [0, 1]."""
        return self.network(pictures.to(self.teacher.device))[0].float().cpu()

    def _kinds(self, rows: EncodedPrompts, latents: Tensor, finished: Tensor) -> dict[str, Tensor]:
        """Return the features of results by their kind; only the network's own where no sets are compared."""
        found = {"features": self.look(finished)}
        if self.of_sets:
            states = TeacherStates(rows.denoiser, rows.unconditional)
            found |= {"states": states(latents), "random": self.random(finished)}
        return found
