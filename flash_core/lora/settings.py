"""PEFT's settings of an adapter, which give its scale: alpha, rank-stabilised scaling, patterns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .container import LoraError
from .weights import flat_name

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
HEADER_FIELD = "lora_adapter_metadata"  # in which diffusers >= 0.34 keeps the settings of the files that it writes
MAX_CONFIG_BYTES = 1 << 20
DEFAULT_ALPHA = 8.0  # PEFT's own, where the settings name none

_COMPONENT = re.compile(r"^(unet|transformer|text_encoder(_[23])?)\.")
_PLAIN_PATTERN = re.compile(r"^\^?[\w.]+\$?$")


@dataclass(frozen=True)
class AdapterSettings:
    """The scale settings of one adapter.

    Attributes:
        alpha: ``lora_alpha``.
        rslora: the update is scaled by ``alpha / sqrt(r)`` instead of ``alpha / r`` (arXiv 2312.03732).
        alpha_pattern: {end of a layer's path: alpha} of layers with another alpha.
    """

    alpha: float
    rslora: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def effective_alpha(self, path: str, rank: int) -> float:
        """Return the alpha for which ``alpha / rank`` is the scale of the layer."""
        matching = (value for end, value in self.alpha_pattern.items() if path == end or path.endswith(f".{end}"))
        alpha = next(matching, self.alpha)
        return alpha * math.sqrt(rank) if self.rslora else alpha


@dataclass(frozen=True)
class FileSettings:
    """The settings of a file, by component of the pipeline.

    Attributes:
        source: where the settings were found.
        components: by component; ``""`` for the denoiser.
        ranks, targets: the ranks and the ends of layers' names in ``adapter_config.json``; empty if the file has
            none.
    """

    source: Literal["header", "adapter_config"]
    components: Mapping[str, AdapterSettings]
    ranks: frozenset[int] = frozenset()
    targets: tuple[str, ...] = ()

    def belong_to(self, ranks: Mapping[str, int]) -> bool:
        """Return whether these settings fit a file with these ranks, by flat name of the layers.

        A folder of LoRAs may hold one adapter's ``adapter_config.json`` beside others' files.
        """
        if self.ranks and not self.ranks.issuperset(ranks.values()):
            return False
        ends = tuple(flat_name(target) for target in self.targets)
        inner = tuple(f"_{end}" for end in ends)
        return not ends or all(name in ends or name.endswith(inner) for name in ranks)

    def of(self, path: str) -> AdapterSettings | None:
        """Return the settings of the layer with that path; the path of a text encoder's layer begins with its name."""
        component = path.split(".")[0] if path.startswith("text_encoder") else ""
        return self.components.get(component)


def find_settings(path: Path, header: Mapping[str, str]) -> FileSettings | None:
    """Return the settings in a file's header, else in the ``adapter_config.json`` beside the file, else None.

    Raises:
        LoraError: the settings can't be read, or are of another algorithm than LoRA.
    """
    if HEADER_FIELD in header:
        where = f"the header of {path.name}"
        written = _json_object(header[HEADER_FIELD], where)
        components: dict[str, dict[str, Any]] = {}
        for name, value in written.items():
            prefix = _COMPONENT.match(name)
            component = prefix.group(1) if prefix else ""
            key = name[prefix.end() :] if prefix else name
            components.setdefault("" if component in ("unet", "transformer") else component, {})[key] = value
        return FileSettings("header", {name: _settings(value, where) for name, value in components.items()})
    beside = path.with_name(PEFT_CONFIG)
    if not beside.is_file():
        return None
    if beside.stat().st_size > MAX_CONFIG_BYTES:
        raise LoraError(
            f"{beside.name} beside {path.name} has more than {MAX_CONFIG_BYTES:,} bytes; the settings of a LoRA are "
            "smaller. Remove it"
        )
    try:
        text = beside.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraError(f"{beside.name} beside {path.name} can't be read: {error}") from error
    written = _json_object(text, beside.name)
    settings = _settings(written, beside.name)
    patterns = written.get("rank_pattern")
    ranks = [written.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    told = isinstance(written.get("r"), int)
    targets = written.get("target_modules")
    return FileSettings(
        "adapter_config",
        {"": settings},
        frozenset(rank for rank in ranks if isinstance(rank, int)) if told else frozenset(),
        # A string is a regular expression or "all-linear".
        tuple(str(target) for target in targets) if isinstance(targets, list) else (),
    )


def _json_object(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{where} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise LoraError(f"{where} should hold a JSON object, but holds {type(value).__name__}")
    return value


def _settings(written: Mapping[str, Any], where: str) -> AdapterSettings:
    algorithm = str(written.get("peft_type", "LORA")).rsplit(".", 1)[-1]
    if algorithm.upper() != "LORA" or written.get("use_dora"):
        name = "DoRA" if written.get("use_dora") else algorithm
        raise LoraError(f"{where} names the algorithm {name}; only plain LoRA can be read")
    patterns = written.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise LoraError(f"{where}: alpha_pattern should be a table of layers and alphas, but is {patterns!r:.60}")
    exceptions = {}
    for end, value in patterns.items():
        # PEFT reads these as regular expressions. Every tool writes plain names; a wrong guess would be a wrong scale.
        if not _PLAIN_PATTERN.match(end):
            raise LoraError(
                f"{where}: alpha_pattern {end[:60]!r} is a regular expression; only names of layers can be read"
            )
        exceptions[end.strip("^$")] = _number(value, f"{where}: alpha_pattern of {end[:60]!r}")
    alpha = _number(written.get("lora_alpha", DEFAULT_ALPHA), f"{where}: lora_alpha")
    return AdapterSettings(alpha, bool(written.get("use_rslora")), exceptions)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LoraError(f"{what} should be a finite number, but is {value!r:.40}")
    return float(value)
