"""Read LoRA files. Only safetensors are read; pickles are refused."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .container import Container, LoraError, open_container
from .dialects import EMBEDDING, LoraKey, Part, parse_key
from .metadata import FlashMetadata
from .published import recognise, with_stock_names
from .settings import PEFT_CONFIG, PEFT_WEIGHTS, FileSettings, find_settings
from .weights import AlphaSource, Difference, LoraFile, LoraModule, flat_name

MAX_RANK = 8192  # far above any LoRA's: 1024 is large, and a full-rank file of SDXL has 1280

MAX_NAME = 160  # of a key that is shown to the user

_HALVES: tuple[Part, ...] = ("down", "up", "mid")


def read_lora(path: str | os.PathLike[str], *, mapped: bool = True) -> LoraFile:
    """Read a LoRA file, or a PEFT folder, at its true scale.

    alpha comes from the file's keys, else the file's header, else ``adapter_config.json`` beside the file, else the
    table of published files. Without any of them ``alpha_source`` is "unknown" and the scale is 1. Tensors are mapped;
    every byte is read once here, to check for NaN and infinity.

    Args:
        path: the file, or the folder that PEFT wrote.
        mapped: see :func:`~.container.open_container`.

    Raises:
        LoraError: no such file, not safetensors, no LoRA inside, another algorithm, incomplete or non-finite layers.
    """
    path = Path(path)
    if path.is_dir():
        path = path / PEFT_WEIGHTS
    container = open_container(path, mapped=mapped)
    grouped, whole, unknown, dialects = _group(path.name, container.shapes)
    if not grouped and whole:
        raise LoraError(
            f"{path.name} holds changes of whole weights (key {next(iter(whole))[:120]!r}) and no LoRA. Load it with "
            "ComfyUI's own loader, Load LoRA; or extract a LoRA with Extract and Save LoRA, type 'standard'"
        )
    if not grouped:
        example = next(iter(container.shapes), "nothing at all")
        raise LoraError(
            f"{path.name} holds no LoRA layers, but {len(container.shapes)} other tensors, e.g. {example[:80]!r}; "
            "expected pairs such as '<layer>.lora_down.weight' and '<layer>.lora_up.weight'. It may be a checkpoint, a "
            "VAE or an embedding. Choose a LoRA file"
        )
    settings = find_settings(path, container.header)
    try:
        metadata = FlashMetadata.from_header(container.header)
    except ValueError as error:
        raise LoraError(f"{path.name}: {error}") from error
    for layer in grouped.values():
        _check(path.name, layer, container.shapes)
    notes: tuple[str, ...] = ()
    ranks = {name: container.shapes[layer.keys["down"]][0] for name, layer in grouped.items() if not layer.text_encoder}
    if settings is not None and not settings.belong_to(ranks):
        settings, notes = None, (f"{PEFT_CONFIG} beside the file belongs to another adapter and is not used",)
    modules: dict[str, LoraModule] = {}
    text_encoder: dict[str, LoraModule] = {}
    sources: Counter[AlphaSource] = Counter()
    for name, layer in grouped.items():
        module, source = _module(container, layer, settings)
        if layer.text_encoder:
            text_encoder[name] = module
        else:
            modules[name] = module
            sources[source] += 1
    published = recognise(modules, container.header) if metadata is None else None
    if published is not None:
        metadata = published.metadata()
        if sources["unknown"]:
            modules = {name: replace(module, alpha=published.alpha) for name, module in modules.items()}
            sources = Counter({"published": len(modules)})
    alpha_source, untold = _alpha_source(sources)
    modules, renames = with_stock_names(modules)
    return LoraFile(
        modules=modules,
        text_encoder=text_encoder,
        differences=_differences(container, whole, grouped, text_encoder=False),
        text_encoder_differences=_differences(container, whole, grouped, text_encoder=True),
        unknown=tuple(key[:MAX_NAME] for key in unknown if not EMBEDDING.match(key)),
        embeddings=tuple(key[:MAX_NAME] for key in unknown if EMBEDDING.match(key)),
        dialect=dialects.most_common(1)[0][0],
        alpha_source=alpha_source,
        metadata=metadata,
        header=container.header,
        published=None if published is None else published.name,
        notes=(*notes, *renames, *untold, *_idle(modules)),
    )


def _alpha_source(sources: Counter[AlphaSource]) -> tuple[AlphaSource, tuple[str, ...]]:
    """Return the source of most alphas, and a note if some layers have an alpha and others have none."""
    told = [(source, count) for source, count in sources.most_common() if source != "unknown"]
    if not told:
        return "unknown", ()
    count = sources["unknown"]
    return told[0][0], ((f"{count} layers have no alpha: scale 1 is used for them",) if count else ())


def _idle(modules: Mapping[str, LoraModule]) -> tuple[str, ...]:
    count = sum(module.alpha == 0 for module in modules.values())
    return (f"alpha is 0 on {count} layers: these layers change nothing",) if count else ()


class _Layer:
    """The keys of one layer."""

    def __init__(self, path: str, text_encoder: bool) -> None:
        self.path = path
        self.text_encoder = text_encoder
        self.keys: dict[Part, str] = {}


def _group(name: str, keys: Iterable[str]) -> tuple[dict[str, _Layer], dict[str, LoraKey], list[str], Counter[str]]:
    """Return the file's layers by name, the keys of whole changes, all keys of no layer, and the dialects' counts."""
    layers: dict[str, _Layer] = {}
    whole: dict[str, LoraKey] = {}
    unknown: list[str] = []
    dialects: Counter[str] = Counter()
    for key in keys:
        parsed: LoraKey | None = parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        if parsed.part == "foreign":
            raise LoraError(
                f"{name} is a {parsed.algorithm} file (key {key[:120]!r}); only plain LoRA can be read. Load the "
                "file with ComfyUI's own LoRA loader, or ask its author for a LoRA"
            )
        if parsed.part in ("weight", "bias"):
            whole[key] = parsed
            unknown.append(key)
            continue
        dialects[parsed.dialect] += 1
        flat = flat_name(parsed.path)
        layer = layers.setdefault(flat, _Layer(parsed.path, parsed.text_encoder))
        if parsed.part in layer.keys:
            raise LoraError(
                f"{name} has two tensors for {parsed.part!r} of {parsed.path}, so it "
                "is ambiguous; download it again, or ask its author"
            )
        layer.keys[parsed.part] = key
        if "." in parsed.path:
            layer.path = parsed.path
    return layers, whole, unknown, dialects


def _differences(
    container: Container, whole: Mapping[str, LoraKey], grouped: Mapping[str, _Layer], *, text_encoder: bool
) -> tuple[Difference, ...]:
    """Return the changes of whole weights and biases of the denoiser, or of the text encoders.

    Raises:
        LoraError: a weight has a change beside its LoRA, or a change holds NaN or infinite values.
    """
    found = []
    name = container.path.name
    for key, parsed in whole.items():
        if parsed.text_encoder != text_encoder:
            continue
        if parsed.part == "weight" and flat_name(parsed.path) in grouped:
            raise LoraError(
                f"{name} has a LoRA and a change of the whole weight for {parsed.path}, so it is ambiguous; download "
                "it again, or ask its author"
            )
        values = container.tensor(key)
        if not values.is_floating_point() or not (text_encoder or all_finite(values)):
            raise LoraError(
                f"{name}: {key[:MAX_NAME]} holds NaN or infinite values ({values.dtype}). The training failed or the "
                "file is damaged: download it again"
            )
        found.append(Difference(key[:MAX_NAME], parsed.path, "bias" if parsed.part == "bias" else "weight", values))
    return tuple(found)


def _check(name: str, layer: _Layer, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise LoraError if a layer is incomplete or the shapes of its halves do not fit."""
    if "down" not in layer.keys or "up" not in layer.keys:
        has = ", ".join(sorted(layer.keys))
        raise LoraError(
            f"{name}: layer {layer.path} has only {has}; expected both halves, down and up. The "
            "file is incomplete: download it again"
        )
    down, up = shapes[layer.keys["down"]], shapes[layer.keys["up"]]
    fits = len(down) == len(up) and len(down) in (2, 4) and down[0] == up[1] and up[2:] in ((), (1, 1))
    if "mid" in layer.keys:  # a convolution taken apart further: 1x1, kernel, 1x1
        mid = shapes[layer.keys["mid"]]
        fits = fits and len(mid) == 4 and mid[:2] == (up[1], down[0]) and down[2:] == (1, 1)
    if not fits or 0 in down or 0 in up:
        raise LoraError(
            f"{name}: the halves of layer {layer.path} do not fit: down {down}, up {up}; "
            "expected (rank, in, ...) and (out, rank, ...)"
        )
    if down[0] > MAX_RANK:
        raise LoraError(
            f"{name}: layer {layer.path} has rank {down[0]:,}; the limit is {MAX_RANK:,}, far above "
            "any LoRA. The file is damaged: download it again"
        )
    if "alpha" in layer.keys and math.prod(shapes[layer.keys["alpha"]]) != 1:
        shape = shapes[layer.keys["alpha"]]
        raise LoraError(f"{name}: alpha of layer {layer.path} must be one finite number, but has the shape {shape}")


def _module(container: Container, layer: _Layer, settings: FileSettings | None) -> tuple[LoraModule, AlphaSource]:
    name = container.path.name
    halves = {part: container.tensor(layer.keys[part]) for part in _HALVES if part in layer.keys}
    for half in halves.values():
        # A text encoder's layers are not used: they are left unread.
        if not half.is_floating_point() or not (layer.text_encoder or all_finite(half)):
            raise LoraError(
                f"{name}: layer {layer.path} holds NaN or infinite values ({half.dtype}). The training "
                "failed or the file is damaged: download it again"
            )
    down, up = halves["down"], halves["up"]
    if "mid" in halves:
        mid = halves["mid"].float()
        down = torch.einsum("rskl,si->rikl", mid, down.float().flatten(1)).to(down.dtype)
    if "alpha" in layer.keys:
        alpha = container.number(layer.keys["alpha"])
        if alpha is None or not math.isfinite(alpha):
            raise LoraError(f"{name}: alpha of layer {layer.path} must be one finite number, but is {alpha}")
        return LoraModule(layer.path, down, up, alpha), "file"
    adapter = settings.of(layer.path) if settings is not None else None
    if settings is not None and adapter is not None:
        return LoraModule(
            layer.path, down, up, adapter.effective_alpha(layer.path, int(down.shape[0]))
        ), settings.source
    return LoraModule(layer.path, down, up, None), "unknown"


def all_finite(values: Tensor) -> bool:
    """Return whether all numbers are finite, without a copy: a sum with a NaN or an infinity is not finite.

    A sum of finite numbers may overflow too; then the minimum and the maximum decide.
    """
    if values.element_size() == 1:  # torch has no arithmetic in 8 bits
        values = values.to(torch.float16)  # exact for both formats
    if math.isfinite(float(values.sum())):
        return True
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))
