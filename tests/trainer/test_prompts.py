"""Prompts without pictures: text files, folders, JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_diffusion.trainer.data.reading import open_source
from flash_diffusion.trainer.data.reading.samples import RawSample
from flash_diffusion.trainer.errors import UserError

from .odd_data import (
    PNG,
    folder,
    raw_samples,
    section,
)

PROMPTS = {
    "a.txt": (b"a fox\r\n\n  a dog \na fox\n", ["a fox", "a dog", "a fox"], 1),
    "b.txt": ("\ufeffa fox\n狐".encode("utf-16"), ["a fox", "狐"], 0),
    "c.txt": ("\ufeffa fox\n狐".encode(), ["a fox", "狐"], 0),
    "a.json": (b'["a fox", "", "a dog"]', ["a fox", "a dog"], 1),
    "b.json": (b'{"1.png": "a fox", "2.png": ["a dog", "dog"]}', ["a fox", "a dog", "dog"], 0),
    "c.json": (b'{"annotations": [{"caption": "a fox", "image_id": 1}]}', ["a fox"], 0),
    "a.jsonl": (b'{"text": "a fox"}\n"a dog"\n', ["a fox", "a dog"], 0),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_read_in_order(tmp_path: Path, name: str) -> None:
    content, expected, empty = PROMPTS[name]
    (tmp_path / name).write_bytes(content)
    source = open_source(section("prompts", tmp_path / name, caption_prefix="emoji, "))
    samples = [sample for sample in raw_samples(source) if isinstance(sample, RawSample)]
    assert [sample.captions for sample in samples] == [(f"emoji, {text}",) for text in expected]
    assert all(sample.picture is None and name in sample.name for sample in samples)
    assert source.left_out.empty == empty


def test_a_folder_of_texts_gives_one_prompt_a_file(tmp_path: Path) -> None:
    folder(
        tmp_path, {"b.txt": b"a dog\nin snow", "a.txt": b"a fox", "deep/c.txt": b"\n", "._a.txt": b"x", "a.png": PNG}
    )
    source = open_source(section("prompts", tmp_path))
    samples = [sample for sample in raw_samples(source) if isinstance(sample, RawSample)]
    assert [(Path(sample.name).name, sample.captions) for sample in samples] == [
        ("a.txt", ("a fox",)),
        ("b.txt", ("a dog\nin snow",)),
    ]


def test_many_prompts_are_read_in_units(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"prompt {index}" for index in range(1100)))
    source = open_source(section("prompts", tmp_path / "a.txt"))
    assert len(source) == 3
    last = [sample for sample in source.read(2) if isinstance(sample, RawSample)]
    assert [sample.captions[0] for sample in last] == [f"prompt {index}" for index in range(1024, 1100)]
    assert last[0].name == "a.txt, entry 1025"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.txt", b"\n \n", "no prompts in .*a.txt"),
        ("a.txt", b"a fox\n\xff\n", r"is not UTF-8 text .*\(line 2\)"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"3", "neither a list nor an object"),
        ("a.json", b'[{"width": 3}]', "has no text in entry 1"),
        ("a.jsonl", b'"a"\n{', r"is not JSON .*\(line 2\)"),
        ("missing/a.txt", None, "there is no file"),
    ],
)
def test_wrong_prompts_are_explained(tmp_path: Path, name: str, content: bytes | None, error: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=error):
        open_source(section("prompts", tmp_path / name))
