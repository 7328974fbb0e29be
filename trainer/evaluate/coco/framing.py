"""Cut and resize pictures for the comparison and for Inception.

Resizing decides several points of FID. Here pictures are resized as clean-fid recommends (arXiv 2104.11222): with
Pillow's filters, which read every pixel when they reduce, and for Inception without rounding in between.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

WORDS = "cut to its centre square, Lanczos to {size} px (8 bits), for Inception bicubic to 299 px (floats)"


def open_picture(path: Path) -> Image.Image:
    """Load a file as an RGB picture.

    Raises:
        UserError: the file can't be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            rgb: Image.Image = picture.convert("RGB")
            return rgb
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(
            f"{path} can't be read as a picture ({error}); restore the file, or remove it if the evaluation made it"
        ) from error


def square(picture: Image.Image, size: int) -> Image.Image:
    """Return the centre square of a picture, at ``size`` x ``size`` pixels."""
    from PIL import Image

    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    cut = picture.crop((left, top, left + side, top + side))
    return cut if side == size else cut.resize((size, size), Image.Resampling.LANCZOS)


def for_inception(picture: Image.Image) -> Tensor:
    """Return a picture as (3, 299, 299), values around 0..255: bicubic resizing overshoots a little."""
    import numpy as np
    import torch
    from PIL import Image

    from ...metrics.inception import INPUT_SIZE

    channels = [
        np.asarray(
            Image.fromarray(channel).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC)  # mode F: no rounding
        )
        for channel in np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)
    ]
    return torch.from_numpy(np.stack(channels))
