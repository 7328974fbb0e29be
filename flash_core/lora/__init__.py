"""LoRA files: read any dialect at its true scale, say what was found, and write files that load everywhere."""

from .files import LoraError, read_lora, write_lora
from .matching import MatchReport, describe_base, match
from .metadata import FlashMetadata
from .weights import LoraFile, LoraModule, flat_name

__all__ = [
    "FlashMetadata",
    "LoraError",
    "LoraFile",
    "LoraModule",
    "MatchReport",
    "describe_base",
    "flat_name",
    "match",
    "read_lora",
    "write_lora",
]
