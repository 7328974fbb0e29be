"""LoRA files: read any dialect at its true scale, say what was found, and write files that load everywhere."""

from .algebra import Truncation, merge, resize
from .container import LoraError
from .files import read_lora
from .header import change_header
from .matching import MatchReport, base_of, describe_base, match
from .metadata import FlashMetadata, nearest_stochasticity, stochasticity_string
from .names import is_transformer, with_diffusers_names
from .published import PUBLISHED, PublishedLora
from .report import LeftOut, LoraReport, report_on
from .settings import PEFT_WEIGHTS
from .weights import Difference, LoraFile, LoraModule, flat_name
from .writing import DIALECTS, Dialect, write_lora

__all__ = [
    "DIALECTS",
    "PEFT_WEIGHTS",
    "PUBLISHED",
    "Dialect",
    "Difference",
    "FlashMetadata",
    "LeftOut",
    "LoraError",
    "LoraFile",
    "LoraModule",
    "LoraReport",
    "MatchReport",
    "PublishedLora",
    "Truncation",
    "base_of",
    "change_header",
    "describe_base",
    "flat_name",
    "is_transformer",
    "match",
    "merge",
    "nearest_stochasticity",
    "read_lora",
    "report_on",
    "resize",
    "stochasticity_string",
    "with_diffusers_names",
    "write_lora",
]
