"""`flash-diffusion data check`: everything that is wrong with a data set, as a table, as JSON and as a page."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.data.checking.tokens import estimated_tokens

from .odd_data import CAPTIONS, WRITERS, folder, image, pictures, plain, saved, shard

PNG = saved(plain, "PNG")


def check(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Exit code, kind -> finding, and the whole JSON output."""
    code = main(["data", "check", *map(str, arguments), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == code
    return code, {finding["kind"]: finding for finding in result["findings"]}, result


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return saved(image(pixels), "PNG")


def good_set(count: int = 20) -> dict[str, bytes]:
    """Files of a set in which nothing is wrong at 64 px."""
    return {
        name: content
        for index in range(count)
        for name, content in ((f"{index:02d}.png", noise(index)), (f"{index:02d}.txt", f"number {index}".encode()))
    }


@pytest.mark.parametrize("source", WRITERS)
def test_nothing_is_found_in_a_good_set(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    path = WRITERS[source](tmp_path, good_set())
    code, findings, result = check(capsys, path, "--resolution", "64")
    assert (code, findings, result["samples"]) == (0, {}, 20)
    assert result["facts"]["distinct pictures"] == result["facts"]["distinct captions"] == 20


@pytest.mark.parametrize("source", WRITERS)
def test_everything_wrong_is_found_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    files = {
        **good_set(),
        "broken.png": PNG[:60],
        "broken.txt": b"",
        "silent.png": noise(100),
        "copy.png": noise(3),
        "copy.txt": b"a copy",
        "wide.png": noise(101, (64 * 3, 64)),
        "wide.txt": b"wide",
        "tiny.png": noise(102, (20, 20)),
        "tiny.txt": b"",
        "long.png": noise(103),
        "long.txt": b"fox " * 80,
        "00.mask.png": noise(104, (32, 32)),
        "lost.mask.png": noise(105),
        "film.mp4": b"x",
        **{
            name: content
            for index in range(4)
            for name, content in ((f"s{index}.png", noise(200 + index)), (f"s{index}.txt", b"fox"))
        },
    }
    path = WRITERS[source](tmp_path, files)
    code, findings, result = check(capsys, path, "--resolution", "64")
    assert code == 2
    counts = {kind: finding["count"] for kind, finding in findings.items()}
    assert counts == {
        "picture": 1,
        "caption": 1,
        "companion of a task": 3,  # its size, those that lack one, and the lost one
        "enlarged": 1,
        "aspect": 1,
        "duplicate": 1,
        "empty caption": 1,
        "long caption": 1,
        "same caption": 1,
        "not read": 1,
    }
    assert result["samples"] == 28
    for kind, word in {
        "picture": "broken",
        "caption": "silent",
        "enlarged": "20 x 20, enlarged 3.2 times",
        "aspect": "192 x 64, 33% of it are kept",
        "long caption": "long",
        "same caption": "4 times: fox",
        "not read": "1 .mp4",
    }.items():
        assert word in findings[kind]["cases"][0]
    assert {finding["severity"] for kind, finding in findings.items() if kind in ("picture", "caption")} == {"error"}
    assert "aspect" not in check(capsys, path, "--resolution", "64", "--buckets")[1]


@pytest.mark.parametrize(("task", "code"), [("inpainting", 2), ("control", 0), ("text-to-image", 0)])
def test_companions_are_judged_by_the_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, code: int
) -> None:
    path = folder(tmp_path, {**good_set(), "00.mask.png": noise(104, (32, 32))})
    found, findings, _ = check(capsys, path, "--resolution", "64", "--task", task)
    assert found == code
    cases = findings["companion"]["cases"] if findings else []
    assert len(cases) == (2 if task == "inpainting" else 0)
    if cases:
        assert "1 of 20 pictures have a mask; the first without: 01.png" in cases[1]


@pytest.mark.parametrize("source", WRITERS)
def test_odd_pictures_and_captions_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    odd = pictures()
    captions = {name: caption for name, caption in CAPTIONS.items() if caption.field is None}
    files = {}
    for name, picture in odd.items():
        files |= {f"{name}.{picture.suffix}": picture.content, f"{name}.txt": name.encode()}
    for number, caption in enumerate(captions.values()):
        files |= {f"c{number}.png": PNG, **{f"c{number}.{ending}": text for ending, text in caption.files.items()}}
    _, findings, result = check(capsys, WRITERS[source](tmp_path, files), "--resolution", "16")
    assert findings["picture"]["count"] == sum(picture.size is None for picture in odd.values())
    assert findings["caption"]["count"] == sum(caption.captions is None for caption in captions.values())
    assert result["samples"] == len(odd) + len(captions) - findings["picture"]["count"] - findings["caption"]["count"]


def test_unreadable_shards_do_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(tmp_path / "a.tar", good_set(3))
    (tmp_path / "b.tar").write_bytes(b"no tar")
    shard(tmp_path / "c.tar", {f"c{name}": content for name, content in good_set(3).items()})
    code, findings, result = check(capsys, tmp_path, "--resolution", "64")
    assert result == check(capsys, *(tmp_path / f"{name}.tar" for name in "abc"), "--resolution", "64")[2] | {
        "data": str(tmp_path)
    }
    assert (code, result["samples"]) == (2, 6)
    assert findings["shard"]["count"] == 1
    assert "b.tar can't be read" in findings["shard"]["cases"][0]
    assert findings["duplicate"]["count"] == 3
    assert findings["few"]["cases"] == ["6 samples"]


def test_prompts_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"number {index}\n" for index in range(30)) + "\n" + "fox " * 90)
    code, findings, result = check(capsys, path)
    assert (code, result["samples"]) == (1, 31)
    assert {kind: finding["count"] for kind, finding in findings.items()} == {"long caption": 1, "empty prompt": 1}


def test_sheet_shows_what_training_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    wide = Image.new("RGB", (192, 64), "white")
    wide.paste((255, 0, 0), (64, 0, 128, 64))
    path = folder(
        tmp_path / "set", {"a.png": saved(wide, "PNG"), "a.txt": b"<b>wide</b>", "b.png": b"x", "b.txt": b"b"}
    )
    page = tmp_path / "sheet.html"
    assert main(["data", "check", str(path), "--resolution", "64", "--sheet", str(page)]) == 2
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', text)
    shown = Image.open(io.BytesIO(base64.b64decode(found))).convert("RGB")
    assert shown.size == (64, 64)
    red, green, blue = shown.getpixel((32, 32))  # type: ignore[misc]
    assert red > 240 > 20 > max(green, blue)
    assert shown.getpixel((1, 32))[0] > 240  # type: ignore[index]  # the white sides are cut away
    assert shown.getpixel((1, 32))[1] < 60  # type: ignore[index]
    assert "&lt;b&gt;wide" in text
    assert "<b>wide" not in text
    assert text.count("can't be used</div>") == 1
    printed = capsys.readouterr().out
    assert str(page) in printed.replace("\n", "")
    assert "pictures that can't be read" in printed


def test_sheet_cuts_to_buckets(tmp_path: Path) -> None:
    wide = Image.new("RGB", (240, 100), "red")
    path = folder(tmp_path / "set", {"a.png": saved(wide, "PNG"), "a.txt": b"", "a.identity.png": noise(0)})
    page = tmp_path / "sheet.html"
    main(["data", "check", str(path), "--resolution", "64", "--buckets", "--sheet", str(page)])
    found = re.findall(r'src="data:image/webp;base64,([^"]+)"', page.read_text(encoding="utf-8"))
    sizes = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in found]
    # 96 x 40 has 94 % of the square's area, and the picture's shape; the identity is cut alike, and shown smaller.
    assert sizes == [(96, 40), (64, 27)]


def test_names_and_captions_that_no_console_prints_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    name = os.fsdecode(b"caf\xe9")  # Latin-1
    path = folder(
        tmp_path / "set", {f"{name}.png": b"x", f"{name}.txt": "\x1b[31m狐".encode(), "1.png": PNG, "1.txt": b""}
    )
    page = tmp_path / "sheet.html"
    assert main(["data", "check", str(path), "--resolution", "16", "--sheet", str(page)]) == 2
    printed = capsys.readouterr().out
    assert "caf .png is not a readable image" in printed
    assert "\x1b[31m" not in printed
    assert "狐" in page.read_text(encoding="utf-8")
    assert check(capsys, path)[0] == 2


def test_tokens_are_estimated_or_counted_by_a_model(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # CLIP's own counts: one token a common word, digit and sign.
    assert estimated_tokens("a photo of a cat") == 5
    assert estimated_tokens("2 cats, 13 dogs!") == 7
    assert estimated_tokens("日本") == 2
    path = folder(tmp_path, {**good_set(), "00.txt": b"x " * 400})
    _, findings, result = check(capsys, path, "--resolution", "64", "--model", tiny_model)
    assert findings["long caption"]["count"] == 1
    length = json.loads((tiny_model / "tokenizer/tokenizer_config.json").read_text())["model_max_length"]
    assert f"counted by the tokenizers of tiny ({length} tokens)" in result["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["/nowhere"], "there is no /nowhere"),
        ([], "there is no path"),
        (["--source", "pictures", "."], "data.source"),
        (["--task", "painting", "--source", "demo"], "there is no task 'painting'"),
        (["--source", "demo", "--model", "/nowhere"], "has no folder called tokenizer"),
    ],
)
def test_wrong_options_are_explained(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", *arguments]) == 2
    assert error in capsys.readouterr().err
