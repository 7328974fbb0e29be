"""Measure zero-shot FID and CLIP score on COCO, which papers compare few-step models by (see ``protocols.py``).

An evaluation has two halves. :func:`make_pictures` writes each run's pictures, in one process or several; a picture
depends on the weights, its caption and its own seed, not on the process that makes it. ``scoring.py`` then reads the
files in one process.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....flash_core.grid import trailing_timesteps
from ...errors import UserError
from ...files import file_hash, fingerprint_texts
from ...metrics.inception import PUBLISHED
from ...pictures import picture_from_unit
from ...report.coco_page import comparability
from ...seeds import seed_of
from ..evaluator import Evaluator, Record, environment, folder_name
from ..generate import (
    PictureMaker,
    SamplingSetting,
    decode_pictures,
    default_solver,
    sample_latents,
    sampler_facts,
    share_of_fresh_noise,
)
from ..progress import progress_bar
from ..request import CocoOptions, CocoRequest, Precision
from ..teacher.captions import read_prompts
from .captions import Caption, Coco, read_coco
from .framing import WORDS, open_picture, square
from .picture_folder import PictureFolder
from .protocols import CocoProtocol
from .scoring import Networks, load_networks, measure_folder, reference_moments

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from rich.console import Console
    from rich.progress import Progress


def evaluate_on_coco(request: CocoRequest, console: Console) -> bool:
    """Make the missing pictures and measure all. Return whether this process has written the report: the first does.

    Raises:
        UserError: a network can't be loaded, or ``output`` holds pictures that were made from something else.
    """
    prompts = read_prompts(request.prompts) if request.prompts else None
    coco = read_coco(request.coco, request.protocol, request.samples, prompts)
    state = _join_processes(request.model.pick_device())
    shown = console if state.is_main_process else None
    # First the networks, which may be missing: the pictures take hours.
    networks = load_networks(request.inception, request.clip) if state.is_main_process else None
    with progress_bar(shown) as progress:
        folders, facts = _make_all(request, coco, state, progress)
        state.wait_for_everyone()
        state.destroy_process_group()
    if networks is None:
        return False
    ZeroShot(request, coco, networks, folders, facts).evaluate(shown)
    return True


def _join_processes(device: str) -> PartialState:
    """Join the other launched processes.

    Raises:
        UserError: the processes can't share the device.
    """
    from accelerate import PartialState

    # A process waits for the slowest process, which may have many pictures to make.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != state.num_processes:
        raise UserError(
            f"{launched} processes were launched, but they can't share {device} here; launch one process, or "
            "pass --device cpu"
        )
    if not state.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    return state


def _make_all(
    request: CocoRequest, coco: Coco, state: PartialState, progress: Progress
) -> tuple[list[PictureFolder], dict[str, Any]]:
    """Make every run's pictures. Return their folders and the report's facts; the model's memory is free afterwards."""
    named, options = request.model.device, request.options
    device = state.device if named in (None, state.device.type) else named  # each process has its own device
    model = request.model.load(str(device))
    maker = model.teacher
    weights = {
        "teacher": model.weights,
        "student": lora_hash(request.model.lora),
        "captions": file_hash(request.prompts or request.coco / request.protocol.annotations),
    }
    folders = [
        PictureFolder(
            run_folder(request.output, run),
            origin_of(maker, run, request.protocol, options, weights),
            state.process_index,
        )
        for run in options.runs
    ]
    state.wait_for_everyone()  # no pictures before the first process has written what they are made from
    for run, folder in zip(options.runs, folders, strict=True):
        make_pictures(maker, run, coco.captions, folder, request.protocol, options, state, progress)
    process = maker.denoiser.process
    return folders, {
        "student": model.student,
        "teacher": maker.name,
        "weights": weights,
        "resolution": list(maker.resolution),
        "timesteps": {run.label: trailing_timesteps(process, run.steps) for run in options.runs},
        "sampling": sampler_facts(maker, [run.steps for run in options.runs if run.role == "student"], None),
        "environment": {**environment(maker.device), "processes": state.num_processes},
    }


class ZeroShot(Evaluator[SamplingSetting]):
    """FID and CLIP score of finished pictures.

    Args:
        folders: the pictures of each run of the request.
        made: facts on the making of the pictures: ``student``, ``teacher``, ``weights``, ``environment``, ...
    """

    kind = "zero-shot"

    def __init__(
        self,
        request: CocoRequest,
        coco: Coco,
        networks: Networks,
        folders: Sequence[PictureFolder],
        made: Mapping[str, Any],
    ) -> None:
        super().__init__(request.output, made["student"])
        self.protocol = request.protocol
        self.options = request.options
        self.statistics = request.statistics
        self.coco = coco
        self.networks = networks
        self.folders = dict(zip(request.options.runs, folders, strict=True))
        self.made = made

    def runs(self) -> list[SamplingSetting]:
        """Return the request's runs."""
        return list(self.folders)

    def prepare(self) -> None:
        """Load or compute the moments of COCO's pictures."""
        self.networks = self.networks.to(self.made["environment"]["device"])
        self.reference = reference_moments(self.coco, self.protocol, self.networks, self.statistics, self.progress)

    def measure(self, run: SamplingSetting) -> Record:
        """Measure FID and CLIP score of a run's pictures."""
        return measure_folder(
            self.folders[run], run, self.coco.captions, self.reference, self.protocol, self.networks, self.progress
        )

    def notes(self, records: Sequence[Record]) -> list[str]:
        """Return why the scores can't be compared with published scores, if so."""
        return comparability(self._protocol(), self._networks())

    def facts(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return protocol, networks, settings, pictures, and the facts on the making."""
        shown = self.coco.captions[: self.options.pictures]
        names = [record["name"] for record in records]
        files = [self._files(folder, shown) for folder in self.folders.values()]
        return {
            "protocol": self._protocol(),
            **self.made,
            "networks": self._networks(),
            "settings": {**asdict(self.options), "runs": names},
            "pictures": {
                "prompts": [caption.text for caption in shown],
                "files": dict(zip(names, files, strict=True)),
                "coco": self._save_originals(shown),
            },
        }

    def _protocol(self) -> dict[str, Any]:
        return {
            **asdict(self.protocol),
            "captions": len(self.coco.captions),
            "references": len(self.coco.pictures),
            "rule": self.coco.rule,
            "framing": WORDS.format(size=self.protocol.size),
        }

    def _networks(self) -> dict[str, Any]:
        return {
            "inception": self.networks.inception_hash,
            "published_inception": self.networks.inception_hash.startswith(PUBLISHED),
            "clip": self.networks.clip.name if self.networks.clip is not None else None,
        }

    def _files(self, folder: PictureFolder, shown: Sequence[Caption]) -> list[str]:
        return [folder.path(caption.number).relative_to(self.output).as_posix() for caption in shown]

    def _save_originals(self, shown: Sequence[Caption]) -> list[str]:
        """Write COCO's pictures of the shown captions; there are none where the captions are not COCO's."""
        found = [(caption.number, caption.picture) for caption in shown if caption.picture is not None]
        if len(found) < len(shown):
            return []
        size = self.protocol.size
        folder = PictureFolder(self.output / "pictures" / "coco", {"size": size, "protocol": self.protocol.name})
        for number, picture in found:
            folder.save(number, square(open_picture(picture), size))
        return self._files(folder, shown)


def lora_hash(path: Path | None) -> str | None:
    """Return a hash of a LoRA's weights (file or PEFT folder) and of its configuration, which may hold its alpha."""
    if path is None:
        return None
    folder, weights = (path, sorted(path.glob("*.safetensors"))) if path.is_dir() else (path.parent, [path])
    files = [*weights, folder / "adapter_config.json"]
    return fingerprint_texts([file_hash(file) for file in files if file.is_file()])


def run_folder(output: Path, run: SamplingSetting) -> Path:
    """Return the folder of a run's pictures."""
    return output / "pictures" / folder_name(run.label)


def origin_of(
    maker: PictureMaker,
    run: SamplingSetting,
    protocol: CocoProtocol,
    options: CocoOptions,
    weights: Mapping[str, str | None],
) -> dict[str, Any]:
    """Return everything that a run's pictures depend on, but for the captions, which go by their numbers.

    Args:
        weights: hashes of ``teacher``, ``student`` and ``captions``.
    """
    share = share_of_fresh_noise(maker, run.steps) if run.role == "student" else 1
    return {
        **asdict(run),
        "solver": default_solver(maker.denoiser.process) if run.role == "teacher" else "few-step sampler",
        **({"stochasticity": share} if share != 1 else {}),  # without it, pictures of version 0.1 stay valid
        **weights,
        "student": weights["student"] if run.role == "student" else None,
        "latent_shape": list(maker.latent_shape),
        "size": protocol.size,
        "seed": options.seed,
        "precision": options.precision,
    }


def make_pictures(
    maker: PictureMaker,
    run: SamplingSetting,
    captions: Sequence[Caption],
    folder: PictureFolder,
    protocol: CocoProtocol,
    options: CocoOptions,
    state: PartialState,
    progress: Progress,
) -> None:
    """Make the pictures of a run that are not there yet.

    This process makes every ``num_processes``-th batch. Where part of a batch is missing, the whole batch is made again
    and only the missing pictures are written: so every picture comes from the same batch, and the set is the same to
    the last bit.
    """
    size = options.batch_size
    batches = [captions[begin : begin + size] for begin in range(0, len(captions), size)]
    own = batches[state.process_index :: state.num_processes]
    task = progress.add_task(run.label, total=run.nfe * sum(map(len, own)), unit="passes")
    for batch in own:
        if missing := set(folder.missing(caption.number for caption in batch)):
            start = time.perf_counter()
            seeds = [seed_of(options.seed, "zero-shot", caption.number) for caption in batch]
            with _autocast(options.precision, maker.device):
                latents = sample_latents(maker, run, [caption.text for caption in batch], seeds)
                images = decode_pictures(maker, latents)
            folder.add_time(len(batch), time.perf_counter() - start)
            for caption, image in zip(batch, images, strict=True):
                if caption.number in missing:
                    folder.save(caption.number, square(picture_from_unit(image), protocol.size))
        progress.advance(task, run.nfe * len(batch))


def _autocast(precision: Precision, device: torch.device) -> Any:
    import torch

    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
