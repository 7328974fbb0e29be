"""The overlap of two LoRAs, against values worked by hand and against the full matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_diffusion.flash_core.lora import LoraModule, flat_name
from flash_diffusion.flash_core.lora.overlap import (
    SIZE_LIMIT,
    common_names,
    cosine,
    norm,
    overlap,
    suggested_strength,
)


def layer(up: list[list[float]], down: list[list[float]], alpha: float | None = None) -> LoraModule:
    return LoraModule("layer", torch.tensor(down), torch.tensor(up), alpha)


def random_layer(
    generator: torch.Generator, rank: int, shape: tuple[int, ...] = (12, 9), dtype: torch.dtype = torch.float32
) -> LoraModule:
    kernel = shape[2:]
    down = torch.randn(rank, *shape[1:], generator=generator, dtype=torch.float64).to(dtype)
    up = torch.randn(shape[0], rank, *(1 for _ in kernel), generator=generator, dtype=torch.float64).to(dtype)
    return LoraModule("layer", down, up, 2.0)


def dense(module: LoraModule) -> Tensor:
    """(out, in kh kw)."""
    return module.up.double().flatten(1) @ module.down.double().flatten(1) * module.scale


# Updates that write to the first output and read the first input; alpha / rank doubles it.
FIRST = layer([[2.0], [0.0]], [[1.0, 0.0, 0.0]], alpha=2.0)


@pytest.mark.parametrize(
    ("second", "size", "expected_cosine", "inside"),
    [
        (FIRST, 1.0, 1.0, 1.0),
        (layer([[-1.0], [0.0]], [[1.0, 0.0, 0.0]]), 0.25, -1.0, 1.0),
        # another output: no overlap
        (layer([[0.0], [5.0]], [[1.0, 0.0, 0.0]]), 1.25, 0.0, 0.0),
        # the same output, from an input that the first does not read
        (layer([[3.0], [0.0]], [[0.0, 1.0, 0.0]]), 0.75, 0.0, 0.0),
        # 3 e1 f1 + 4 e1 f2: 3 of it, of a norm of 5, lie in the first one's direction
        (layer([[1.0], [0.0]], [[3.0, 4.0, 0.0]]), 1.25, 0.6, 0.6),
    ],
)
def test_worked_values(second: LoraModule, size: float, expected_cosine: float, inside: float) -> None:
    met = overlap({"a": FIRST}, {"a": second, "b": FIRST})
    assert met.first == pytest.approx(4.0)
    assert met.size == pytest.approx(size)
    assert met.cosine == pytest.approx(expected_cosine)
    assert met.inside == pytest.approx(inside)
    assert met.others == 1
    assert met.largest == "a"


def test_directions_meet_even_where_the_cosine_is_zero() -> None:
    """diag(1, 1) and diag(1, -1): orthogonal, and yet the second one lies whole in the first one's directions."""
    one = layer([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    other = layer([[1.0, 0.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]])
    met = overlap({"a": one}, {"a": other}, second_strength=0.5)
    assert met.cosine == pytest.approx(0.0, abs=1e-7)
    assert met.inside == pytest.approx(1.0)
    assert met.size == pytest.approx(0.5)


def test_layers_add_up_by_their_squares() -> None:
    weak = layer([[0.1], [0.0]], [[1.0, 0.0, 0.0]])
    met = overlap({"a": FIRST, "b": weak}, {"a": weak, "b": FIRST})
    assert met.size == pytest.approx(1.0)  # sqrt(.1^2 + 4^2) of sqrt(4^2 + .1^2)
    assert met.largest == "b"


def test_overlap_with_a_zero_update_is_0() -> None:
    """A layer whose up is still zero, as training starts."""
    untrained = layer([[0.0], [0.0]], [[1.0, 2.0, 3.0]])
    for one, other in ((untrained, untrained), (FIRST, untrained), (untrained, FIRST)):
        met = overlap({"a": one}, {"a": other})
        assert (met.size, met.inside, met.cosine) == (0.0, 0.0, 0.0)
    assert cosine({"a": FIRST}, {"a": untrained}) == 0.0


def test_without_shared_layers() -> None:
    met = overlap({"a": FIRST}, {"b": FIRST})
    assert (met.first, met.size, met.cosine, met.inside, met.largest, met.others) == (0.0, 0.0, 0.0, 0.0, None, 1)
    assert cosine({"a": FIRST}, {"b": FIRST}) == 0.0


def test_layers_of_another_shape_are_not_shared() -> None:
    assert not overlap({"a": FIRST}, {"a": layer([[1.0]], [[1.0]])}).layers


@given(
    seed=st.integers(0, 1000),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 12)),
    strengths=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3) | st.floats(-3, -0.1)),
    shape=st.sampled_from([(12, 9), (5, 4, 3, 3), (8, 8, 1, 1)]),
)
def test_overlap_of_factors_equals_overlap_of_full_matrices(
    seed: int, ranks: tuple[int, int], strengths: tuple[float, float], shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (random_layer(generator, rank, shape) for rank in ranks)
    first, second = (dense(module) * s for module, s in zip((one, other), strengths, strict=True))
    found = overlap({"a": one}, {"a": other}, *strengths).layers["a"]
    # Projections by the pseudo-inverse of the full matrices.
    inverse = torch.linalg.pinv(first)
    inside = torch.linalg.matrix_norm((first @ inverse) @ second @ (inverse @ first))
    size = float(torch.linalg.matrix_norm(first) * torch.linalg.matrix_norm(second))
    assert found.first == pytest.approx(float(torch.linalg.matrix_norm(first)), rel=1e-4)
    assert found.second == pytest.approx(float(torch.linalg.matrix_norm(second)), rel=1e-4)
    assert found.inner == pytest.approx(float((first * second).sum()), rel=1e-4, abs=1e-5 * size)
    assert found.inside == pytest.approx(float(inside), rel=1e-3, abs=1e-6)
    assert abs(found.inner) / found.first <= found.inside * (1 + 1e-4) + 1e-5
    assert found.inside <= found.second * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(dtype: torch.dtype, generator: torch.Generator) -> None:
    modules = {"a": random_layer(generator, 4, dtype=dtype)}
    assert cosine(modules, modules) == pytest.approx(1.0)
    assert norm(modules) == pytest.approx(float(torch.linalg.matrix_norm(dense(modules["a"]))), rel=1e-3)


def test_a_rank_beyond_the_update_counts_its_true_directions(generator: torch.Generator) -> None:
    """Twice the same column: the true rank is 1, although the file's rank is 2."""
    one = layer([[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    elsewhere = layer([[0.0], [1.0]], [[0.0, 1.0, 0.0]])
    assert overlap({"a": one}, {"a": elsewhere}).inside == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("strength", "size", "expected"),
    [(1.0, 0.2, 1.0), (1.0, SIZE_LIMIT, 1.0), (1.0, 2.0, 0.5), (0.8, 3.0, 0.26), (-1.0, 2.0, -0.5)],
)
def test_the_suggested_strength_keeps_within_the_limit(strength: float, size: float, expected: float) -> None:
    assert suggested_strength(strength, size) == pytest.approx(expected)


def test_after_the_suggestion_the_size_is_within_the_limit(generator: torch.Generator) -> None:
    flash, style = {"a": random_layer(generator, 3)}, {"a": random_layer(generator, 8)}
    before = overlap(flash, style, second_strength=10.0).size
    assert before > SIZE_LIMIT
    after = overlap(flash, style, second_strength=suggested_strength(10.0, before)).size
    assert SIZE_LIMIT * 0.97 < after <= SIZE_LIMIT


def test_overlap_matches_layers_of_different_dialects(generator: torch.Generator) -> None:
    """The first cross-attention of a UNet by Stable Diffusion's own name and by diffusers'."""
    module = random_layer(generator, 2)
    native = "input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    one = common_names({native: LoraModule(native, module.down, module.up)})
    other = common_names({flat_name(path): LoraModule(path, module.down, module.up)})
    assert overlap(one, other).cosine == pytest.approx(1.0)
    odd = {"some_network_of_its_own": module}
    assert common_names(odd) == odd
