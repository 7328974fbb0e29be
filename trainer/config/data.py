"""The fields of ``data``: where the pictures are, and how they are read, encoded and put in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from .section import Count, FilePath, Section, at_home

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # a drive's single letter is no protocol
STREAMED = ("folder", "webdataset")


def is_url(text: str) -> bool:
    """Return True for a URL, False for a path."""
    return URL.match(text) is not None


def _locations(given: Any) -> Path | str | list[Path | str] | None:
    """Return paths as Path and URLs as text, one or a list.

    Raises:
        ValueError: the value is something else, or runs a command.
    """
    if not isinstance(given, list | tuple):
        return given if given is None else _location(given)
    if not given:
        raise ValueError("the list is empty; give at least one path or URL")
    return [_location(one) for one in given]


def _location(given: Any) -> Path | str:
    given = at_home(given)
    if isinstance(given, Path):
        return given
    if not isinstance(given, str):
        raise ValueError("expected a path, a URL, or a list of them")
    if given.lstrip().startswith("pipe:"):
        raise ValueError("commands are not run: a recipe from a stranger could do anything; give a path or a URL")
    if "::" in given and "://" in given:
        raise ValueError("chained URLs (::) are not read; give the URL of the shard itself")
    if not is_url(given):
        return Path(given)
    protocol = given.partition("://")[0].lower()
    if protocol in ("file", "local"):
        raise ValueError(f"give a file of this machine as a path, without {protocol}://")
    return given


class DataSection(Section):
    """Pictures and their captions."""

    source: Literal["folder", "webdataset", "prompts", "demo", "demo-swaps", "demo-glyphs"] = Field(
        description="folder: images with captions; webdataset: .tar shards; prompts: captions without images; demo: "
        "the embedded pictures; demo-swaps: faces of the embedded pictures on other heads, for the task face-swap; "
        "demo-glyphs: the captions of the teacher glyphs, without images"
    )
    path: Annotated[Path | str | list[Path | str] | None, PlainValidator(_locations)] = Field(
        None,
        description="the folder of images; for webdataset a shard, a folder of shards, a URL (https://, s3://, ...), "
        "a pattern such as shard-{000..099}.tar, or a list of these; for prompts a .txt file with one prompt a "
        "line, a folder of .txt files, or a .json file; not needed for the demo sources",
    )
    stream: bool = Field(
        False,
        description="true: read and encode pictures as training needs them and keep nothing on disk, for data larger "
        "than the disk; false: encode everything before training",
    )
    lanes: Count = Field(16, description="for stream: readers side by side; at best a multiple of processes x workers")
    shuffle: Count = Field(
        1000, description="for stream: samples that wait in memory, of which the next is drawn, over all lanes"
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
    encode_batch: Count = Field(
        8,
        description="images that are encoded together, before training; large ones reach the VAE in smaller batches",
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        4,
        description="threads that read and decode pictures while others are encoded; 0 decodes between the batches; "
        "for stream: processes",
    )
    cache: FilePath | None = Field(
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
        if self.source != "webdataset" and not isinstance(self.path, Path | None):
            raise ValueError(
                f"source {self.source!r} reads one path of this machine; URLs and lists are for source 'webdataset'"
            )
        if self.resolution is not None and self.resolution % 8:
            raise ValueError(f"resolution must be a multiple of 8 pixels, not {self.resolution}")
        return self

    @model_validator(mode="after")
    def _stream_can_be_read(self) -> DataSection:
        if not self.stream:
            return self
        if self.source not in STREAMED:
            raise ValueError(f"stream reads the sources {' and '.join(STREAMED)}; leave it out for {self.source!r}")
        for name, value in (("buckets", self.buckets), ("limit", self.limit)):
            if value:
                raise ValueError(f"{name} needs cached data; leave out data.{name}, or data.stream")
        return self


DATA_FIELDS_OF_0_1 = {"source", "path", "resolution", "limit", "encode_batch"}
DATA_FIELDS_WITHOUT_EFFECT = {"cache", "workers"}
