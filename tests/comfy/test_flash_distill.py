"""Flash Distill and Flash Save LoRA in the real ComfyUI: the student learns, the MODEL stays, a stopped run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from flash_diffusion.flash_core.families import FAMILIES as ALL_FAMILIES

from ..families.networks import POOLED_WIDTH, SD3_POOLED_WIDTH, TEXT_WIDTH, tiny_network
from . import prompts
from .inside_comfyui import run_inside

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

FAMILIES = ("sd15", "sdxl", "pixart_sigma", "sd3", "flux")
# In ComfyUI's own classes: a LoRA with ComfyUI's names, with diffusers' names, and latents with a dimension of frames.
NATIVE = ("z_image", "chroma", "qwen_image")
POOLED = {"sdxl": POOLED_WIDTH, "sd3": SD3_POOLED_WIDTH, "flux": SD3_POOLED_WIDTH}
PROMPTS, TOKENS = 2, 6
# The families of text to image that the trainer has a teacher of.
FAMILY_TABLE = [family for family in ALL_FAMILIES if family.recipe and family.key != "sd_x4"]


def write_families(folder: Path, families: Sequence[str]) -> None:
    """Write a tiny network of each family, and conditions for it."""
    generator = torch.Generator().manual_seed(5)
    for family in families:
        network = tiny_network(family)
        # See networks.py: PixArt's position embeddings agree on these sizes only.
        size = (40, 48) if family.startswith("pixart") else (8, 8)
        channels = 16 if family == "flux" else network.config.in_channels
        given = {
            "z0": torch.zeros(1, channels, *size),
            "tokens": torch.randn(PROMPTS, TOKENS, TEXT_WIDTH, generator=generator),
            "empty": torch.randn(1, TOKENS, TEXT_WIDTH, generator=generator),
        }
        if family in POOLED:
            given["pooled_output"] = torch.randn(PROMPTS, POOLED[family], generator=generator)
        save_file(network.state_dict(), folder / f"{family}.safetensors")
        save_file(given, folder / f"{family}.given.safetensors")
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))


@pytest.fixture(scope="module")
def facts(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the script in ComfyUI's process and return its facts."""
    folder = tmp_path_factory.mktemp("flash_distill")
    write_families(folder, FAMILIES)
    return json.loads(run_inside(runtime, "flash_distill.py", folder, "demo", *FAMILIES, *NATIVE).splitlines()[-1])


def figures(text: str) -> dict[int, tuple[float, float]]:
    """Return {steps: (before, after)}, the distances of the report's table."""
    rows = re.findall(r"\| (\d) \| ([\d.]+) \| ([\d.]+) \|", text)
    return {int(steps): (float(before), float(after)) for steps, before, after in rows}


# -- settings ----------------------------------------------------------------------------------------------------------

PRESETS = prompts.ROOT / "trainer" / "recipes" / "presets"


def test_numbers_by_size_and_family_are_those_of_the_trainers_preset_best(facts) -> None:
    best, node = yaml.safe_load((PRESETS / "best.yaml").read_text(encoding="utf-8")), facts["settings"]
    for name, field in (
        ("LEARNING_RATES", "optimizer.lr"),
        ("DISCRIMINATOR_RATES", "optimizer.discriminator_lr"),
        ("RANKS", "lora.rank"),
        ("AT_ONCE", "batch_size"),
    ):
        of_best = {float(size): value for size, value in best["by_size"][field].items()}
        of_node = dict(map(tuple, node[name]))
        if name in ("LEARNING_RATES", "RANKS"):  # the node's short runs take others for small models
            del of_best[min(of_best)], of_node[min(of_node)]
        assert of_node == of_best
    common = best["common"]
    for family in FAMILY_TABLE:
        own = best["families"].get(family.recipe, {})
        method = common["method"] | own.get("method", {})
        guidance, steps, targets = node["families"][family.key]
        assert [guidance, guidance] == method["guidance"]
        assert steps == method["teacher_steps"]
        assert targets == own.get("lora", {}).get("targets", common["lora"]["targets"])


def test_the_critic_learns_as_in_the_trainers_preset_tdm(facts) -> None:
    tdm, node = yaml.safe_load((PRESETS / "tdm.yaml").read_text(encoding="utf-8")), facts["settings"]
    rates = {float(size): rate for size, rate in tdm["by_size"]["optimizer.critic_lr"].items()}
    assert dict(map(tuple, node["DISCRIMINATOR_RATES"])) == rates
    assert node["critic's warm-up"] == tdm["common"]["method"]["critic"]["warmup"]


def test_rates_between_two_sizes_lie_on_a_line_in_their_logarithms(facts) -> None:
    smallest, small, middle, large, largest = facts["settings"]["rates"]
    assert smallest == small == pytest.approx(4e-3)
    assert large == pytest.approx(1e-4)
    assert largest == pytest.approx(5e-5)
    # 6.6e7 is the geometric mean of 5e6 and 8.6e8, so its rate is that of 4e-3 and 1e-4.
    assert middle == pytest.approx((4e-3 * 1e-4) ** 0.5, rel=0.02)


# -- the demo ----------------------------------------------------------------------------------------------------------


def test_a_short_run_brings_the_student_nearer_to_the_teacher_on_new_noise(facts) -> None:
    found = figures(facts["demo"]["text"])
    assert set(found) == {1, 2, 4}
    for steps in (1, 2):
        before, after = found[steps]
        assert after < 0.8 * before, f"{steps} steps: {before} to {after}"
    assert facts["demo"]["picture"][3] == 3


def test_the_model_keeps_its_bits_after_success_and_failure(facts) -> None:
    demo = facts["demo"]
    assert demo["unchanged"]
    assert demo["unchanged at the end"]
    assert demo["changes"] == [False, False, False]


def test_a_run_that_stopped_anywhere_ends_with_the_bits_of_one_that_did_not(facts) -> None:
    demo = facts["demo"]
    assert demo["stopped at"] == ["trajectories", "updates", "helpers"]
    assert demo["same bits"]
    assert demo["same state"]
    assert "6 updates of 4 samples" in demo["resumed"]
    assert "the last of them with the adversarial loss and distribution matching on the first step" in demo["resumed"]
    assert demo["helpers moved"] == [True, True]
    assert "resumed at update 4" in demo["resumed"]
    assert demo["finished run again"]


def test_the_folder_of_a_finished_run_holds_no_trajectories(facts) -> None:
    assert facts["demo"]["files"] == ["lora.safetensors", "state.safetensors"]


def test_each_seed_prompt_guidance_and_model_has_a_run_of_its_own(facts) -> None:
    assert facts["demo"]["runs"] == 5


def test_further_runs_hold_no_more_memory(facts) -> None:
    first, *others = facts["demo"]["bytes"]
    assert first > 1e7  # the demo's weights
    assert others == [first] * 3


def test_samples_can_start_at_latents(facts) -> None:
    assert "from your latents, 1 prompt, latents of 8 x 8" in facts["demo"]["latents"]


def test_a_damaged_state_raises_a_readable_error(facts) -> None:
    assert "state.safetensors is damaged" in facts["demo"]["damaged"]
    assert "Remove the folder" in facts["demo"]["damaged"]


# -- every family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *NATIVE])
def test_the_loss_falls_and_the_model_keeps_its_bits(facts, family: str) -> None:
    losses = facts[family]["losses"]
    third = len(losses) // 3
    assert sum(losses[-third:]) < 0.95 * sum(losses[:third])
    assert facts[family]["unchanged"]


@pytest.mark.parametrize("family", [*FAMILIES, *NATIVE])
def test_checkpointing_runs_blocks_again_and_changes_gradients_by_rounding_only(facts, family: str) -> None:
    found = facts[family]["checkpointed"]
    assert found["calls"] == [1, 2]
    assert found["difference"] < 1e-5


@pytest.mark.parametrize("family", ["demo", *FAMILIES, *NATIVE])
def test_the_saved_lora_loads_whole_everywhere(facts, family: str) -> None:
    found = facts[family]["loads"]
    assert f"matched: {found['layers']}/{found['layers']}" in found["report"]
    assert found["changed"] > 1e-3
    # Flash LoRA Loader, core's loader on the file, core's loader on the output.
    assert all(difference < 1e-3 for difference in found["differences"])
    first, second = found["saved"]
    assert second == first.replace(".safetensors", "_00001_.safetensors")
    assert found["same metadata"]


def test_the_metadata_sets_flash_sampler_up(facts) -> None:
    assert facts["demo"]["loads"]["metadata"] == ["flash-demo", "v_prediction", 0.5, [999, 749, 499, 249]]
    base, prediction, stochasticity, timesteps = facts["flux"]["loads"]["metadata"]
    assert (base, prediction, stochasticity, timesteps[0]) == ("flux", "flow", 0.5, 1000)
