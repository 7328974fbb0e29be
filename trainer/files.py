"""Write files and folders whole or not at all, and hash them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ABANDONED_AFTER = 24 * 60 * 60  # seconds; nothing is written for so long
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write inside the ``with`` block into a readable error; ``path`` is the file or folder.

    Raises:
        UserError: names ``path``, the reason and the free space.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(_explain(path, error)) from error


def _explain(path: Path, error: OSError | SafetensorError) -> str:
    """Return a sentence about a failed write: what, why, how much space is free, what to do."""
    code = error.errno if isinstance(error, OSError) else None
    if of_system := re.search(r"\(os error (\d+)\)", str(error)):  # as safetensors tells the system's errors
        code = int(of_system[1])
    reason = str(error) if code is None else os.strerror(code)
    there = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), Path.cwd())
    free = shutil.disk_usage(there).free
    advice = "Free some space there, or choose another folder"
    if code in FORBIDDEN:
        advice = "Make the folder writable, or choose another folder"
    elif code is not None and code not in FULL:
        advice = "Look at that path, or choose another folder"
    return f"{path} could not be written: {reason} ({_in_words(free)} free on that disk). {advice}"


def _in_words(size: int) -> str:
    """Return a number of bytes as kB, MB or GB."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"


def partial_path(path: Path) -> Path:
    """Return the hidden name beside ``path`` that its content has until it is complete."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, write: Callable[[Path], object], *, shared: bool = False) -> None:
    """Let ``write`` fill a hidden file beside ``path``, then rename the hidden file to ``path``.

    After a failure or a crash ``path`` still holds its old content. Missing folders are made. The file gets the
    permissions of any new file (0666 without the umask's bits), even where the writer makes it private.

    Args:
        shared: other processes may write ``path`` at the same time, so each hidden file has a name of its own. After a
            kill :func:`remove_partials` removes it.

    Raises:
        UserError: the file cannot be written, for example because the disk is full.
    """
    partial = partial_path(path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}") if shared else path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            permissions = _new_file_permissions(partial)
            write(partial)
            _settle(partial, permissions)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all, see :func:`write_whole`."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def remove_partials(folder: Path) -> None:
    """Remove the hidden files in ``folder`` that killed processes left; files younger than a day may be in use."""
    for path in folder.glob(".*.partial"):
        with suppress(OSError):  # another process removes it, or the folder is read-only
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                path.unlink()


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a hidden folder beside ``folder``, then rename the hidden folder to ``folder``.

    After a failure ``folder`` still holds its old content.

    Raises:
        UserError: the folder cannot be written, for example because the disk is full.
    """
    partial = partial_path(folder)
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write(partial)
            publish_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def publish_folder(partial: Path, folder: Path) -> None:
    """Flush the complete folder ``partial`` to disk and rename it to ``folder``, which is removed first."""
    files = [path for path in partial.rglob("*") if path.is_file()]
    permissions = _new_file_permissions(partial / ".permissions")
    for path in files:
        _settle(path, permissions)
    remove_folder(folder)
    os.replace(partial, folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it is there. A crash in between leaves a hidden folder, never a part under the old name."""
    if folder.exists():
        removed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(folder, removed)
        shutil.rmtree(removed)


def _new_file_permissions(path: Path) -> int:
    """Return the permissions that the system gives a new file at ``path``; no file is left there."""
    path.unlink(missing_ok=True)
    path.touch()
    permissions = path.stat().st_mode
    path.unlink()
    return permissions


def _settle(path: Path, permissions: int) -> None:
    """Give a written file its permissions (safetensors makes files private) and flush it to disk."""
    path.chmod(permissions)
    with path.open("rb+") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())


def fingerprint(folder: Path) -> str:
    """Return a hash of a model's weights, configurations and vocabularies: 16 hexadecimal digits.

    A file is known by its path inside the folder. Directly in the folder only weights and ``config.json`` count, not
    cards or notes on the training. In a configuration, neither the layout nor keys that begin with an underscore count
    (the library that wrote the file, and where).

    Raises:
        FileNotFoundError: the folder holds no ``.safetensors`` file.
    """
    weights = {*folder.rglob("*.safetensors")}
    if not weights:
        raise FileNotFoundError(f"no .safetensors weights in {folder}; expected a model folder in diffusers' layout")
    settings = {*folder.glob("config.json"), *folder.glob("*/*.json"), *folder.glob("*/*.txt")}
    digest = hashlib.sha256()
    for path in sorted(weights | settings):
        digest.update(f"{path.relative_to(folder).as_posix()}:".encode())
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if not key.startswith("_")}
            digest.update(json.dumps(content, sort_keys=True).encode())
            continue
        _add_file(digest, path)
    return digest.hexdigest()[:16]


def fingerprint_texts(texts: Sequence[str]) -> str:
    """Return a hash of a list of texts in its order: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Return a file's SHA-256: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    _add_file(digest, path)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256."""
    return sha256(path)[:16]


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
