"""A trained LoRA as ComfyUI's LORA_MODEL, and Flash Save LoRA, which keeps it in models/loras."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import folder_paths
from comfy_api.v0_0_2 import io
from torch import Tensor

from ...flash_core.lora.writing import save_whole
from ..shared.schema import node_schema, show_text
from .training.state import read_safetensors

ALLOWED = re.compile(r"[^<>:\"|?*\\\x00-\x1f]+")
SUFFIX = ".safetensors"


class FlashLora(dict[str, Tensor]):
    """A LoRA's tensors by key, as core's nodes for LORA_MODEL take them, with the header of its file.

    Attributes:
        header: the strings of the file's header: the Flash metadata.
        name: of the run that made it.
    """

    def __init__(self, tensors: dict[str, Tensor], header: dict[str, str], name: str) -> None:
        super().__init__(tensors)
        self.header = header
        self.name = name

    @classmethod
    def of_file(cls, path: Path, name: str) -> FlashLora:
        """Read a LoRA file that a run wrote."""
        return cls(*read_safetensors(path), name)


def lora_path(name: str) -> PurePosixPath:
    """Return the path of a LoRA's file below ComfyUI's first folder of LoRAs, without ending.

    Raises:
        ValueError: the name is empty or leads out of the folder.
        OSError: the file cannot be written.
    """
    root = Path(folder_paths.get_folder_paths("loras")[0])
    relative = PurePosixPath(name.strip().replace("\\", "/").removesuffix(SUFFIX))
    parts = relative.parts
    if not parts or relative.is_absolute() or not all(ALLOWED.fullmatch(part) and part != ".." for part in parts):
        raise ValueError(
            f'The name is {name!r}; expected a file name without <>:"|?* that stays in models/loras, such as '
            "my_flash or mine/my_flash. Correct the name."
        )
    if not (root / relative.parent).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"The name {name!r} leads out of {root} through a link. Choose another folder.")
    return relative


def save_to_loras(lora: FlashLora, name: str) -> str:
    """Write a LoRA into ComfyUI's first folder of LoRAs; a file of that name gets a neighbour with a number.

    Args:
        name: without ending; may have sub-folders ("mine/fast").

    Returns:
        The file's name as loaders list it.

    Raises:
        ValueError: the name is empty or leads out of the folder.
    """
    root, relative = Path(folder_paths.get_folder_paths("loras")[0]), lora_path(name)
    target = root / relative.parent
    path, number = target / f"{relative.name}{SUFFIX}", 0
    while path.exists():
        number += 1
        path = target / f"{relative.name}_{number:05}_{SUFFIX}"  # the spelling of core's Save nodes
    try:
        save_whole({key: value.clone() for key, value in lora.items()}, path, lora.header)
    except OSError as error:
        raise OSError(
            f"The LoRA cannot be saved as {path}: {error.strerror or error}. Make the folder writable, free some disk "
            "space, or choose another name. Then queue again: the distillation is kept and is not repeated."
        ) from error
    folder_paths.filename_list_cache.pop("loras", None)
    return path.relative_to(root).as_posix()


class FlashSaveLora(io.ComfyNode):
    """Save a LoRA of Flash Distill."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="training",
            node_id="FlashSaveLora",
            display_name="Flash Save LoRA",
            search_aliases=["save lora", "export lora", "safetensors", "flash diffusion"],
            description="Save a LoRA of Flash Distill in models/loras, for Flash LoRA Loader, ComfyUI's own loaders "
            "and diffusers.",
            inputs=[
                io.LoraModel.Input("lora", tooltip="The LoRA of Flash Distill."),
                io.String.Input(
                    "name",
                    default="my_flash",
                    tooltip="File name in models/loras, with sub-folders if you like: mine/my_flash. A file of that "
                    "name is never replaced: the new one gets a number.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The file's name as the loaders list it.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora: Mapping[str, Tensor], name: str) -> io.NodeOutput:
        """Write the file with the LoRA's metadata."""
        if not isinstance(lora, FlashLora):
            raise ValueError(
                "This LoRA is not of Flash Distill, so it has no Flash metadata. Connect Flash Distill's 'lora', or "
                "save this one with ComfyUI's Save LoRA Weights."
            )
        saved = save_to_loras(lora, name)
        show_text(cls, f"saved as {saved}\nPress R to see it in the loaders' lists.")
        return io.NodeOutput(saved)
