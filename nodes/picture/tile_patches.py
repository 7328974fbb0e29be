"""Refuse patches on a MODEL that keep values of one evaluation for the next: tiles would get each other's values.

Caches of steps count evaluations. In tiles they would count each tile as a step, and give one tile the values of
another tile. A patch of whole steps, such as ComfyUI's LazyCache, sees the blended latent: it works in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

# Where a wrapper sees a single tile.
TILE_WRAPPERS = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
CACHE = "cache"  # in the names of all caches of steps: EasyCache, TeaCache, FBCache, DeepCache
# The module of ComfyUI's Self-Attention Guidance. After each step it reads the attention that it last saw: a tile's.
ATTENTION_GUIDANCE = "nodes_sag"


def check_tileable(model: ModelPatcher) -> None:
    """Raise ValueError where a patch on the model would mix the tiles of a picture."""
    cache = next((name for name in tile_patches(model) if CACHE in name.lower()), None)
    if cache is not None:
        raise ValueError(
            f"A cache of steps ({cache}) is on this model. In tiles it would count each tile as a step, and give one "
            "tile the values of another. Remove this node (few steps leave a cache little to save), use LazyCache, or "
            "raise tile_size until the picture is one tile."
        )
    guidance = model.model_options.get("sampler_post_cfg_function", [])
    if any(ATTENTION_GUIDANCE in str(getattr(function, "__module__", "")) for function in guidance):
        raise ValueError(
            "Self-Attention Guidance is on this model. In tiles it would blur the whole picture by the attention of "
            "the last tile. Remove this node, or raise tile_size until the picture is one tile."
        )


def tile_patches(model: ModelPatcher) -> Iterator[str]:
    """List the names of the patches that see a single tile: wrappers by their keys, a function by its module."""
    attached: dict[str, Any] = model.model_options.get("transformer_options", {}).get("wrappers", {})
    for kind in TILE_WRAPPERS:
        yield from model.wrappers.get(kind, {})
        yield from attached.get(kind, {})
    function = model.model_options.get("model_function_wrapper")
    if function is not None:
        kind = function if hasattr(function, "__qualname__") else type(function)
        yield f"{kind.__module__}.{kind.__qualname__}"
