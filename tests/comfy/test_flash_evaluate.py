"""The figures of Flash Evaluate against numpy, scipy and values worked by hand; the node runs in the server's test."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file

from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

PICTURES, FEATURES = 64, 40


@pytest.fixture(scope="module")
def sets() -> dict[str, torch.Tensor]:
    """Two sets of one distribution, whose features depend on each other."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(FEATURES, FEATURES, generator=generator)
    return {name: torch.randn(PICTURES, FEATURES, generator=generator) @ mixing for name in ("twin", "other")}


@pytest.fixture(scope="module")
def found(runtime: ModuleType, sets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    given = tmp_path_factory.mktemp("flash_evaluate") / "given.safetensors"
    save_file(sets, given)
    return json.loads(run_inside(runtime, "flash_evaluate.py", given).splitlines()[-1])


def frechet(one: np.ndarray, two: np.ndarray) -> float:
    """Return the squared Fréchet distance by its formula."""
    means, covariances = [part.mean(0) for part in (one, two)], [np.cov(part.T) for part in (one, two)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def test_the_distance_is_frechets_in_the_largest_directions_over_the_floor(found, sets) -> None:
    assert found["directions"] == PICTURES // 4
    twin, other = (sets[name].double().numpy() for name in ("twin", "other"))
    values, vectors = np.linalg.eigh(np.cov(other.T))
    largest = vectors[:, -PICTURES // 4 :] / np.sqrt(values[-PICTURES // 4 :])
    far = twin + 3 * twin.std(0, ddof=1)
    floor = frechet(twin @ largest, other @ largest)
    assert found["far"]["distance"]["value"] == pytest.approx(frechet(far @ largest, other @ largest) / floor, rel=1e-3)
    assert found["twin"]["distance"]["value"] == pytest.approx(1)


def test_the_teachers_own_pictures_have_the_figures_of_a_perfect_run(found) -> None:
    twin = found["twin"]
    assert twin["likeness"] == pytest.approx(0, abs=1e-6)
    assert twin["diversity"] == pytest.approx(1)
    assert (twin["sharpness"]["value"], twin["contrast"]["value"]) == (1, 1)
    assert found["other"]["likeness"] == pytest.approx(1)


def test_pictures_half_as_far_from_their_mean_have_half_the_diversity(found) -> None:
    assert found["half"]["diversity"] == pytest.approx(0.5, rel=1e-5)
    assert found["half"]["sharpness"]["value"] == found["half"]["contrast"]["value"] == 0.5


def test_only_a_clear_difference_has_an_interval_on_one_side_of_0(found) -> None:
    nearer = found["nearer"]
    assert nearer["twin than far"]["low"] > 0
    assert nearer["far than twin"]["high"] < 0
    assert nearer["twin than twin"]["low"] <= 0 <= nearer["twin than twin"]["high"]
