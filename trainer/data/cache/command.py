"""``flash-diffusion cache``: list the encoded data on disk, check them, and remove those that no run needs."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import UserError

DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Entry:
    """A store, or all manifests together.

    Attributes:
        name: first digits of the store's folder, by which `prune` takes it.
        kind: latents, captions, conditions, solutions or manifests.
        model: the model whose encoders were used.
        detail: task, dtype.
        rows: encoded samples; files for manifests.
        size: bytes on disk.
        unused_days: days since a run used it.
        folder: its path.
    """

    name: str
    kind: str
    model: str
    detail: str
    rows: int
    size: int
    unused_days: float
    folder: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion cache``."""
    parser.add_argument("action", choices=("ls", "check", "prune"), help="list, check all checksums, or remove")
    parser.add_argument("names", nargs="*", metavar="NAME", help="prune: remove these, by the names that ls prints")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="prune: remove what no run used for DAYS days")
    parser.add_argument("--all", action="store_true", help="prune: remove everything")
    parser.add_argument("--dry-run", action="store_true", help="prune: say what would be removed, and remove nothing")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="the cache (default: as data.cache of a recipe)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List, check or prune the cache. Return 1 where the check found damage."""
    from .stores import cache_root

    root = cache_root(args.cache)
    if args.action == "check":
        return _check(root, as_json=args.json)
    found = entries(root)
    if args.action == "ls":
        _print(root, found, as_json=args.json)
        return 0
    chosen = _chosen(found, args)
    for entry in chosen:
        if not args.dry_run:
            shutil.rmtree(entry.folder)
    verb = "would be removed" if args.dry_run else "removed"
    _print(root, chosen, as_json=args.json, title=f"{verb}: {len(chosen)} of {len(found)}")
    return 0


def entries(root: Path) -> list[Entry]:
    """Return what the cache holds, the most recently used first."""
    from .store import ABOUT, FORMAT
    from .stores import KINDS, MANIFESTS

    found: list[Entry] = []
    for kind in KINDS:
        for folder in sorted((root / kind).glob("*")) if (root / kind).is_dir() else []:
            try:
                about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
                used = (folder / ABOUT).stat().st_mtime
            except (OSError, ValueError):
                continue  # not a folder of ours
            if about.get("format") != FORMAT:
                continue
            detail = ", ".join(str(about[key]) for key in ("task", "dtype") if key in about)
            files = sorted(folder.glob("*.safetensors"))
            rows = sum(_rows(path) for path in files)
            found.append(_entry(folder, kind, about.get("model", "?"), detail, rows, files, used))
    manifests = sorted((root / MANIFESTS).rglob("*.safetensors"))
    if manifests:
        used = max(path.stat().st_mtime for path in manifests)
        found.append(_entry(root / MANIFESTS, MANIFESTS, "", "lists of samples", len(manifests), manifests, used))
    return sorted(found, key=lambda entry: entry.unused_days)


def _entry(folder: Path, kind: str, model: str, detail: str, rows: int, files: list[Path], used: float) -> Entry:
    size = sum(path.stat().st_size for path in files)
    return Entry(folder.name[:8], kind, model, detail, rows, size, max(0.0, (time.time() - used) / DAY), str(folder))


def _rows(path: Path) -> int:
    """Return the rows of a file, 0 for a damaged one."""
    from safetensors import SafetensorError, safe_open

    from .store import KEYS

    try:
        with safe_open(path, "pt") as file:
            return int(file.get_slice(KEYS).get_shape()[0])
    except (SafetensorError, OSError):
        return 0


def _chosen(found: list[Entry], args: argparse.Namespace) -> list[Entry]:
    """Return the entries to remove.

    Raises:
        UserError: nothing was chosen, or a name is unknown.
    """
    if not (args.names or args.all or args.older_than is not None):
        raise UserError("cache prune: say what to remove: names that `cache ls` prints, --older-than DAYS, or --all")
    known = {entry.name for entry in found}
    if unknown := sorted(set(args.names) - known):
        raise UserError(f"cache prune: there is no {', '.join(unknown)}; known names: {', '.join(sorted(known))}")
    old = float("inf") if args.older_than is None else args.older_than
    return [entry for entry in found if args.all or entry.name in args.names or entry.unused_days > old]


def _check(root: Path, *, as_json: bool) -> int:
    """Check the checksum of every row; remove damaged files. Return 1 where there was damage."""
    from .store import Store, check_file

    damaged = []
    for entry in entries(root):
        if entry.kind == "manifests":
            continue  # checked whenever one is read
        for path in sorted(Path(entry.folder).glob("*.safetensors")):
            problem = check_file(Store(Path(entry.folder)), path)
            if problem:
                damaged.append({"file": str(path), "problem": problem})
    if as_json:
        print_json({"damaged": damaged})
    else:
        _say(*(f"damaged and removed: {one['file']} ({one['problem']})" for one in damaged))
        _say(f"{root}: {len(damaged)} damaged files; their samples are encoded again by the next run that needs them")
    return 1 if damaged else 0


def _print(root: Path, found: list[Entry], *, as_json: bool, title: str = "") -> None:
    from ...progress import size_in_words

    if as_json:
        print_json({"cache": str(root), "entries": [asdict(entry) for entry in found]})
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    total = size_in_words(sum(entry.size for entry in found))
    table = Table("name", "kind", "model", "", box=box.SIMPLE, title=title or None)
    for heading in ("rows", "size", "days unused"):
        table.add_column(heading, justify="right")
    for entry in found:
        size, days = size_in_words(entry.size), f"{entry.unused_days:.1f}"
        table.add_row(entry.name, entry.kind, entry.model, entry.detail, str(entry.rows), size, days)
    console = Console()
    if found:
        console.print(table)
    console.print(f"{root}: {len(found)} entries, {total}", highlight=False, soft_wrap=True)


def print_json(content: object) -> None:
    """Print JSON to standard output."""
    _say(json.dumps(content, indent=2))


def _say(*lines: str) -> None:
    import sys

    sys.stdout.writelines(f"{line}\n" for line in lines)
