"""``flash-diffusion lora``: show, convert, merge and resize LoRA files of any dialect.

Outputs are overwritten only with ``--force``; inputs never. ``--json`` prints only the result.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import __version__
from ..flash_core.lora import (
    DIALECTS,
    PEFT_WEIGHTS,
    Dialect,
    LoraError,
    LoraFile,
    LoraModule,
    Truncation,
    base_of,
    describe_base,
    is_transformer,
    merge,
    read_lora,
    report_on,
    resize,
    with_diffusers_names,
    write_lora,
)
from ..flash_core.presets import recognise
from .errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Header fields that describe a file's keys; they would be wrong for other keys.
KEY_FACTS = ("format", "lora_adapter_metadata")
DERIVED = "flash.derived"
WEIGHT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flash-diffusion lora``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=summary, description=summary[:1].upper() + summary[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print only the result, as JSON")
        return sub

    def writing(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--to",
            choices=DIALECTS,
            default="portable",
            help="form of the output (default: portable, which ComfyUI and diffusers load)",
        )
        sub.add_argument("--dtype", choices=DTYPES, help="type of the stored numbers (default: as in the input)")
        sub.add_argument("--alpha", type=float, help="alpha of inputs without alpha (default: the rank, so scale 1)")
        sub.add_argument("--no-text-encoder", action="store_true", help="drop the text encoders' layers")
        sub.add_argument("--force", action="store_true", help="replace an existing output")

    info = action("info", "show the content of a LoRA file")
    info.add_argument("file", type=Path, help="a .safetensors file or a PEFT folder")
    convert = action("convert", "write a LoRA in another dialect")
    convert.add_argument("input", type=Path, metavar="IN")
    convert.add_argument("output", type=Path, metavar="OUT", help="a .safetensors file; a folder for --to peft")
    writing(convert)
    merging = action("merge", "write the weighted sum of LoRAs of one base")
    merging.add_argument("inputs", nargs="+", metavar="FILE[:WEIGHT]", help="a LoRA and its weight (default: 1)")
    merging.add_argument("output", type=Path, metavar="OUT")
    merging.add_argument(
        "--rank", type=int, help="cut the sum to this rank (default: the sum of the ranks, which is exact)"
    )
    writing(merging)
    resizing = action("resize", "write the nearest LoRA of a lower rank")
    resizing.add_argument("input", type=Path, metavar="IN")
    resizing.add_argument("output", type=Path, metavar="OUT")
    resizing.add_argument("--rank", type=int, required=True)
    writing(resizing)


def run(args: argparse.Namespace) -> int:
    """Run the action and print the result."""
    result, text = ACTIONS[args.action](args)
    if args.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        Console().print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def show(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run ``info``."""
    file = read_lora(args.file)
    report, recognised = report_on(file), None
    if file.metadata is None:
        recognised = recognise(str(args.file.resolve()), file.header, base_of(file))
    if recognised is not None:
        report = replace(report, sampling=recognised.advice())
    preset = None if recognised is None else {"name": recognised.name, "how": recognised.how}
    return {"file": str(args.file), **report.as_json(), "preset": preset}, report.text()


def convert_file(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run ``convert``."""
    ensure_new(args, [args.input])
    file = read(args.input, args)
    modules, text_encoder = layers(file, args)
    write(args, modules, text_encoder, file, f"converted from {file.dialect} keys")
    return written(args, modules, text_encoder, {"from": file.dialect, "notes": list(file.notes)})


def resize_file(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run ``resize``."""
    ensure_new(args, [args.input])
    file = read(args.input, args)
    modules, text_encoder = layers(file, args)
    cut = shrunk({**modules, **text_encoder}, args.rank)
    modules, text_encoder = ({name: cut.modules[name] for name in part} for part in (modules, text_encoder))
    write(args, modules, text_encoder, file, f"resized to rank {args.rank}, relative error {cut.error:.4g}")
    facts: dict[str, Any] = {"notes": list(file.notes), **losses(cut)}
    return written(args, modules, text_encoder, facts)


def merge_files(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run ``merge``."""
    inputs = [split_weight(text) for text in args.inputs]
    ensure_new(args, [path for path, _ in inputs])
    files = [(read(path, args), weight) for path, weight in inputs]
    same_base(files, [path for path, _ in inputs])
    named = [(layers(file, args), weight) for file, weight in files]
    try:
        modules = merge([(denoiser, weight) for (denoiser, _), weight in named])
        text_encoder = merge([(text, weight) for (_, text), weight in named])
    except ValueError as error:
        raise LoraError(str(error)) from error
    facts: dict[str, Any] = {
        "inputs": [{"file": str(path), "weight": weight} for path, weight in inputs],
        "notes": [
            f"{path.name}: {note}" for (file, _), (path, _) in zip(files, inputs, strict=True) for note in file.notes
        ],
    }
    terms = " + ".join(f"{weight:g} x {path.name}" for path, weight in inputs)
    if args.rank is not None:
        cut = shrunk({**modules, **text_encoder}, args.rank)
        modules, text_encoder = ({name: cut.modules[name] for name in part} for part in (modules, text_encoder))
        facts |= losses(cut)
        terms += f", cut to rank {args.rank}, relative error {cut.error:.4g}"
    if args.dtype is None:  # sums are computed in float32; stored as the files were
        args.dtype = commonest_dtype([file for file, _ in files])
    flash = next((file for file, _ in files if file.metadata is not None), files[0][0])
    write(args, modules, text_encoder, flash, f"merged: {terms}")
    return written(args, modules, text_encoder, facts)


ACTIONS = {"info": show, "convert": convert_file, "merge": merge_files, "resize": resize_file}


def split_weight(text: str) -> tuple[Path, float]:
    """Split ``FILE:WEIGHT``; the weight is 1 for ``FILE``. A colon in the name of an existing file is kept."""
    path, _, weight = text.rpartition(":")
    if path and WEIGHT.fullmatch(weight) and not Path(text).exists():
        return Path(path), float(weight)
    return Path(text), 1.0


def ensure_new(args: argparse.Namespace, inputs: Sequence[Path]) -> None:
    """Check the output before any work.

    Raises:
        UserError: the output is an input, exists without ``--force``, or is a folder where a file is written.
    """
    output: Path = args.output
    target = output / PEFT_WEIGHTS if args.to == "peft" else output
    sources = [path / PEFT_WEIGHTS if path.is_dir() else path for path in inputs]
    if any(path.exists() and target.exists() and path.samefile(target) for path in sources):
        raise UserError(f"{output} is an input, and inputs are never overwritten; choose another name")
    if output.exists() and not args.force:
        raise UserError(f"{output} exists; choose another name, or pass --force to replace it")
    if output.exists() and output.is_dir() != (args.to == "peft"):
        kind, wanted = ("folder", "file") if output.is_dir() else ("file", "folder")
        raise UserError(f"{output} is a {kind}, but --to {args.to} writes a {wanted}; choose another name")


def layers(file: LoraFile, args: argparse.Namespace) -> tuple[dict[str, LoraModule], dict[str, LoraModule]]:
    """Return the denoiser's layers by diffusers' paths, and the text encoders' layers to write.

    Raises:
        LoraError: a layer does not exist in diffusers' networks, or keys would be lost.
    """
    if file.unknown:
        raise LoraError(
            f"{len(file.unknown)} keys are not plain LoRA layers, e.g. {file.unknown[0]!r}, and would be lost. Use the "
            "file unchanged"
        )
    try:
        modules = with_diffusers_names(file.modules)
    except ValueError as error:
        raise LoraError(f"{error}. Use the file unchanged") from error
    return modules, {} if args.no_text_encoder else dict(file.text_encoder)


def read(path: Path, args: argparse.Namespace) -> LoraFile:
    """Read a file and set its alpha.

    Raises:
        UserError: ``--alpha`` for a file with an alpha, or not finite.
    """
    file = read_lora(path)
    if file.alpha_source != "unknown":
        if args.alpha is not None:
            raise UserError(f"{path} has its own alpha; --alpha is for files without alpha, so remove it")
        return file
    if args.alpha is not None and not math.isfinite(args.alpha):
        raise UserError(f"--alpha must be a finite number, not {args.alpha}")
    if args.alpha is None:
        return replace(file, notes=(*file.notes, "it has no alpha: scale 1 is used; see --alpha"))
    modules = {name: replace(module, alpha=args.alpha) for name, module in file.modules.items()}
    text_encoder = {name: replace(module, alpha=args.alpha) for name, module in file.text_encoder.items()}
    note = f"it has no alpha: {args.alpha:g} was given"
    return replace(file, modules=modules, text_encoder=text_encoder, notes=(*file.notes, note))


def losses(cut: Truncation) -> dict[str, Any]:
    """Return the errors of cutting ranks, for the result."""
    return {"relative_error": cut.error, "worst_layer": cut.worst, "worst_error": cut.worst_error}


def shrunk(modules: Mapping[str, LoraModule], rank: int) -> Truncation:
    """:func:`~..flash_core.lora.resize`, with an error in words."""
    try:
        return resize(modules, rank)
    except ValueError as error:
        raise UserError(f"--rank: {error}") from error


def same_base(files: Sequence[tuple[LoraFile, float]], paths: Sequence[Path]) -> None:
    """Check that all files are for one base, by their metadata or layers.

    Raises:
        LoraError: files for different bases.
    """
    (first, _), first_path = files[0], paths[0]
    for (file, _), path in zip(files[1:], paths[1:], strict=True):
        known = base_of(first), base_of(file)
        if (None not in known and known[0] != known[1]) or is_transformer(first.modules) != is_transformer(
            file.modules
        ):
            raise LoraError(
                f"{first_path.name} is for {describe_base(first)}, {path.name} for {describe_base(file)}; "
                "only LoRAs for the same base can be merged"
            )


def commonest_dtype(files: Sequence[LoraFile]) -> str | None:
    """Return the name of the files' type; None if the types differ."""
    found = {module.down.dtype for file in files for module in file.modules.values()}
    names = [name for name, dtype in DTYPES.items() if found == {dtype}]
    return names[0] if names else None


def write(
    args: argparse.Namespace,
    modules: Mapping[str, LoraModule],
    text_encoder: Mapping[str, LoraModule],
    source: LoraFile,
    derived: str,
) -> None:
    """Write a file with the source's header and a line on its derivation."""
    header = {name: value for name, value in source.header.items() if name not in KEY_FACTS}
    history = [line for line in header.get(DERIVED, "").splitlines() if line]
    remarks = "".join(f"; {note}" for note in source.notes)
    header[DERIVED] = "\n".join([*history, f"{derived}{remarks} (flash-diffusion {__version__})"])
    dialect: Dialect = args.to
    try:
        write_lora(
            args.output,
            modules,
            source.metadata,
            transformer=is_transformer(source.modules),
            dtype=None if args.dtype is None else DTYPES[args.dtype],
            dialect=dialect,
            text_encoder=text_encoder,
            header=header,
        )
    except OSError as error:
        raise UserError(f"{args.output} can't be written: {error}") from error


def written(
    args: argparse.Namespace,
    modules: Mapping[str, LoraModule],
    text_encoder: Mapping[str, LoraModule],
    facts: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """Return the result for ``--json`` and the text for the terminal."""
    ranks = sorted({module.rank for module in modules.values()})
    result = {
        "file": str(args.output),
        "dialect": args.to,
        "layers": len(modules),
        "text_encoder_layers": len(text_encoder),
        "ranks": ranks,
        **facts,
    }
    lines = [f"{args.output}: {len(modules)} layers, rank {', '.join(map(str, ranks))}, {args.to}"]
    if text_encoder:
        lines.append(f"and {len(text_encoder)} text encoder layers")
    lines += [f"note: {note}" for note in facts["notes"]]
    if "relative_error" in facts:
        lines.append(
            f"relative error {facts['relative_error']:.4g}; the worst layer, {facts['worst_layer']}, "
            f"{facts['worst_error']:.4g}"
        )
    return result, "\n".join(lines)
