"""The report on a LoRA file and on how it fits a model, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..families import name_of
from .matching import MatchReport, base_of, describe_base
from .metadata import FlashMetadata
from .weights import AlphaSource, Difference, LoraFile

ALPHA_SOURCES: dict[AlphaSource, str] = {
    "file": "from the file",
    "header": "from the file's header",
    "adapter_config": "from adapter_config.json beside the file",
    "published": "known for this published file",
    "unknown": "unknown",
}


@dataclass(frozen=True)
class LeftOut:
    """Layers or keys of a file that are not applied to the model.

    Attributes:
        count: the number of layers or keys.
        what: the kind, and the reason.
        example: one layer or key.
        harmless: True if the denoiser does not need them.
    """

    count: int
    what: str
    example: str
    harmless: bool

    def words(self) -> str:
        """Return a line for the user."""
        return f"{self.what}: {self.count}, e.g. {self.example}"


@dataclass(frozen=True)
class LoraReport:
    """The facts of a LoRA file, and how it fits a model if a model is given.

    Attributes:
        base: the key of the family; None if it is not certain.
        made_for: the family in words.
        dialect: the spelling of the keys.
        ranks, alphas, scales: the distinct values, ascending; no alphas if they are unknown.
        alpha_source: the source of alpha.
        layers: the number of the denoiser's layers.
        matched: the number of layers that the model has; None without a model.
        left_out: the layers and keys that are not applied to the model.
        notes: changes to the layers, and hints for the user.
        metadata: of a Flash LoRA; None for other files.
        published: the Hub name of a recognised published file, or None.
        sampling: lines on how a sampler samples a file without metadata; None for the usual line.
    """

    base: str | None
    made_for: str
    dialect: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    alpha_source: AlphaSource
    scales: tuple[float, ...]
    layers: int
    matched: int | None
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    metadata: FlashMetadata | None
    published: str | None
    sampling: tuple[str, ...] | None = None

    @property
    def complete(self) -> bool:
        """Return whether all of the denoiser's layers in the file are applied."""
        return all(item.harmless for item in self.left_out)

    def as_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        metadata = self.metadata
        return {
            "base": self.base,
            "made_for": self.made_for,
            "dialect": self.dialect,
            "ranks": list(self.ranks),
            "alphas": list(self.alphas),
            "alpha_source": self.alpha_source,
            "scales": list(self.scales),
            "layers": self.layers,
            "matched": self.matched,
            "left_out": [
                {"count": item.count, "what": item.what, "example": item.example, "harmless": item.harmless}
                for item in self.left_out
            ],
            "notes": list(self.notes),
            "published": self.published,
            "flash": None
            if metadata is None
            else {
                "base": metadata.base,
                "task": metadata.task,
                "prediction": metadata.prediction,
                "process": metadata.process,
                "timesteps": {str(steps): list(grid) for steps, grid in metadata.timesteps.items()},
                "steps": metadata.steps,
                "guidance": metadata.guidance,
                "stochasticity": {str(steps): share for steps, share in metadata.stochasticity.items()},
                "title": metadata.title,
                "teacher": metadata.teacher,
                "license": metadata.license,
                "training": dict(metadata.training),
            },
        }

    def text(self) -> str:
        """Return the report as lines for the user."""
        lines = [f"made for: {self.made_for}", self._scale()]
        layers = f"{self.layers} layers" if self.matched is None else f"matched: {self.matched}/{self.layers} layers"
        lines.append(f"{layers}   dialect: {self.dialect}")
        lines += [f"left out: {item.words()}" for item in self.left_out]
        lines += [f"note: {note}" for note in self.notes]
        metadata = self.metadata
        if metadata is None:
            usual = ("no Flash metadata: the sampler uses trailing timesteps",)
            lines += usual if self.sampling is None else self.sampling
        else:
            steps = ", ".join(str(count) for count in sorted(metadata.timesteps))
            lines.append(
                f"trained for: {steps} steps (best: {metadata.steps}), guidance {metadata.guidance:g}, {metadata.task}"
            )
            if metadata.stochasticity:
                lines.append(f"stochasticity: {_shares(metadata.stochasticity)}; Flash Sampler's 'auto' takes these")
            if metadata.license:
                lines.append(f"license: {metadata.license}")
        return "\n".join(lines)

    def rows(self, strength: float) -> list[tuple[str, str]]:
        """Return the facts that fit on a node, as label and value.

        Args:
            strength: the user's factor on the LoRA.
        """
        scale = "1 (alpha is unknown)" if self.alpha_source == "unknown" else _numbers(self.scales)
        times = "" if strength == 1 else f", strength {strength:g}"
        matched = "" if self.matched is None else f"{self.matched} of "
        rows = [
            ("made for", self.made_for if self.base is None else name_of(self.base)),
            ("LoRA", f"rank {_numbers(self.ranks)}, scale {scale}{times}"),
            ("layers", f"{matched}{self.layers}"),
        ]
        rows += [("left out", f"{item.count} {item.what}") for item in self.left_out]
        if self.metadata is not None:
            counts = sorted(self.metadata.timesteps)
            steps = f"{counts[0]} to {counts[-1]}" if len(counts) > 2 else ", ".join(str(count) for count in counts)
            rows.append(("steps", f"{steps}, best {self.metadata.steps}"))
        return rows

    def _scale(self) -> str:
        ranks = _numbers(self.ranks)
        if self.alpha_source == "unknown":
            return (
                f"rank: {ranks}   alpha: unknown (scale 1 is used; if the effect is too strong, lower the strength to "
                "alpha / rank)"
            )
        return (
            f"rank: {ranks}   alpha: {_numbers(self.alphas)} ({ALPHA_SOURCES[self.alpha_source]})   "
            f"scale: {_numbers(self.scales)}"
        )


def report_on(
    file: LoraFile,
    met: MatchReport | None = None,
    notes: tuple[str, ...] = (),
    unfit: Sequence[Difference] = (),
) -> LoraReport:
    """Return the report on a file, and on how it fits a model.

    Args:
        met: the comparison with the model. Default: no model.
        notes: more hints for the user. Default: none.
        unfit: the file's differences that do not fit the model. Default: none.
    """
    left_out = []
    if met is not None:
        kinds = ((met.missing, "that the model lacks"), (met.mismatched, "that have another shape in the model"))
        for names, why in kinds:
            if names:
                left_out.append(LeftOut(len(names), f"layers {why}", names[0], harmless=False))
    if unfit:
        what = "changes of whole weights or biases that do not fit the model"
        left_out.append(LeftOut(len(unfit), what, unfit[0].key, harmless=False))
    whole = {one.key for one in (*file.differences, *file.text_encoder_differences)}
    unknown = [key for key in file.unknown if key not in whole]
    if unknown:
        left_out.append(LeftOut(len(unknown), "keys that are not plain LoRA on a layer", unknown[0], harmless=False))
    if file.text_encoder:
        what = "text encoder layers (Flash LoRAs change the denoiser only)"
        left_out.append(LeftOut(len(file.text_encoder), what, next(iter(file.text_encoder)), harmless=True))
    if file.text_encoder_differences:
        what, example = "changes of text encoders' whole weights or biases", file.text_encoder_differences[0].key
        left_out.append(LeftOut(len(file.text_encoder_differences), what, example, harmless=True))
    if file.embeddings:
        left_out.append(LeftOut(len(file.embeddings), "packed embeddings", file.embeddings[0], harmless=True))
    return LoraReport(
        base=base_of(file),
        made_for=describe_base(file),
        dialect=file.dialect,
        ranks=file.ranks,
        alphas=file.alphas,
        alpha_source=file.alpha_source,
        scales=file.scales,
        layers=len(file.modules),
        matched=None if met is None else len(met.matched),
        left_out=tuple(left_out),
        notes=(*file.notes, *_whole_changes(file, unfit), *notes),
        metadata=file.metadata,
        published=file.published,
    )


def _whole_changes(file: LoraFile, unfit: Sequence[Difference]) -> tuple[str, ...]:
    """Return a note on the changes of whole weights and biases that ComfyUI's nodes add, if there are any."""
    missing = {one.key for one in unfit}
    parts = [one.part for one in file.differences if one.key not in missing]
    if not parts:
        return ()
    return (f"it also changes whole weights ({parts.count('weight')}) and biases ({parts.count('bias')})",)


def _shares(stochasticity: Mapping[int, float]) -> str:
    """Return ``0.5 at 2 to 8 steps``, or each step count with its own value; one step has no noise to add."""
    shares = {steps: share for steps, share in sorted(stochasticity.items()) if steps > 1} or stochasticity
    if len(set(shares.values())) == 1 and len(shares) > 2:
        return f"{next(iter(shares.values())):g} at {min(shares)} to {max(shares)} steps"
    return ", ".join(f"{share:g} at {steps} step{'s' * (steps > 1)}" for steps, share in shares.items())


def _numbers(values: tuple[float, ...]) -> str:
    """Return up to six values; files with a rank for each layer have dozens."""
    if len(values) > 6:
        return f"{values[0]:g} to {values[-1]:g} ({len(values)} different)"
    return ", ".join(f"{value:g}" for value in values)
