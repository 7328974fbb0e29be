"""Draw with the glyph teacher, measure the pictures, and write its model card."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .....flash_core.measures.distances import frechet_distance
from ....files import write_text_whole, write_whole
from ....metrics.feature_network import FeatureNetwork
from ....pictures import tile_grid
from ..features import accuracy
from ..teacher.training import TRAINING_FILE
from .fonts import GLYPHS, SIZE, GlyphSet
from .training import rgb

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

STEPS, GUIDANCE = 32, 2.0
FEW_STEPS = (1, 2, 4, 8, 16)
MEASURED = 384  # pictures of a set; the network has 64 features
COLUMNS, ROWS = 31, 10  # of the grid
TEMPLATE = Path(__file__).with_name("card_template.md")


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float, seed: int) -> Tensor:
    """Draw one picture per prompt: (N, 3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        kwargs = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
        drawn.append(pipeline(part, output_type="pt", **kwargs).images)
    return torch.cat(drawn)


def nearest_distance(pictures: Tensor, others: Tensor) -> Tensor:
    """Return the distance of each picture (N, 3, H, W) to the nearest of `others` (M, H, W) uint8: (N,).

    Pictures are compared at a quarter of the size, so that the place of an edge within a few pixels counts less.
    """
    small = torch.nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), 4).flatten(1)
    rest = torch.nn.functional.avg_pool2d(others[:, None] / 255, 4).flatten(1)
    return torch.cdist(small, rest).amin(1)


@torch.no_grad()
def embed(network: FeatureNetwork, pictures: Tensor) -> Tensor:
    """Return the features (N, 64) of pictures (N, 3, H, W) in [0, 1]."""
    return torch.cat([network(part)[0] for part in pictures.split(64)])


def write_card(home: Path, train: GlyphSet, held_out: GlyphSet) -> dict[str, float]:
    """Draw, measure, write `README.md` and `grid.webp` into `home`, and return the card's figures."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(home / "teacher", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    network = FeatureNetwork.from_pretrained(home / "features")
    captions, unseen = ((home / name).read_text().splitlines() for name in ("captions.txt", "unseen.txt"))
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [captions[index] for index in (order + order)[:MEASURED]]
    names = [prompt.split(",")[0] for prompt in prompts]

    sets = [draw(pipeline, prompts, STEPS, GUIDANCE, seed) for seed in (0, 1)]
    embedded = [embed(network, pictures) for pictures in sets]
    floor = frechet_distance(embedded[1], embedded[0])
    rows = []
    for steps in FEW_STEPS:
        runs = [draw(pipeline, prompts, steps, guidance, 1) for guidance in (1.0, GUIDANCE)]
        ratios = [frechet_distance(embed(network, run), embedded[0]) / floor for run in runs]
        right = [accuracy(network, run, names) for run in runs]
        rows.append(f"| {steps} | {ratios[0]:.1f} | {ratios[1]:.1f} | {right[0]:.0%} | {right[1]:.0%} |")

    characters = [index for index in range(len(captions)) if ", regular" in captions[index]]
    shown = [captions[characters[place % len(characters)]] for place in range(COLUMNS * ROWS)]
    grid = tile_grid(draw(pipeline, shown, STEPS, GUIDANCE, 2), COLUMNS, 32)
    write_whole(home / "grid.webp", lambda partial: grid.save(partial, "WEBP", quality=80, method=6))
    real = rgb(held_out.images[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:MEASURED]])
    figures = {
        "right": accuracy(network, sets[0], names),
        "right_unseen": accuracy(
            network, draw(pipeline, unseen * 4, STEPS, GUIDANCE, 3), [text.split(",")[0] for text in unseen] * 4
        ),
        "drawn_to_train": nearest_distance(sets[0], train.images).median().item(),
        "real_to_train": nearest_distance(real, train.images).median().item(),
        "floor": floor,
    }
    config = json.loads((home / "features" / "config.json").read_text())
    fonts = json.loads((home / "fonts.json").read_text(encoding="utf-8"))
    card = TEMPLATE.read_text(encoding="utf-8").format(
        size=SIZE,
        steps=STEPS,
        guidance=GUIDANCE,
        glyphs=len(GLYPHS),
        families=len(fonts),
        licenses=", ".join(f"{count} {name}" for name, count in Counter(font["license"] for font in fonts).items()),
        pairs=len(unseen) // 2,
        held_out=len(held_out),
        samples=MEASURED,
        few="\n".join(rows),
        ratio=figures["drawn_to_train"] / figures["real_to_train"],
        features_right=config["accuracy"]["unseen_families"],
        unet=sum(value.numel() for value in pipeline.unet.parameters()) / 1e6,
        vae=sum(value.numel() for value in pipeline.vae.parameters()) / 1e6,
        text=sum(value.numel() for value in pipeline.text_encoder.parameters()) / 1e6,
        **json.loads((home / "teacher" / TRAINING_FILE).read_text()),
        **figures,
    )
    write_text_whole(home / "README.md", card)
    return figures
