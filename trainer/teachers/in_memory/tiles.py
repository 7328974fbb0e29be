"""Decoding in tiles: the decoder's activations of a large picture, a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import AutoencoderKL

SIDE = 512  # pixels of a tile; diffusers blends neighbours over a quarter of it


@contextmanager
def decoding_in_tiles(vae: AutoencoderKL) -> Iterator[None]:
    """Let a VAE decode pictures above 512 pixels in tiles inside the block, by diffusers' own tiling.

    A tile's norms and attention see the tile alone, so that a picture differs a little from one that is decoded whole.
    """
    scale = 2 ** (len(vae.config["block_out_channels"]) - 1)
    before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = SIDE, SIDE // scale
    try:
        yield
    finally:
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before
