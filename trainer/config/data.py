"""The fields of ``data``: where the pictures are, and how they are read, encoded and put in order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .section import Count, Section


class DataSection(Section):
    """Pictures and their captions."""

    source: Literal["folder", "webdataset", "prompts", "demo", "demo-swaps"] = Field(
        description="folder: images with captions; webdataset: .tar shards; prompts: captions without images; demo: "
        "the embedded pictures; demo-swaps: faces of the embedded pictures on other heads, for the task face-swap"
    )
    path: Path | None = Field(
        None,
        description="the folder of images; a shard or a folder of shards; for prompts a .txt file with one prompt a "
        "line, a folder of .txt files, or a .json file; not needed for demo and demo-swaps",
    )
    resolution: int | None = Field(
        None, ge=8, description="width and height in pixels, a multiple of 8 (default: the model's own)"
    )
    limit: Count | None = Field(None, description="use only this many samples, the first ones (default: all)")
    caption_field: str | None = Field(
        None,
        description="field of the captions in .json, .jsonl, .csv and .parquet files (default: caption, captions, text "
        "or prompt, the first that is there)",
    )
    caption_prefix: str = Field("", description="text put before every caption, such as a style's name")
    on_error: Literal["fail", "skip"] = Field(
        "fail",
        description="for samples that can't be used: fail names them and stops; skip leaves up to skip_limit out",
    )
    skip_limit: float = Field(
        0.01,
        ge=0,
        description="for on_error skip: the most samples to leave out: a share below 1, or a number from 1 on",
    )
    buckets: bool = Field(
        False,
        description="true: keep the aspect ratio of pictures, in buckets of about resolution x resolution pixels, "
        "as SDXL was trained; false: cut a square from the centre",
    )
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="share of the samples that get the empty prompt instead of their caption"
    )
    pictures_per_prompt: Count = Field(
        1, description="for source prompts: pictures that the teacher draws of each prompt, before training"
    )
    encode_batch: Count = Field(8, description="images that the VAE encodes at once, before training")
    workers: Annotated[int, Field(ge=0)] = Field(
        4, description="threads that read and decode pictures while others are encoded; 0 decodes between the batches"
    )
    cache: Path | None = Field(
        None,
        description="folder of the encoded data, which runs share (default: the environment's FLASH_DIFFUSION_CACHE, "
        "or ~/.cache/flash_diffusion)",
    )
    cache_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of latents and conditions in the cache; bfloat16 takes half the space"
    )

    @model_validator(mode="after")
    def _path_is_given(self) -> DataSection:
        if not self.source.startswith("demo") and self.path is None:
            needed = {"folder": "a folder of images", "webdataset": "shards", "prompts": "a file of prompts"}
            raise ValueError(f"source {self.source!r} needs data.path, {needed[self.source]}")
        if self.resolution is not None and self.resolution % 8:
            raise ValueError(f"resolution must be a multiple of 8 pixels, not {self.resolution}")
        return self


DATA_FIELDS_OF_0_1 = {"source", "path", "resolution", "limit", "encode_batch"}
DATA_FIELDS_WITHOUT_EFFECT = {"cache", "workers"}
