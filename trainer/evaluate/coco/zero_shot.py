"""Zero-shot FID and CLIP score on COCO: what few-step models are compared by in print (see ``protocols.py``).

In two halves. :func:`make_pictures` writes each run's pictures, in one process or several; a picture depends on the
weights, its caption and its own seed, not on who makes it. ``scoring.py`` reads the files in one process, whoever made
them and whenever.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ....flash_core.grid import trailing_timesteps
from ...errors import UserError
from ...files import file_hash, fingerprint_texts
from ...metrics.inception import PUBLISHED
from ...seeds import seed_of
from ..generate import PictureMaker, SamplingSetting, decode_pictures, default_solver, sample_latents
from ..measure import environment, progress_bar
from .captions import Caption, Coco
from .framing import WORDS, open_picture, square
from .picture_folder import PictureFolder
from .protocols import CocoProtocol
from .scoring import load_networks, measure, reference_moments

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from PIL import Image
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from ...teachers.base import Teacher

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class Settings:
    """What a zero-shot evaluation makes.

    Attributes:
        runs: who, in how many steps, with how much guidance.
        seed: of the noise; each picture's own seed follows from it and the caption's number.
        batch_size: pictures made at once; changes no picture beyond rounding.
        precision: of the forward passes (autocast).
        pictures: how many captions the report shows.
    """

    runs: tuple[SamplingSetting, ...]
    seed: int = 0
    batch_size: int = 8
    precision: Precision = "no"
    pictures: int = 8


@dataclass(frozen=True)
class Sources:
    """Where everything comes from.

    Attributes:
        generator: loads the model; gives it, a hash of the teacher's weights, and what the student is called, if any.
        lora: the student's file or folder, or None.
        captions: the file that the captions are from.
        inception: FID's weights; None is the published file.
        clip: a CLIP's folder or Hub name; None leaves CLIP out.
        statistics: the file with the moments of COCO's pictures, made where it is missing.
    """

    generator: Callable[[], tuple[Teacher, str, str | None]]
    lora: Path | None
    captions: Path
    inception: Path | None
    clip: str | None
    statistics: Path


def zero_shot(
    coco: Coco,
    protocol: CocoProtocol,
    settings: Settings,
    sources: Sources,
    output: Path,
    state: PartialState,
    console: Console | None = None,
) -> bool:
    """Make what pictures are missing, measure all, and write ``report.json`` into ``output``.

    Returns:
        Whether this process has written the report: the first one does.

    Raises:
        UserError: a network can't be had, or ``output`` holds pictures of something else.
    """
    # First what may be missing: the pictures take hours.
    networks = load_networks(sources.inception, sources.clip) if state.is_main_process else None
    with progress_bar(console) as progress:
        galleries, facts = _all_pictures(coco, protocol, settings, sources, output, state, progress)
        state.wait_for_everyone()
        state.destroy_process_group()
        if networks is None:
            return False
        networks = networks.to(facts["environment"]["device"])
        reference = reference_moments(coco, protocol, networks, sources.statistics, progress)
        records = [
            measure(gallery, run, coco.captions, reference, protocol, networks, progress)
            for run, gallery in zip(settings.runs, galleries, strict=True)
        ]
    facts["networks"] = {
        "inception": networks.inception_hash,
        "published_inception": networks.inception_hash.startswith(PUBLISHED),
        "clip": networks.clip.name if networks.clip is not None else None,
    }
    write_zero_shot(output, coco, protocol, settings, records, galleries, facts)
    return True


def _all_pictures(
    coco: Coco,
    protocol: CocoProtocol,
    settings: Settings,
    sources: Sources,
    output: Path,
    state: PartialState,
    progress: Progress,
) -> tuple[list[PictureFolder], dict[str, Any]]:
    """Every run's pictures, and the report's facts on the model, whose memory is free again afterwards."""
    generator, teacher, student = sources.generator()
    weights = {
        "teacher": teacher,
        "student": lora_hash(sources.lora),
        "captions": file_hash(sources.captions),
    }
    galleries = [
        PictureFolder(
            run_folder(output, run), origin_of(generator, run, protocol, settings, weights), state.process_index
        )
        for run in settings.runs
    ]
    state.wait_for_everyone()  # nobody writes pictures before the first process has said what they are
    for run, gallery in zip(settings.runs, galleries, strict=True):
        make_pictures(generator, run, coco.captions, gallery, protocol, settings, state, progress)
    process = generator.denoiser.process
    return galleries, {
        "student": student,
        "teacher": generator.name,
        "weights": weights,
        "resolution": list(generator.resolution),
        "timesteps": {run.label: trailing_timesteps(process, run.steps) for run in settings.runs},
        "environment": {**environment(generator.device), "processes": state.num_processes},
    }


def lora_hash(path: Path | None) -> str | None:
    """Of a LoRA's weights, a file or a PEFT folder, and of the configuration beside them, which may hold its alpha."""
    if path is None:
        return None
    folder, weights = (path, sorted(path.glob("*.safetensors"))) if path.is_dir() else (path.parent, [path])
    files = [*weights, folder / "adapter_config.json"]
    return fingerprint_texts([file_hash(file) for file in files if file.is_file()])


def run_folder(output: Path, run: SamplingSetting) -> Path:
    """Where a run's pictures are."""
    return output / "pictures" / run.label.replace(",", "").replace(" ", "-")


def origin_of(
    generator: PictureMaker,
    run: SamplingSetting,
    protocol: CocoProtocol,
    settings: Settings,
    weights: Mapping[str, str | None],
) -> dict[str, Any]:
    """Everything that decides what a run's pictures look like, but for the captions, which go by their numbers.

    Args:
        weights: hashes of what draws: ``teacher``, ``student`` and ``captions``.
    """
    return {
        **asdict(run),
        "solver": default_solver(generator.denoiser.process) if run.role == "teacher" else "few-step sampler",
        **weights,
        "student": weights["student"] if run.role == "student" else None,
        "latent_shape": list(generator.latent_shape),
        "size": protocol.size,
        "seed": settings.seed,
        "precision": settings.precision,
    }


def make_pictures(
    generator: PictureMaker,
    run: SamplingSetting,
    captions: Sequence[Caption],
    gallery: PictureFolder,
    protocol: CocoProtocol,
    settings: Settings,
    state: PartialState,
    progress: Progress,
) -> None:
    """Make those of a run's pictures that are not there yet.

    Every ``num_processes``-th batch is this process'. A batch that is partly there is made again whole and only what
    was missing is written: so every picture comes from the same batch, and the set is the same to the last bit.
    """
    size = settings.batch_size
    batches = [captions[begin : begin + size] for begin in range(0, len(captions), size)]
    own = batches[state.process_index :: state.num_processes]
    task = progress.add_task(run.label, total=run.nfe * sum(map(len, own)), unit="passes")
    for batch in own:
        if missing := set(gallery.missing(caption.number for caption in batch)):
            start = time.perf_counter()
            seeds = [seed_of(settings.seed, "zero-shot", caption.number) for caption in batch]
            with _autocast(settings.precision, generator.device):
                latents = sample_latents(generator, run, [caption.text for caption in batch], seeds)
                images = decode_pictures(generator, latents)
            gallery.add_time(len(batch), time.perf_counter() - start)
            for caption, image in zip(batch, images, strict=True):
                if caption.number in missing:
                    gallery.save(caption.number, square(_to_picture(image), protocol.size))
        progress.advance(task, run.nfe * len(batch))


def _autocast(precision: Precision, device: torch.device) -> Any:
    import torch

    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def _to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to 8 bits.

    Raises:
        UserError: it is not finite.
    """
    from PIL import Image

    if not bool(image.isfinite().all()):
        raise UserError(
            "the model made NaN instead of a picture; fp16 overflows in some models: use --precision bf16 or no"
        )
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def write_zero_shot(
    output: Path,
    coco: Coco,
    protocol: CocoProtocol,
    settings: Settings,
    runs: Sequence[dict[str, Any]],
    galleries: Sequence[PictureFolder],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``report.json``, and COCO's pictures of the shown captions, into ``output``; returns the report.

    Args:
        facts: what else the report says: ``student``, ``teacher``, ``networks``, ``environment``.
    """
    shown = coco.captions[: settings.pictures]

    def files(gallery: PictureFolder) -> list[str]:
        return [gallery.path(caption.number).relative_to(output).as_posix() for caption in shown]

    originals: list[str] = []
    if all(caption.picture for caption in shown):
        gallery = PictureFolder(output / "pictures" / "coco", {"size": protocol.size, "protocol": protocol.name})
        for caption in shown:
            gallery.save(caption.number, square(open_picture(caption.picture), protocol.size))
        originals = files(gallery)
    report = {
        "kind": "zero-shot",
        "protocol": {
            **asdict(protocol),
            "captions": len(coco.captions),
            "references": len(coco.pictures),
            "rule": coco.rule,
            "framing": WORDS.format(size=protocol.size),
        },
        **facts,
        "runs": list(runs),
        "settings": {**asdict(settings), "runs": [run["name"] for run in runs]},
        "pictures": {
            "prompts": [caption.text for caption in shown],
            "files": {run["name"]: files(gallery) for run, gallery in zip(runs, galleries, strict=True)},
            "coco": originals,
        },
    }
    (output / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return report
