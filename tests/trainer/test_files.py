"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.files import replace_folder, write_whole


def fail(path: Path, code: int = errno.ENOSPC) -> None:
    """Write half a file, then fail as a full disk does."""
    (path if path.is_file() or not path.exists() else path / "half").write_text("half")
    raise OSError(code, os.strerror(code))


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_write_whole_makes_folders_and_leaves_only_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_whole(path, lambda partial: partial.write_text("all of it"))
    assert path.read_text() == "all of it"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, r"No space.* free on that disk.*Free some space"),
        (errno.EROFS, r"Read-only file system.*Make the folder writable"),
        (errno.EIO, r"Input/output error.*Look at that path"),
    ],
)
def test_write_whole_keeps_the_old_content_after_a_failure(tmp_path: Path, code: int, words: str) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UserError, match=rf"{path} could not be written: {words}"):
        write_whole(path, lambda partial: fail(partial, code))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_written_files_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1)}
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", lambda partial: save_file(tensors, partial))
        replace_folder(tmp_path / "folder", lambda partial: save_file(tensors, partial / "file"))
    finally:
        os.umask(before)
    assert permissions(tmp_path / "file") == 0o640
    assert permissions(tmp_path / "folder" / "file") == 0o640


def test_replace_folder_drops_the_old_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    replace_folder(folder, lambda partial: (partial / "new").write_text("new"))
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_replace_folder_keeps_the_old_folder_after_a_failure(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(UserError, match=f"{folder} could not be written: No space"):
        replace_folder(folder, fail)
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]
