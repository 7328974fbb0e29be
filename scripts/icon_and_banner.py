"""Draw the project's icon and banner into docs/images.

    python scripts/icon_and_banner.py

The banner's pictures are samples of the demo in stock diffusers: the teacher in 32 guided steps, then the same model
with the demo's Flash LoRA in 4, 2 and 1 steps. All rows start from the same noise. Run `make install` first.
"""

from __future__ import annotations

import random
from pathlib import Path

import resvg_py
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "trainer" / "demo"
IMAGES = ROOT / "docs" / "images"

ICON_SIDE = 400  # pixels; the Comfy registry's largest height
BANNER_SIZE = (1400, 600)  # pixels; the Comfy registry asks for 21:9
INK, PAPER, GREY, ACCENT = "#1e1b3a", "#ffffff", "#6b6880", "#f59e0b"

TEACHER_STEPS = 32
GUIDANCE = 3.0  # the distillation's
# Flash timesteps per number of steps: the model card of the LoRA names them.
FLASH_TIMESTEPS = {4: [999, 749, 499, 249], 2: [999, 499], 1: [999]}
PROMPTS = ("fox", "red apple", "sunflower", "panda", "snowman")
SEED = 1
TILE = 128  # pixels, as the demo's pictures

BOLT = "226,44 110,220 186,220 154,356 290,168 210,168 252,44"


def icon_svg() -> str:
    """Return the icon: a lightning bolt in front of noise that fades from left to right."""
    source = random.Random(7)
    cell = 20
    squares = []
    for row in range(ICON_SIDE // cell):
        for column in range(ICON_SIDE // cell):
            fade = max(0.0, 1 - column * cell / 260)
            opacity = fade * source.uniform(0, 0.75)
            if opacity > 0.05:
                color = source.choice(("#a78bfa", "#38bdf8", "#f472b6", "#fde68a"))
                squares.append(
                    f'<rect x="{column * cell}" y="{row * cell}" width="{cell}" height="{cell}" '
                    f'fill="{color}" opacity="{opacity:.2f}"/>'
                )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {ICON_SIDE} {ICON_SIDE}">'
        '<defs><linearGradient id="night" x1="0" y1="0" x2="1" y2="1">'
        '<stop offset="0" stop-color="#312e81"/><stop offset="1" stop-color="#0f0b2a"/></linearGradient>'
        '<linearGradient id="light" x1="0" y1="0" x2="0" y2="1">'
        '<stop offset="0" stop-color="#fef3c7"/><stop offset="0.45" stop-color="#fbbf24"/>'
        '<stop offset="1" stop-color="#f97316"/></linearGradient>'
        '<clipPath id="tile"><rect width="400" height="400" rx="84"/></clipPath></defs>'
        '<g clip-path="url(#tile)"><rect width="400" height="400" fill="url(#night)"/>'
        + "".join(squares)
        + f'<polygon points="{BOLT}" fill="url(#light)" stroke="#0f0b2a" stroke-width="14" stroke-linejoin="round" '
        'paint-order="stroke"/></g></svg>\n'
    )


def samples() -> dict[str, list[Image.Image]]:
    """Return the banner's pictures: row title -> one picture per prompt."""
    pipe = StableDiffusionPipeline.from_pretrained(DEMO / "teacher", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    shape = (len(PROMPTS), pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))

    def draw(**settings: object) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(SEED)
        return pipe(list(PROMPTS), latents=latents, generator=generator, **settings).images

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    rows = {f"{TEACHER_STEPS} steps": draw(num_inference_steps=TEACHER_STEPS, guidance_scale=GUIDANCE)}
    pipe.load_lora_weights(DEMO / "lora", weight_name="flash_demo.safetensors")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=100)
    for steps, timesteps in FLASH_TIMESTEPS.items():
        rows[f"{steps} step{'s' if steps > 1 else ''}"] = draw(timesteps=timesteps, guidance_scale=1.0)
    return rows


def banner(icon: Image.Image, rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Return the banner: name and one sentence on the left, the pictures on the right."""
    sheet = Image.new("RGB", BANNER_SIZE, PAPER)
    draw = ImageDraw.Draw(sheet)
    fonts = {size: ImageFont.load_default(size) for size in (62, 27, 21, 18)}
    left = 56
    small = icon.resize((112, 112), Image.Resampling.LANCZOS)
    sheet.paste(small, (left, 92), small)
    draw.text((left, 226), "Flash Diffusion", fill=INK, font=fonts[62])
    for line, text in enumerate(("Pictures in 1-4 steps", "instead of 25-50.")):
        draw.text((left, 318 + 38 * line), text, fill=INK, font=fonts[27])
    for line, text in enumerate(("Few-step LoRAs: nodes for ComfyUI,", "and a trainer to make your own.")):
        draw.text((left, 424 + 30 * line), text, fill=GREY, font=fonts[21])
    top = (BANNER_SIZE[1] - len(rows) * TILE) // 2
    grid = BANNER_SIZE[0] - 40 - len(PROMPTS) * TILE
    for row, (title, pictures) in enumerate(rows.items()):
        y = top + row * TILE
        label, color = ("teacher", GREY) if row == 0 else ("Flash", ACCENT)
        draw.text((grid - 18, y + TILE // 2 - 14), label, fill=color, font=fonts[21], anchor="rm")
        draw.text((grid - 18, y + TILE // 2 + 14), title, fill=GREY, font=fonts[18], anchor="rm")
        for column, picture in enumerate(pictures):
            sheet.paste(picture.convert("RGB").resize((TILE, TILE)), (grid + column * TILE, y))
    return sheet


def main() -> None:
    """Write icon.svg, icon.png and banner.png."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    svg = icon_svg()
    (IMAGES / "icon.svg").write_text(svg, encoding="utf-8")
    (IMAGES / "icon.png").write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=ICON_SIDE, height=ICON_SIDE)))
    with Image.open(IMAGES / "icon.png") as icon:
        sheet = banner(icon.convert("RGBA"), samples())
    # 256 colours keep the file below 150 kB.
    sheet.quantize(256, kmeans=3, dither=Image.Dither.FLOYDSTEINBERG).save(IMAGES / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
