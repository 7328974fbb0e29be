"""The model families: what each is called, and the numbers that tell one from another.

Every other file reads this table. A test compares it with ComfyUI's classes and with diffusers' networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        key: what LoRA metadata calls the family (``flash.base``). Files carry the key: never change one.
        name: the family in a sentence for users.
        recipe: what a recipe calls the family (``model.family``); empty where the trainer has no teacher of it.
        architecture: ``modelspec.architecture``, as the public ModelSpec names it.
        comfy_class: the class of the model's configuration in ComfyUI.
        latent_channels: channels of the latent.
        native_side: side in pixels of the square pictures that the family was trained on.
        widest: the longer side / the shorter side, at most, of pictures that the family can draw.
        epsilon_side: the same as native_side for its models that predict epsilon, where these differ; else 0.
        text_width: width of the text embeddings that a UNet's cross-attention reads; 0 for transformers.
        vector_width: width of the vector (pooled text and sizes) that a UNet reads beside the text; 0 without one.
        level_widths: channels of a UNet's levels with cross-attention, which tell families of one text width apart.
        sizes: names of a transformer's sizes, by the width of the image stream.
        architectures: the ModelSpec names of its models, where these differ: by the width of the image stream, or by
            the prediction. ``architecture`` is the name where neither is known.
        parameters: of the denoising network, of its usual size where there are several; 0 where the trainer has none.
    """

    key: str
    name: str
    recipe: str
    architecture: str
    comfy_class: str
    latent_channels: int
    native_side: int
    # SDXL was trained on 512 x 2048 to 2048 x 512 (arXiv 2307.01952, appendix I), PixArt on ratios of 0.25 to 4.
    widest: float = 4.0
    epsilon_side: int = 0
    text_width: int = 0
    vector_width: int = 0
    level_widths: tuple[int, ...] = ()
    sizes: Mapping[int, str] = field(default_factory=dict)
    architectures: Mapping[int | str, str] = field(default_factory=dict)
    parameters: float = 0.0

    def sized(self, width: int) -> str:
        """Return the name with the size of that width: "SD3.5 large"; the name alone for an unknown width."""
        return f"{self.name} {self.sizes[width]}" if width in self.sizes else self.name

    def architecture_of(self, prediction: str, width: int = 0) -> str:
        """Return the ModelSpec name of a model, from its prediction and its image stream's width (0: unknown)."""
        return self.architectures.get(width) or self.architectures.get(prediction) or self.architecture


# Families of square pictures: twice as wide as high is as far as they and their fine-tunes draw one picture.
SQUARE = 2.0

FAMILIES: tuple[Family, ...] = (
    Family(
        "sd15",
        "SD 1.5",
        "sd15",
        "stable-diffusion-v1",
        "SD15",
        4,
        512,
        SQUARE,
        text_width=768,
        level_widths=(320, 640, 1280),
        parameters=8.6e8,
    ),
    Family(
        "sd21",
        "SD 2",
        "sd21",
        "stable-diffusion-v2",
        "SD20",
        4,
        768,
        SQUARE,
        epsilon_side=512,
        text_width=1024,
        level_widths=(320, 640, 1280),
        architectures={"v_prediction": "stable-diffusion-v2-768-v", "epsilon": "stable-diffusion-v2-512"},
        parameters=8.7e8,
    ),
    Family(
        "sd_x4",
        "the SD x4 upscaler",
        "sd_x4",
        "stable-diffusion-x4-upscaler",  # ModelSpec has no name for it: this is its name on the Hub
        "SD_X4Upscaler",
        4,
        512,
        SQUARE,
        text_width=1024,
        level_widths=(512, 1024),
        parameters=4.7e8,
    ),
    Family(
        "sdxl",
        "SDXL",
        "sdxl",
        "stable-diffusion-xl-v1-base",
        "SDXL",
        4,
        1024,
        text_width=2048,
        vector_width=2816,
        level_widths=(640, 1280),
        parameters=2.57e9,
    ),
    Family(
        "sdxl-refiner",
        "the SDXL refiner",
        "",
        "stable-diffusion-xl-v1-refiner",
        "SDXLRefiner",
        4,
        1024,
        text_width=1280,
        vector_width=2560,
        level_widths=(768, 1536),
    ),
    Family("pixart", "PixArt-alpha", "pixart_alpha", "pixart-alpha", "PixArtAlpha", 4, 1024, parameters=6.1e8),
    Family("pixart-sigma", "PixArt-Sigma", "pixart_sigma", "pixart-sigma", "PixArtSigma", 4, 1024, parameters=6.1e8),
    # SD3's networks have 64 channels a head and as many blocks as heads.
    Family(
        "sd3", "SD3", "sd3", "stable-diffusion-v3-medium", "SD3", 16, 1024, sizes={1536: "medium"}, parameters=2.03e9
    ),
    Family(
        "sd35",
        "SD3.5",
        "sd35",
        "stable-diffusion-v3.5",
        "SD3",
        16,
        1024,
        sizes={1536: "medium", 2432: "large"},
        architectures={1536: "stable-diffusion-v3.5-medium", 2432: "stable-diffusion-v3.5-large"},
        parameters=2.24e9,
    ),
    Family("flux", "Flux", "", "flux-1-dev", "Flux", 16, 1024),
    # Known for the presets of published few-step LoRAs. Qwen-Image's own card draws squares of 1328 pixels.
    Family("qwen-image", "Qwen-Image", "", "qwen-image", "QwenImage", 16, 1328),
    Family("z-image", "Z-Image", "", "z-image", "ZImage", 16, 1024),
    # The demo's class is nodes/demo/models.py's.
    Family(
        "flash-demo",
        "the Flash demo",
        "demo",
        "flash-demo",
        "DemoModelConfig",
        16,
        128,
        SQUARE,
        text_width=128,
        level_widths=(128,),
        parameters=6.7e6,
    ),
)


def family_of(key: str) -> Family | None:
    """Return the family with that key, or None."""
    return next((family for family in FAMILIES if family.key == key), None)


def name_of(key: str) -> str:
    """Return the name of the family with that key; the key itself where no family has it (files of other makers)."""
    family = family_of(key)
    return key if family is None else family.name


def of_comfy_class(names: Iterable[str]) -> Family | None:
    """Return the first family whose ComfyUI class is among the names, tried in order, or None."""
    return next((family for name in names for family in FAMILIES if family.comfy_class == name), None)


def of_text_width(width: int, channels: int = 0) -> Family | None:
    """Return the UNet family whose cross-attention reads text of that width, or None.

    Args:
        channels: of a level with cross-attention, which decides where several families read one width.
    """
    found = [family for family in FAMILIES if width and family.text_width == width]
    return next((family for family in found if channels in family.level_widths), found[0] if found else None)


def of_vector_width(width: int) -> Family | None:
    """Return the UNet family that reads a vector of that width beside the text, or None."""
    return next((family for family in FAMILIES if width and family.vector_width == width), None)


def of_transformer_width(width: int) -> tuple[Family, ...]:
    """Return the transformer families that have a size of that width."""
    return tuple(family for family in FAMILIES if width in family.sizes)
