"""Check the metrics beside a distance against brute force, scipy and values worked by hand; preference on stand-ins."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPModel

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.measures import confidence_intervals as bootstrap
from flash_diffusion.flash_core.measures import half_samples
from flash_diffusion.flash_core.measures.distances import frechet_distance
from flash_diffusion.flash_core.measures.half_samples import Halves
from flash_diffusion.flash_core.measures.precision_recall import precision_recall
from flash_diffusion.flash_core.measures.random_features import RandomFeatures
from flash_diffusion.flash_core.measures.sharpness import contrast, sharpness
from flash_diffusion.flash_core.measures.whitening import Whitening
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.metrics.clip_score import ClipScorer
from flash_diffusion.trainer.metrics.pictures.preference import load_preference
from flash_diffusion.trainer.metrics.pictures.teacher_states import TIMESTEP, TeacherStates
from flash_diffusion.trainer.pictures import picture_from_unit

from .paints import SHAPE, Paints
from .stand_ins import tiny_clip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- sets ------------------------------------------------------------------------------------------------------------


def test_precision_and_recall_by_hand() -> None:
    # On a line with k = 1. Balls of the teacher's 0, 1, 10, 12: radii 1, 1, 2, 2, so [-1, 2] and [8, 14].
    # Balls of the student's 0.5, 1.5, 5, 6: radii 1, 1, 1, 1, so [-0.5, 2.5] and [4, 7].
    ours, theirs = torch.tensor([[0.5], [1.5], [5.0], [6.0]]), torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    assert precision_recall(ours, theirs, 1) == (0.5, 0.5)
    assert precision_recall(ours, theirs.repeat(2, 1), 1) == (0.5, 0.5)  # of a larger reference as many as of the run
    with pytest.raises(ValueError, match="more than 3 pictures"):
        precision_recall(ours[:3], theirs)


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_precision_and_recall_are_brute_force(seed: int) -> None:
    ours, theirs = drawn(12, 2, seed=seed), drawn(12, 2, seed=seed + 1) + 0.5

    def covered(points: Tensor, centres: Tensor) -> float:
        radii = [sorted(math.dist(one, other) for other in centres.tolist())[3] for one in centres.tolist()]
        inside = [
            any(math.dist(point, centre) <= radius for centre, radius in zip(centres.tolist(), radii, strict=True))
            for point in points.tolist()
        ]
        return sum(inside) / len(inside)

    expected = covered(ours, theirs), covered(theirs, ours)
    assert precision_recall(ours, theirs) == pytest.approx(expected)


def test_distances_of_halves_are_scipys_on_the_same_rows() -> None:
    features, reference = drawn(20, 3), drawn(40, 3, seed=1) @ drawn(3, 3, seed=2) + 0.3
    halves = Halves(reference, 20)
    assert halves.rows.shape == (half_samples.HALVES, 10)
    for half in (0, 7):
        ours, theirs = features[halves.rows[half]], reference[halves.all_rows[half]]
        assert halves.all_rows[half].tolist() == [
            row + start for start in (0, 20) for row in halves.rows[half].tolist()
        ]
        covariances = [torch.cov(values.T).numpy() for values in (ours, theirs)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        shift = float((ours.mean(0) - theirs.mean(0)).square().sum())
        expected = shift + (covariances[0] + covariances[1] - 2 * root).trace()
        assert float(halves.distances(features)[half]) == pytest.approx(expected, rel=1e-6)


def test_interval_of_halves_has_the_spread_of_fresh_sets_and_no_bias() -> None:
    """Sixty fresh pairs of sets show how far chance moves the distance; one pair's halves say the same, to a third."""

    def pair(seed: int) -> tuple[Tensor, Tensor]:
        return drawn(200, 4, seed=2 * seed) + 0.4, drawn(400, 4, seed=2 * seed + 1)

    fresh = torch.tensor([frechet_distance(*pair(seed)) for seed in range(60)])
    reaches = []
    for seed in range(6):
        features, reference = pair(seed)
        value = frechet_distance(features, reference)
        found = half_samples.around(value, Halves(reference, 200).distances(features), 200)
        assert found.value == value
        assert found.low is not None
        assert found.high is not None
        assert found.high + found.low == pytest.approx(2 * value)
        reaches.append((found.high - found.low) / 2)
    assert sum(reaches) / 6 == pytest.approx(1.96 * float(fresh.std()), rel=0.33)


def test_ratio_of_a_set_to_itself_is_one_without_a_width() -> None:
    values = drawn(10).abs() + 1
    assert half_samples.ratio(2.0, values, 2.0, values, 10) == bootstrap.Estimate(1.0, 1.0, 1.0, 10)
    apart = half_samples.ratio(2.0, values, 1.0, drawn(10, seed=1).abs() + 1, 10)
    assert 0 < (apart.low or 0) < 2 < (apart.high or 0)


def test_share_has_wilsons_interval_and_ratio_of_means_its_own() -> None:
    # Wilson 1927, z = 1.96: 9 of 10 lie in .596 ... .982; of 10 of 10 the low end is 10 / (10 + z^2).
    found = bootstrap.share_of(9, 10)
    assert [found.value, found.low, found.high] == pytest.approx([0.9, 0.596, 0.982], abs=1e-3)
    assert bootstrap.share_of(10, 10).low == pytest.approx(10 / (10 + 1.96**2))
    assert bootstrap.share_of(10, 10).high == pytest.approx(1)
    values = drawn(40).abs() + 1
    assert bootstrap.ratio_of_means(3 * values, values) == bootstrap.Estimate(*[pytest.approx(3)] * 3, 40)


# -- features of pictures --------------------------------------------------------------------------------------------


def test_whitened_features_have_unit_covariance_and_the_largest_directions() -> None:
    features = drawn(100, 5) * torch.tensor([9.0, 3.0, 1.0, 0.5, 1e-6])
    white = Whitening.of(features)(features.float())
    assert white.shape == (100, 4)  # the fifth direction is rounding
    torch.testing.assert_close(torch.cov(white.T), torch.eye(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(Whitening.of(features, 2)(features.float()), white[:, :2])
    assert Whitening.of(torch.ones(8, 3))(torch.ones(8, 3)).abs().max() == 0  # a collapsed set is finite


def test_random_features_are_fixed_see_blur_and_take_any_size() -> None:
    pictures = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = RandomFeatures()
    torch.testing.assert_close(network(pictures), RandomFeatures()(pictures))
    torch.testing.assert_close(network(pictures)[1:2], network(pictures[1:2]))
    assert network(pictures).shape == (4, 16 + 32 + 64 + 128)
    # The first level by hand: 3 x 3 filters over the picture in [-1, 1], rectified, averaged.
    unfolded = torch.nn.functional.unfold(2 * pictures - 1, 3, padding=1)
    first = (network.kernels[0].flatten(1) @ unfolded).relu().mean(2)
    torch.testing.assert_close(network(pictures)[:, :16], first)
    blurred = torch.nn.functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    assert (network(blurred) - network(pictures)).norm(dim=1).min() > 1
    assert network(torch.rand(1, 3, 300, 20)).isfinite().all()
    assert network(torch.rand(1, 3, 2, 2)).isfinite().all()


def test_sharpness_and_contrast_by_hand() -> None:
    # Columns of 0 and 1 in turn: every step across is 1, none down; the deviation of 0 and 1 is 0.5 (N - 1: x 64 / 63).
    stripes = (torch.arange(8) % 2).float().expand(1, 3, 8, 8)
    assert float(sharpness(stripes)) == pytest.approx(1)
    assert float(contrast(stripes)) == pytest.approx(0.5 * (64 / 63) ** 0.5)
    red = stripes * torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1)
    assert float(sharpness(red)) == pytest.approx(0.299**2)
    assert float(sharpness(torch.ones(1, 3, 8, 8))) == float(contrast(torch.ones(1, 3, 8, 8))) == 0


def test_teacher_states_are_the_frozen_teachers_mean_maps_at_little_noise() -> None:
    model, latents = Paints(), drawn(3, *SHAPE).float()
    states = TeacherStates(model, model.unconditional)
    with model.role("student"):
        found = states(latents)
        assert model.current == "student"  # the role is given back
    t = model.process.uniform_timestep(torch.tensor([TIMESTEP]))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    z_t = model.process.add_noise(latents[1:2], noise[None], t)
    with model.role("teacher"):
        maps = model.features(z_t, t, Conditioning())
    torch.testing.assert_close(found[1], torch.cat([each.mean((2, 3)) for each in maps], 1)[0])
    torch.testing.assert_close(states(latents[1:2])[0], found[1])


# -- preference ------------------------------------------------------------------------------------------------------

PROMPTS = ["red ball", "green box"]


def pictures() -> Tensor:
    return torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(3))


def test_folder_of_a_clip_scores_by_its_cosine_and_a_pickscore_by_its_logits(tmp_path: Path) -> None:
    plain, pick = tiny_clip(tmp_path / "tiny-clip"), tiny_clip(tmp_path / "PickScore_v1")
    cosines = ClipScorer.load(str(plain), "cpu")([picture_from_unit(picture) for picture in pictures()], PROMPTS)
    clip, pickscore = load_preference(plain, "cpu"), load_preference(pick, "cpu")
    torch.testing.assert_close(clip(pictures(), PROMPTS), cosines)
    scale = float(CLIPModel.from_pretrained(pick).logit_scale.detach().exp())
    torch.testing.assert_close(pickscore(pictures(), PROMPTS), scale * cosines)
    assert (clip.title, pickscore.title) == ("CLIP score (tiny-clip)", "PickScore (PickScore_v1)")


class TwoTowers(torch.nn.Module):
    """HPSv2's network in small: features of unit length of pictures and of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        seen, read = image.mean((2, 3)) @ self.weight.T, torch.stack([text.float().sum(1), torch.ones(len(text))], 1)
        normal = torch.nn.functional.normalize
        return {"image_features": normal(seen, dim=1), "text_features": normal(read, dim=1)}


def hpsv2_library() -> dict[str, ModuleType]:
    """The modules of hpsv2 1.2 with the functions that its ``score`` calls."""
    scoring: Any = ModuleType("hpsv2.img_score")
    scoring.model_dict = {}

    def initialize_model() -> None:
        scoring.model_dict |= {
            "model": TwoTowers(),
            "preprocess_val": lambda picture: torch.ones(3, 4, 4) * picture.width,
        }

    scoring.initialize_model = initialize_model
    scoring.get_tokenizer = lambda name: lambda texts: torch.tensor([[len(text), 1] for text in texts])
    package: Any = ModuleType("hpsv2")
    package.img_score = scoring
    return {"hpsv2": package, "hpsv2.img_score": scoring}


def test_hpsv2_is_used_through_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": {"weight": torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])}}, path)
    for name, module in hpsv2_library().items():
        monkeypatch.setitem(sys.modules, name, module)
    model = load_preference(path, "cpu")
    # Pictures look like (1, 1) / sqrt 2; texts of 8 and 9 letters like (9, 1) and (10, 1).
    expected = [(9 + 1) / (82 * 2) ** 0.5, (10 + 1) / (101 * 2) ** 0.5]
    assert model(pictures(), PROMPTS).tolist() == pytest.approx(expected)
    assert model.title == "HPSv2 (HPS_v2.1_compressed.pt)"
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"does not hold HPSv2's weights"):
        load_preference(path, "cpu")


def test_image_reward_is_used_through_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ImageReward.pt"
    path.write_bytes(b"weights")
    library: Any = ModuleType("ImageReward")

    def load(name: str, device: str, download_root: str | None = None, med_config: str | None = None) -> Any:
        assert (Path(name), device, med_config) == (path, "cpu", str(tmp_path / "med_config.json"))
        return SimpleNamespace(score=lambda prompt, image: len(prompt) + image.width / 100)

    library.load = load
    monkeypatch.setitem(sys.modules, "ImageReward", library)
    with pytest.raises(UserError, match=r"med_config.json is missing"):
        load_preference(path, "cpu")
    (tmp_path / "med_config.json").write_text("{}")
    assert load_preference(path, "cpu")(pictures(), PROMPTS).tolist() == pytest.approx([8.32, 9.32])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.pt", "there is nothing at"),
        ("other.pt", "names no model that is known here"),
        ("HPS_v2.pt", "needs the library hpsv2"),
        ("folder", "can't be loaded"),
    ],
)
def test_preference_that_is_no_model_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hpsv2", None)
    monkeypatch.setitem(sys.modules, "hpsv2.img_score", None)
    (tmp_path / "folder").mkdir()
    for file in ("other.pt", "HPS_v2.pt"):
        (tmp_path / file).write_bytes(b"0")
    with pytest.raises(UserError, match=rf"--preference: .*{message}"):
        load_preference(tmp_path / name, "cpu")
