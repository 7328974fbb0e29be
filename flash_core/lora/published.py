"""The published Flash LoRAs: recognised by their layers, and loaded at the scale of their training.

The published files have no metadata. Two are PEFT adapters: their alpha is in a JSON file that users often lose. One
names modules that only its training code has. The facts below come from the authors' public training scripts and Hub
pages. The number of values times four bytes is the size of the published file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..grid import MAX_FEW_STEPS, trailing_timesteps
from ..process import FlowProcess, VPProcess
from .metadata import FlashMetadata
from .weights import LoraModule, flat_name


@dataclass(frozen=True)
class PublishedLora:
    """One published file.

    Attributes:
        name: the Hub name.
        base: the key of the family.
        teacher: the Hub name of the base model.
        rank, alpha: of every layer.
        layers: the number of adapted layers.
        values: the number of values of all halves.
        license: as the Hub page states.
        flow_shift: the shift of a flow model's schedule; None for a variance-preserving model.
    """

    name: str
    base: str
    teacher: str
    rank: int
    alpha: float
    layers: int
    values: int
    license: str
    flow_shift: float | None = None

    def metadata(self) -> FlashMetadata:
        """Return the metadata that the file lacks."""
        process = VPProcess.from_betas() if self.flow_shift is None else FlowProcess(self.flow_shift)
        return FlashMetadata(
            base=self.base,
            prediction="epsilon" if self.flow_shift is None else "flow",
            process="vp" if self.flow_shift is None else "flow",
            # The modes of the training distribution are trailing (arXiv 2406.02347, section 4.1), the published
            # pipelines take 4 steps without guidance (diffusers' guidance_scale 0, here 1).
            timesteps={steps: tuple(trailing_timesteps(process, steps)) for steps in range(1, MAX_FEW_STEPS + 1)},
            steps=4,
            guidance=1.0,
            title=self.name,
            teacher=self.teacher,
            license=self.license,
        )


# Sources: github.com/gojasper/flash-diffusion, examples/train_flash_*.py (ranks, alphas, target layers); the file
# lists of huggingface.co/jasperai/flash-*; adapter_config.json of flash-sd3 (r 64, lora_alpha 8).
PUBLISHED: tuple[PublishedLora, ...] = (
    # to_q, to_k, to_v, to_out.0 of 16 blocks' attn1 and attn2; r = alpha in the script. 102 MB.
    PublishedLora(
        "jasperai/flash-sd", "sd15", "runwayml/stable-diffusion-v1-5", 128, 128.0, 128, 25_509_888, "cc-by-nc-4.0"
    ),
    # The same four of 70 blocks; r = alpha. 372 MB; comfy/FlashSDXL.safetensors is the same under kohya's names.
    PublishedLora(
        "jasperai/flash-sdxl",
        "sdxl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        64,
        64.0,
        560,
        92_897_280,
        "cc-by-nc-nd-4.0",
    ),
    # Attention, feed-forward, patch, caption, time and size embedders, adaLN, output; PEFT's default alpha. 221 MB.
    PublishedLora(
        "jasperai/flash-pixart", "pixart", "PixArt-alpha/PixArt-XL-2-1024-MS", 64, 8.0, 293, 55_331_840, "cc-by-nc-4.0"
    ),
    # The image stream's attention, the feed-forwards, every adaLN, embedders and output; no add_*_proj. 351 MB.
    PublishedLora(
        "jasperai/flash-sd3",
        "sd3",
        "stabilityai/stable-diffusion-3-medium",
        64,
        8.0,
        222,
        87_646_208,
        "cc-by-nc-4.0",
        flow_shift=3.0,
    ),
)

# Headers of other tools: the published files have no such headers.
_FOREIGN_HEADER = re.compile(r"^(ss_|modelspec\.|flash\.)")


def recognise(modules: Mapping[str, LoraModule], header: Mapping[str, str]) -> PublishedLora | None:
    """Return the published file with these ranks, this number of layers and this number of values, or None.

    Args:
        modules: the denoiser's layers as the file names them.
        header: the file's header strings.
    """
    if any(_FOREIGN_HEADER.match(name) for name in header):
        return None
    ranks = {module.rank for module in modules.values()}
    found = (len(modules), sum(module.values for module in modules.values()))
    return next((lora for lora in PUBLISHED if ranks == {lora.rank} and found == (lora.layers, lora.values)), None)


# Flash PixArt was trained on a network that embeds height, width and aspect ratio with a module each.
_TIME = "adaln_single.timestep_embedder"
_SIZES = ("adaln_single.add_embedding.0", "adaln_single.add_embedding.1")
_ASPECT = "adaln_single.add_embedding.2"
_STOCK = "adaln_single.emb"


def with_stock_names(modules: Mapping[str, LoraModule]) -> tuple[dict[str, LoraModule], tuple[str, ...]]:
    """Rename the layers of the published PixArt training code to the names of stock PixArt models.

    Stock models embed height and width with one module, the training code with two. Their updates are applied as the
    mean: ``u0 d0 / 2 + u1 d1 / 2`` is a LoRA of twice the rank, and the nearest single update to both.

    Returns:
        All layers by flat name, and notes for the user; no notes for other files.
    """
    if not any(name.startswith("adaln_single_") for name in modules):
        return dict(modules), ()
    renamed: dict[str, LoraModule] = {}
    notes: list[str] = []
    halves: dict[str, list[LoraModule]] = {}
    for name, module in modules.items():
        stock = _stock_path(module.path)
        if stock is None:
            renamed[name] = module
        elif stock.startswith(f"{_STOCK}.resolution_embedder"):
            halves.setdefault(stock, []).append(module)
        else:
            renamed[flat_name(stock)] = replace(module, path=stock)
    for stock, pair in halves.items():
        renamed[flat_name(stock)] = _mean(stock, pair)
        notes.append(
            f"{' and '.join(module.path for module in pair)} share {stock} in stock models: their mean is used"
        )
    if len(renamed) < len(modules) or any(name not in modules for name in renamed):
        notes.insert(0, "the size and time embedders have the names of Flash PixArt's training code")
    return renamed, tuple(notes)


def _stock_path(path: str) -> str | None:
    for own, stock in (
        (_TIME, "timestep_embedder"),
        (_ASPECT, "aspect_ratio_embedder"),
        (_SIZES[0], "resolution_embedder"),
        (_SIZES[1], "resolution_embedder"),
    ):
        for spelling in (own, flat_name(own)):
            if path.startswith((f"{spelling}.", f"{spelling}_")):
                return f"{_STOCK}.{stock}.{path[len(spelling) + 1 :]}"
    return None


def _mean(path: str, modules: list[LoraModule]) -> LoraModule:
    if len(modules) == 1:  # a file of one of the two, cut by hand: the other's update is 0
        modules = [modules[0], replace(modules[0], up=torch.zeros_like(modules[0].up))]
    down = torch.cat([module.down for module in modules])
    up = torch.cat([module.up * (module.scale / len(modules)) for module in modules], dim=1)
    return LoraModule(path, down, up, float(down.shape[0]))
