"""A table of every node and a user's mistakes: each mistake gives a readable error or the right result.

The types of a node's inputs decide which mistakes must be tried. So a new node or input fails here until the table has
its rows. Most rows are tried in one process with ComfyUI (``inside/bad_inputs.py``); the others name another test.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..families.networks import tiny_network
from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

TESTS = Path(__file__).resolve().parent
TOLERANCE = 1e-3

# A kind of mistake, and the inputs (by type or by name) of which one is enough that a node must be tried with it.
KINDS = {
    "mask of another size": {"MASK", "LATENT"},  # a latent may bring a noise mask
    "empty mask": {"MASK", "LATENT"},
    "batch mismatch": {"IMAGE", "MASK", "LATENT"},
    "RGBA": {"IMAGE"},
    "one pixel": {"IMAGE", "LATENT"},
    "huge": {"IMAGE"},
    "NaN": {"IMAGE", "MASK", "LATENT"},
    "no prompts": {"CONDITIONING"},
    "wrong model family": {"MODEL"},
    "VAE of another model": {"VAE"},
    "adapter of another base": {"lora_name", "flash_lora", "adapter_name"},
    "video latent": {"LATENT"},
    "latent of another model": {"LATENT"},
    "denoise 0": {"denoise"},
    "stochasticity 2": {"stochasticity"},
}


@dataclass(frozen=True)
class Elsewhere:
    """Another test tries the mistake: ``file.py`` or ``file.py::test``."""

    test: str


@dataclass(frozen=True)
class Moot:
    """The mistake cannot happen."""

    why: str


RIGHT: list[str] = []  # no refusal: the obvious right result
NO_NUMBERS = ["NaN or infinite values", "--fp32-vae"]
NO_PROMPT = ["'positive' holds no prompt", "Connect a CLIP Text Encode"]
NO_NEGATIVE = ["'negative' holds no prompt"]
OTHER_TEXT = ["encoded for another model", "768 wide", "the Flash demo (attn2 reads 128 channels)", "the CLIP that"]
NO_CHANNELS = ["reads 33 channels beside its latent", "brings none", "Flash Concat Conditioning"]
OTHER_VAE = ["This VAE makes latents of", "Connect the VAE that belongs to the model"]
OTHER_LATENT = ["latent has 4 channels; the model works on 16", "VAE that belongs"]
VIDEO = ["latent has 5 dimensions; expected 4", "Empty Latent Image"]
NO_DENOISE = ["denoise is 0; expected a number above 0", "bypass"]
NO_RGB = ["(1, 128, 128, 1)", "RGB or RGBA"]
STOCHASTICITY = ["stochasticity is 2; expected auto", "a number from 0", "to 1"]
SECOND_FLASH = ["two Flash LoRAs", "(already in the model) and flash_demo.safetensors", "remove its loader"]
OTHER_BASE = ["does not fit", "It is for the Flash demo", "the model is SD 1.5"]

Row = list[str] | Elsewhere | Moot
TABLE: dict[str, dict[str, Row]] = {
    "FlashSampler": {
        "mask of another size": RIGHT,
        "empty mask": RIGHT,
        "batch mismatch": RIGHT,
        "one pixel": RIGHT,
        "NaN": NO_NUMBERS,
        "NaN: mask": NO_NUMBERS,
        "no prompts": NO_PROMPT,
        "no prompts: negative": NO_NEGATIVE,
        "wrong model family": ["encoded for another model", "128 wide", "SD 1.5 (attn2 reads 32 channels)"],
        "wrong model family: further channels": NO_CHANNELS,
        "wrong model family: channels of another size": ["for a latent of 8 x 8", "this latent is 16 x 16"],
        "video latent": VIDEO,
        "latent of another model": OTHER_LATENT,
        "latent of another model: empty": RIGHT,
        "denoise 0": NO_DENOISE,
        "stochasticity 2": STOCHASTICITY,
    },
    "FlashScheduler": {
        "wrong model family": Elsewhere(
            "test_sampling_families.py::test_a_wrong_model_or_grid_raises_a_readable_error"
        ),
        "denoise 0": NO_DENOISE,
    },
    "FlashSamplerSelect": {"stochasticity 2": STOCHASTICITY},
    "FlashLoraLoader": {
        "wrong model family": OTHER_BASE,
        "a second Flash LoRA": SECOND_FLASH,
        "adapter of another base": Elsewhere("test_nodes.py::test_a_lora_for_another_model_raises_an_error_with_names"),
    },
    "FlashLoraStack": {
        "a second Flash LoRA": SECOND_FLASH,
        "wrong model family": OTHER_BASE,
        "adapter of another base": Elsewhere(
            "test_lora_stack.py::test_a_lora_for_another_base_raises_an_error_with_file_and_architectures"
        ),
    },
    "FlashCompare": {
        "mask of another size": Elsewhere("test_compare.py::test_every_size_and_mask_works"),
        "empty mask": RIGHT,
        "batch mismatch": RIGHT,
        "one pixel": RIGHT,
        "NaN": NO_NUMBERS,
        "no prompts": NO_PROMPT,
        "wrong model family": OTHER_TEXT,
        "wrong model family: further channels": NO_CHANNELS,
        "wrong model family: of two": Elsewhere("test_compare.py::test_models_of_different_families_raise_an_error"),
        "VAE of another model": Elsewhere("test_compare.py::test_wrong_input_raises_a_readable_error"),
        "video latent": Elsewhere("test_compare.py::test_wrong_input_raises_a_readable_error"),
        "latent of another model": Elsewhere("test_compare.py::test_wrong_input_raises_a_readable_error"),
    },
    "FlashInpaintPrepare": {
        "mask of another size": Elsewhere("test_inpaint.py::test_a_smaller_mask_of_the_same_shape_fits"),
        "mask of another size: shape": Elsewhere("test_inpaint.py::test_wrong_input_raises_a_readable_error"),
        "empty mask": Elsewhere("test_inpaint.py::test_wrong_input_raises_a_readable_error"),
        "batch mismatch": Elsewhere("test_inpaint.py::test_wrong_input_raises_a_readable_error"),
        "RGBA": Elsewhere("test_inpaint.py::test_an_alpha_channel_is_kept"),
        "one pixel": Elsewhere("test_inpaint.py::test_every_picture_size_works"),
        "huge": RIGHT,
        "NaN": NO_NUMBERS,
        "NaN: mask": NO_NUMBERS,
        "no prompts": NO_PROMPT,
        "no prompts: negative": NO_NEGATIVE,
        "wrong model family": OTHER_TEXT,
        "VAE of another model": OTHER_VAE,
        "one channel": NO_RGB,
    },
    "FlashInpaintStitch": {
        "mask of another size": ["The mask is", "the shapes differ"],
        "empty mask": Elsewhere("test_inpaint.py::test_another_mask_at_the_stitch"),
        "NaN: mask": NO_NUMBERS,
        "batch mismatch": Elsewhere("test_inpaint.py::test_wrong_input_raises_a_readable_error"),
        "RGBA": RIGHT,
        "one pixel": RIGHT,
        "huge": RIGHT,
        "NaN": NO_NUMBERS,
    },
    "FlashConcatConditioning": {
        "mask of another size": RIGHT,
        "mask of another size: shape": ["mask is 128 x 64", "128 x 128 pixels", "Crop or pad"],
        "empty mask": RIGHT,
        "batch mismatch": Elsewhere("test_concat.py::test_wrong_channels_raise_a_readable_error"),
        "RGBA": RIGHT,
        "one pixel": RIGHT,
        "huge": RIGHT,
        "NaN": NO_NUMBERS,
        "NaN: mask": NO_NUMBERS,
        "NaN: latent": NO_NUMBERS,
        "no prompts": NO_PROMPT,
        "wrong model family": Elsewhere("test_concat.py::test_wrong_channels_raise_a_readable_error"),
        "VAE of another model": OTHER_VAE,
        "video latent": VIDEO,
        "latent of another model": OTHER_LATENT,
    },
    "FlashUpscale": {
        "batch mismatch": Elsewhere("test_upscale.py::test_pictures_of_a_batch_are_enlarged_one_by_one"),
        "RGBA": Elsewhere("test_upscale.py::test_an_alpha_channel_is_enlarged_too"),
        "one pixel": Elsewhere("test_upscale.py::test_every_picture_size_works"),
        "huge": Elsewhere("test_upscale.py::test_wrong_channels_and_sizes_raise_a_readable_error"),
        "NaN": NO_NUMBERS,
        "no prompts": NO_PROMPT,
        "no prompts: negative": NO_NEGATIVE,
        "wrong model family": OTHER_TEXT,
        "VAE of another model": Elsewhere("test_upscale.py::test_wrong_input_raises_a_readable_error"),
        "denoise 0": NO_DENOISE,
        "one channel": NO_RGB,
    },
    "FlashAdapterApply": {
        "batch mismatch": Elsewhere("test_adapters.py::test_two_ways_give_the_same_latent"),
        "RGBA": Elsewhere("test_adapters.py::test_two_ways_give_the_same_latent"),
        "one pixel": Elsewhere("test_adapters.py::test_two_ways_give_the_same_latent"),
        "huge": Elsewhere("test_adapters.py::test_two_ways_give_the_same_latent"),
        "NaN": Elsewhere("test_adapters.py::test_wrong_input_raises_a_readable_error"),
        "no prompts": Moot("an empty list stays one, which Flash Sampler refuses"),
        "wrong model family": Elsewhere("test_adapters.py::test_wrong_input_raises_a_readable_error"),
        "adapter of another base": Elsewhere(
            "test_adapters.py::test_a_published_adapter_for_another_model_raises_an_error_with_both_names"
        ),
        "VAE of another model": Moot("only ControlNets that read latents look at it, in ComfyUI, while sampling"),
        "denoise 0": Elsewhere("test_adapters.py::test_wrong_input_raises_a_readable_error"),
    },
    "FlashDistill": {
        "mask of another size": Moot("a latent's noise mask is not used"),
        "empty mask": Moot("a latent's noise mask is not used"),
        "batch mismatch": ["2 prompts for 3 latents", "1 prompt for all, or one for each latent"],
        "one pixel": RIGHT,
        "NaN": NO_NUMBERS,
        "no prompts": NO_PROMPT,
        "no prompts: negative": NO_NEGATIVE,
        "no prompts: text": ["There is no prompt", "one a line"],
        "no prompts: no CLIP": ["No CLIP is connected", "both 'positive' and 'negative'"],
        "wrong model family": OTHER_TEXT,
        "wrong model family: further channels": NO_CHANNELS,
        "a second Flash LoRA": ["two Flash LoRAs", "(already in the model)"],
        "VAE of another model": OTHER_VAE,
        "video latent": VIDEO,
        "latent of another model": OTHER_LATENT,
        "teacher_steps 6": ["teacher_steps is 6; expected a multiple of 4", "Choose 8, or 0"],
        "an area in a prompt": ["has area, which cannot be distilled", "Connect the text encoder directly"],
    },
    "FlashSaveLora": {
        "LoRA of another node": ["not of Flash Distill", "Save LoRA Weights"],
        "a name that leads out": ["The name is '../lora'", "stays in models/loras", "mine/my_flash"],
        "a name that is a path": ["The name is '/tmp/lora'"],
        "an empty name": ["The name is ''"],
    },
    "FlashEvaluate": {
        "no prompts": NO_PROMPT,
        "no prompts: text": ["There is no prompt", "one a line"],
        "too few pictures": ["1 prompt with 4 pictures each are 4 pictures a run; expected 8", "raise per_prompt"],
        "wrong model family": ["of different families", "Flash LoRA Loader"],
        "wrong model family: text": OTHER_TEXT,
        "wrong model family: further channels": NO_CHANNELS,
        "VAE of another model": OTHER_VAE,
        "9 steps": ["flash_steps lists '9'", "1 to 8"],
    },
    "FlashDemoModels": {},
    "FlashDistillRuns": {},
}
# Nodes whose own test has such a table for all of its inputs.
OWN_TABLE = {"FlashFaceSwapPrepare": "test_face_swap.py", "FlashDistillHeadless": "test_headless_inputs.py"}
HERE = [(node, kind) for node, rows in TABLE.items() for kind, row in rows.items() if isinstance(row, list)]


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the script in ComfyUI's process and return its results."""
    folder = tmp_path_factory.mktemp("bad_inputs")
    network = tiny_network("sd15")
    save_file(network.state_dict(), folder / "sd15.safetensors")
    (folder / "sd15.json").write_text(json.dumps(dict(network.config)))
    run_inside(runtime, "bad_inputs.py", folder)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    return json.loads((folder / "said.json").read_text())


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "results")


@pytest.mark.parametrize(("node", "kind"), HERE)
def test_a_mistake_gives_a_readable_error_or_the_right_result(
    said: dict[str, str], results: dict[str, Tensor], node: str, kind: str
) -> None:
    name, words = f"{node}, {kind}", TABLE[node][kind]
    if words:
        assert name in said, "no error was raised"
        for part in words:
            assert part in said[name]
        return
    assert name in results, said.get(name, "the mistake was not tried")
    assert bool(torch.isfinite(results[name]).all())
    expected = results.get(f"{name}, expected")
    if expected is not None:
        assert torch.allclose(results[name], expected, atol=TOLERANCE)


def test_a_huge_picture_is_sampled_at_the_models_size(results: dict[str, Tensor]) -> None:
    assert results["FlashInpaintPrepare, huge"].shape == (1, 128, 128, 3)
    assert results["FlashInpaintStitch, huge"].shape == (1, 128, 128, 3)
    assert results["FlashConcatConditioning, huge"].shape == (1, 17, 16, 16)


def test_every_node_has_a_row_for_every_mistake_that_its_inputs_allow(folder: Path) -> None:
    schemas = json.loads((folder / "schemas.json").read_text())
    assert set(TABLE) | set(OWN_TABLE) == set(schemas)
    missing = []
    for node, rows in TABLE.items():
        inputs = {*schemas[node], *schemas[node].values()}
        kinds = {kind for kind, needed in KINDS.items() if inputs & needed}
        missing += [f"{node}: {kind}" for kind in sorted(kinds - set(rows))]
    assert not missing


def test_rows_of_other_files_name_existing_tests(folder: Path) -> None:
    tests = [row.test for rows in TABLE.values() for row in rows.values() if isinstance(row, Elsewhere)]
    for test in [*tests, *OWN_TABLE.values()]:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name or 'test_'}", (TESTS / file).read_text(), re.M), f"there is no {test}"


def test_every_tried_mistake_is_in_the_table(said: dict[str, str], results: dict[str, Tensor]) -> None:
    tried = {*said, *(name for name in results if not name.endswith(", expected"))}
    assert tried == {f"{node}, {kind}" for node, kind in HERE}
