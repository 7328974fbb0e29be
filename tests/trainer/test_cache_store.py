"""The store of encoded rows: what is written comes back, and a damaged file is never trusted."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch

from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.data.cache import command
from flash_diffusion.trainer.data.cache.store import Places, Store, as_keys, key_of
from flash_diffusion.trainer.errors import UserError


def rows(first: int, count: int) -> dict[str, torch.Tensor]:
    """Rows that tell their number."""
    number = torch.arange(first, first + count)
    return {
        "latents": number.view(-1, 1, 1, 1).float().expand(-1, 4, 2, 3) + 0.1,
        "hint": (number % 256).to(torch.uint8).view(-1, 1).expand(-1, 5),
        "half": number.view(-1, 1).to(torch.bfloat16).expand(-1, 3),
        "level": number.float(),
    }


def keys(first: int, count: int) -> list[bytes]:
    return [key_of("row", number) for number in range(first, first + count)]


def test_rows_come_back_by_their_keys_in_any_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for first, count in ((0, 3), (3, 5), (100, 1)):
        store.write(keys(first, count), rows(first, count))
    wanted = [7, 0, 100, 3, 3, 2]
    places = store.find(as_keys([key_of("row", number) for number in [*wanted, 55]]))
    assert places.missing.tolist() == [False] * 6 + [True]
    found = store.read(places.part(np.arange(6)))
    expected = {name: torch.cat([rows(number, 1)[name] for number in wanted]) for name in rows(0, 1)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_bfloat16_halves_the_file_and_rows_keep_their_dtype(tmp_path: Path) -> None:
    value = {"latents": torch.randn(64, 4, 16, 16)}
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        store = Store(tmp_path / str(dtype), dtype=dtype)
        sizes.append(store.write(keys(0, 64), value).stat().st_size)
        found = store.read(store.find(as_keys(keys(0, 64))))["latents"]
        assert found.dtype == torch.float32
        assert torch.equal(found, value["latents"].to(dtype).float())
    assert sizes[1] < 0.55 * sizes[0]


def test_the_same_rows_make_the_same_file_with_ordinary_permissions(tmp_path: Path) -> None:
    one, two = (Store(tmp_path / name).write(keys(0, 4), rows(0, 4)) for name in "ab")
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()
    plain = tmp_path / "plain"
    plain.touch()
    assert one.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("size", [0, 7, 100, -1], ids=["empty", "header", "cut short", "one byte short"])
def test_a_truncated_file_is_removed_and_its_rows_are_missing(tmp_path: Path, size: int) -> None:
    store = Store(tmp_path)
    path = store.write(keys(0, 8), rows(0, 8))
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert store.find(as_keys(keys(0, 8))).missing.all()
    assert not path.exists()


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write(keys(0, 2), rows(0, 2))
    places = store.find(as_keys(keys(0, 2)))
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}.*is damaged or gone.*Run again"):
        store.read(Places(places.file, places.row, places.files))


def test_the_command_lists_checks_and_prunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (("a" * 32, "latents"), ("b" * 32, "captions")):
        store = Store(tmp_path / kind / name, {"kind": kind, "model": "a model", "dtype": "float32"})
        path = store.write(keys(0, 4), rows(0, 4))
    (tmp_path / "latents" / "mine").mkdir()
    (tmp_path / "latents" / "mine" / "picture.png").touch()  # not ours: never listed, never removed
    old = path.parent / "about.json"
    os.utime(old, (0, 0))

    def cache(*arguments: str) -> tuple[int, str]:
        code = main(["cache", *arguments, "--cache", str(tmp_path)])
        return code, capsys.readouterr().out

    code, listed = cache("ls")
    assert code == 0
    assert "aaaaaaaa" in listed
    assert "2 entries" in listed
    assert cache("check")[0] == 0
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, checked = cache("check")
    assert code == 1
    assert str(path) in checked
    assert main(["cache", "prune", "--cache", str(tmp_path)]) == 2
    assert "say what to remove" in capsys.readouterr().err
    assert main(["cache", "prune", "nothing", "--cache", str(tmp_path)]) == 2
    assert "there is no nothing; known names: aaaaaaaa, bbbbbbbb" in capsys.readouterr().err
    cache("prune", "--older-than", "30", "--dry-run")
    assert path.parent.exists()
    cache("prune", "--older-than", "30")
    assert not path.parent.exists()
    assert [entry.name for entry in command.entries(tmp_path)] == ["a" * 8]
    cache("prune", "--all")
    assert not command.entries(tmp_path)
    assert (tmp_path / "latents" / "mine" / "picture.png").exists()


def test_no_flipped_byte_gives_a_wrong_value(tmp_path: Path) -> None:
    """Every byte of a small file, with the flips that make another digit, another dtype and another sign of it."""
    store, wanted = Store(tmp_path), {"latents": torch.arange(6.0).view(2, 3) - 2.5, "hint": torch.tensor([[7], [200]])}
    path = store.write(keys(0, 2), wanted)
    content = path.read_bytes()
    for place in range(len(content)):
        for flip in (0x01, 0x0F, 0x1C, 0x80):  # "F32" ^ 0x0f is "I32", "U8" ^ 0x1c is "I8"
            path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            places = store.find(as_keys(keys(0, 2)))
            try:
                found = store.read(places.part(np.flatnonzero(~places.missing)))
            except UserError:
                assert not path.exists()
                continue
            assert path.exists() == (not places.missing.any())
            for name, value in found.items():
                assert torch.equal(value, wanted[name][~torch.from_numpy(places.missing)]), (place, flip, name)


def test_writers_of_the_same_rows_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Two runs that begin together encode the same samples into the same files."""
    store, barrier = Store(tmp_path / "store", {"kind": "latents"}), Barrier(8)

    def write(_: int) -> None:
        barrier.wait()
        for number in range(20):
            store.write(keys(number, 2), rows(number, 2))
            store.touch()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    places = store.find(as_keys(keys(0, 21)))
    assert not places.missing.any()
    assert torch.equal(store.read(places)["level"], torch.arange(21).float())
    assert not list(store.folder.glob(".*"))


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(keys(0, 2), rows(0, 2))
    old, new = tmp_path / ".a.safetensors.123.partial", tmp_path / ".b.safetensors.456.partial"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    store.touch()
    assert not old.exists()
    assert new.exists()


def test_a_read_only_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of another user, or on a disk that is mounted read-only."""
    store = Store(tmp_path)
    path = store.write(keys(0, 2), rows(0, 2))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    store.touch()
    assert len(store.rows(store.find(as_keys(keys(0, 2))))) == 2
    monkeypatch.setattr(Path, "unlink", refuse)
    os.truncate(path, 20)
    with pytest.raises(UserError, match=rf"{path} of the cache is damaged, and can't be removed .*set data\.cache"):
        store.find(as_keys(keys(0, 2)))


def test_rows_outlive_their_file(tmp_path: Path) -> None:
    """A file on a network may be cut short at any time; rows that were read do not depend on it."""
    store = Store(tmp_path)
    path = store.write(keys(0, 2), rows(0, 2))
    found = store.rows(store.find(as_keys(keys(0, 2))))
    path.write_bytes(bytes(path.stat().st_size))
    for number, row in enumerate(found):
        for name, value in rows(number, 1).items():
            assert torch.equal(row[name], value)
