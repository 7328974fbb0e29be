"""The packages that the trainer needs beside ComfyUI's, and ``flash-diffusion needs``, which says what is missing."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from .errors import UserError

# What the code imports -> what pip installs: the extra [trainer] of pyproject.toml, which a test compares.
NEEDS = {
    "torch": "torch>=2.4",
    "numpy": "numpy>=1.26",
    "braceexpand": "braceexpand>=0.1.7",
    "diffusers": "diffusers>=0.35,<1",
    "fsspec": "fsspec>=2024.2",
    "transformers": "transformers>=4.50.3,<6",
    "peft": "peft>=0.17,<1",
    "accelerate": "accelerate>=1.2,<2",
    "filelock": "filelock>=3.12,<5",
    "huggingface_hub": "huggingface-hub>=0.34,<3",
    "jinja2": "jinja2>=3.1",
    "kornia": "kornia>=0.7.1",
    "PIL": "pillow>=10.1",
    "google.protobuf": "protobuf>=4.21.1",
    "pydantic": "pydantic>=2.7,<3",
    "yaml": "pyyaml>=6",
    "rich": "rich>=13.7",
    "safetensors": "safetensors>=0.4.3",
    "sentencepiece": "sentencepiece>=0.2",
    "tensorboard": "tensorboard>=2.16.2",
    "torchmetrics": "torchmetrics>=1.7,<2",
    "webdataset": "webdataset>=0.2.100,<2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Explain the command, which has no option."""
    parser.epilog = (
        f"Looks into the Python that runs it ({sys.executable}). Prints pip's command for packages that are missing or "
        "of another version, and ends with code 2."
    )


def run(args: argparse.Namespace) -> int:
    """Say that nothing is missing.

    Raises:
        UserError: packages are missing or have another version; the message has pip's command.
    """
    if sentence := missing_packages():
        raise UserError(sentence)
    sys.stdout.write(f"{sys.executable} has all packages of the trainer\n")
    return 0


def missing_packages() -> str:
    """Return a sentence with the packages that are missing or of another version, and pip's command; else ""."""
    lacking = [requirement for module, requirement in NEEDS.items() if not _found(module)]
    other = [requirement for requirement in NEEDS.values() if requirement not in lacking and _is_other(requirement)]
    if not lacking + other:
        return ""
    parts = [f"lacks {', '.join(lacking)}"] if lacking else []
    parts += [f"has another version of {', '.join(other)}"] if other else []
    quoted = " ".join(f'"{requirement}"' for requirement in lacking + other)
    return (
        f"The trainer needs more packages than ComfyUI: {sys.executable} {' and '.join(parts)}. Install them with\n"
        f'    "{sys.executable}" -m pip install {quoted}'
    )


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _is_other(requirement: str) -> bool:
    """Return whether a package is installed with a version that the trainer was not made for."""
    if not _found("packaging"):  # comes with transformers and accelerate: where it is missing, they are too
        return False
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        return not wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:  # without a record of its version
        return False
