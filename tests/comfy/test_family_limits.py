"""What each family's model can take: every size in Flash Upscale; other mistakes give an error in words.

Tiny networks of the true architectures in ComfyUI's process (``inside/family_limits.py``).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..families.networks import POOLED_WIDTH, SD3_POOLED_WIDTH, TEXT_WIDTH, tiny_network
from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

FAMILIES = ("sd15", "sd21", "sdxl", "pixart_alpha", "pixart_sigma", "sd3", "sd35", "flux")
SIXTEEN_CHANNELS = ("sd3", "sd35", "flux")
POOLED = {"sdxl": POOLED_WIDTH, "sd3": SD3_POOLED_WIDTH, "sd35": SD3_POOLED_WIDTH, "flux": SD3_POOLED_WIDTH}
SIZES = (((600, 616), 320), ((152, 408), 64), ((1, 200), 128), ((96, 472), 512), ((40, 24), 0))
PATCH = 8


def make_given(family: str) -> dict[str, Tensor]:
    """Make two prompts and a picture's latent."""
    generator = torch.Generator().manual_seed(9)
    size = (40, 48) if family.startswith("pixart") else (16, 24)
    given = {
        "positive": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "negative": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "picture": torch.randn(1, 16 if family in SIXTEEN_CHANNELS else 4, *size, generator=generator),
    }
    for prompt in ("positive", "negative") if family in POOLED else ():
        given[f"{prompt}.pooled"] = torch.randn(1, POOLED[family], generator=generator)
    return given


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the networks, run the script in ComfyUI's process, and return the folder with its results."""
    folder = tmp_path_factory.mktemp("family_limits")
    for family in FAMILIES:
        network = tiny_network(family)
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(weights, folder / f"{family}.safetensors")
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
        save_file(make_given(family), folder / f"{family}.given.safetensors")
    run_inside(runtime, "family_limits.py", folder, *FAMILIES)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "results")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    return json.loads((folder / "said.json").read_text())


def expected_picture(height: int, width: int) -> Tensor:
    """Return the script's picture through its stand-in VAE, written out: sigmoid(2 m - 1) of each patch's mean m."""
    y, x = torch.arange(height)[:, None] / 90, torch.arange(width)[None, :] / 70
    picture = torch.stack([0.5 + 0.4 * torch.sin(x + 2 * y), 0.5 + 0.4 * torch.cos(y - x), (x + y).sin() ** 2])
    below, beside = -height % PATCH, -width % PATCH
    filled = torch.nn.functional.pad(picture[None], (0, beside, 0, below), mode="replicate")
    means = torch.nn.functional.avg_pool2d(filled, PATCH).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    return torch.sigmoid(2 * means - 1)[..., :height, :width].movedim(1, -1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "tile"), SIZES)
def test_upscale_takes_every_size_of_picture_and_tile(
    results: dict[str, Tensor], said: dict[str, str], family: str, size: tuple[int, int], tile: int
) -> None:
    """A model that keeps its input gives the picture back; the family's own network gives a finite one."""
    for kind in ("keep", "upscale"):
        assert f"{family}, {kind} {size} in {tile}" not in said
    kept, drawn = (results[f"{family}, {kind} {size} in {tile}"] for kind in ("keep", "upscale"))
    assert kept.shape == drawn.shape == (1, *size, 3)
    assert bool(drawn.isfinite().all())
    assert torch.allclose(kept, expected_picture(*size), atol=1e-3)  # a flow model's level is 0.001 of the way to noise


LIMITS = {
    "pixart": {"48 x 49": "multiples of 16 pixels", "1 x 90": "height + width of 528 pixels or more"},
    "sd3": {"64 x 50": "sides of 384 pixels or less", "1 x 90": "sides of 384 pixels or less"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["64 x 50", "48 x 49", "1 x 90"])
def test_sampler_names_the_sizes_that_a_model_cannot_take(
    results: dict[str, Tensor], said: dict[str, str], family: str, size: str
) -> None:
    kind = "sd3" if family == "sd35" else family.split("_")[0]
    words = LIMITS.get(kind, {}).get(size, "384 pixels or less" if kind == "sd3" else "")
    name = f"{family}, sample {size}"
    if words:
        height, width = (int(side) * PATCH for side in size.split(" x "))
        assert f"{width} x {height} pixels" in said[name]
        assert words in said[name]
        assert "Choose such a size" in said[name]
    else:
        assert bool(results[name].isfinite().all())


# The longer side / the shorter side of the training pictures: SDXL's report, appendix I; PixArt's table of ratios.
# SD 1.5 and SD 2 saw squares.
WIDEST = {"sd15": 2, "sd21": 2}
AREA = {"sd3": 128, "sd35": 128}  # of the script's other crops: 512 x 512 pixels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("picture", ["wide", "line"])
def test_inpainting_a_thin_line_crops_a_shape_that_the_model_knows(folder: Path, family: str, picture: str) -> None:
    """ "wide" has room for such a shape; "line" is 24 pixels high, so its border is repeated and cut off again."""
    facts = json.loads((folder / "facts.json").read_text())[f"{family}, {picture}"]
    height, width = facts["crop"]
    side, multiple = AREA.get(family, 512), 16 if family.startswith("sd3") else 64
    assert width - multiple <= WIDEST.get(family, 4) * height
    assert 0.7 * side**2 < height * width < 1.4 * side**2
    assert 0.005 < facts["mask"] < 0.5
    assert facts["changed"] > 0.95
    assert facts["outside"] == 0
    assert facts["back"] < 0.1  # the crop itself, resized and put back


def test_flux_fill_gets_the_masked_picture_and_other_flux_models_do_not(folder: Path) -> None:
    """ComfyUI would show Flux Fill an empty picture without them."""
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["flux Fill"] == ["concat_latent_image", "concat_mask"]
    assert facts["flux Canny"] == facts["flux dev"] == []


@pytest.mark.parametrize("family", ["sd3", "sd35"])
def test_inpaint_prepare_names_the_sizes_that_a_model_cannot_take(said: dict[str, str], family: str) -> None:
    assert "sides of 384 pixels or less" in said[f"{family}, inpaint, too large"]


CLIP = "Encode the prompt with the CLIP that belongs to the model"


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_another_model_raise_a_readable_error(said: dict[str, str], family: str) -> None:
    assert "text embeddings are 64 wide" in said[f"{family}, wide text"]
    assert CLIP in said[f"{family}, wide text"]
    if family in POOLED:
        assert "pooled embedding is 16 wide" in said[f"{family}, narrow pooled"]
        assert f"reads {POOLED[family]}." in said[f"{family}, narrow pooled"]
        assert "it has no pooled embedding" in said[f"{family}, no pooled"]


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_for_another_model_raise_a_readable_error(said: dict[str, str], family: str) -> None:
    for case in ("channels for an ordinary model", "channels for an ordinary model, upscaled"):
        assert "reads 0 channels beside its latent" in said[f"{family}, {case}"]
        assert "brings 5" in said[f"{family}, {case}"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["first", "last"])
def test_no_step_gives_the_latent_as_cores_sampler_does(results: dict[str, Tensor], family: str, split: str) -> None:
    """Both samplers get one noise level. A flow model's first one is 1, where core divides by zero in either."""
    ours, core = (results[f"{family}, no step, {split}, {sampler}"] for sampler in ("ours", "core"))
    assert torch.equal(ours.nan_to_num(), core.nan_to_num())
    assert split == "first" or torch.allclose(ours, make_given(family)["picture"], atol=1e-5)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("SAG", ["Self-Attention Guidance", "'negative' is not connected", "remove the patch"]),
        ("SAG, upscale", ["'negative' is not connected"]),
        ("SAG, compare", ["'negative' is not connected"]),
        ("SAG, tiles", ["attention of the last tile", "raise tile_size"]),
        ("EasyCache, tiles", ["easycache", "each tile as a step", "LazyCache"]),
        ("a cache of another pack, tiles", ["TeaCache", "each tile as a step"]),
    ],
)
def test_patches_that_cannot_work_raise_a_readable_error(said: dict[str, str], case: str, words: list[str]) -> None:
    for word in words:
        assert word in said[f"sd15, {case}"]


def test_patches_that_work_are_kept(folder: Path, results: dict[str, Tensor]) -> None:
    """LazyCache reuses whole steps, so it saves whole rounds of the four tiles."""
    assert not torch.allclose(results["sd15, SAG with a negative"], results["sd15, plain"], atol=1e-3)
    for case in ("SAG, one tile", "EasyCache, one tile", "LazyCache, tiles"):
        assert bool(results[f"sd15, {case}"].isfinite().all())
    calls = json.loads((folder / "facts.json").read_text())["LazyCache, tiles"]
    assert calls % 4 == 0
    assert calls < 4 * 4
