"""A rehearsal counts what a real update needs, and finds tensors on another device and waits for the device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.distiller import Distiller
from flash_diffusion.flash_core.families import FAMILIES as CORE_FAMILIES
from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.config import ModelSection, Recipe, parse_recipe
from flash_diffusion.trainer.distill.loop import Run
from flash_diffusion.trainer.distill.passes import update_passes
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.recipes import load_recipe
from flash_diffusion.trainer.rehearse import cost, report
from flash_diffusion.trainer.rehearse.cost import Way, cost_of, fits, ways_to_fit
from flash_diffusion.trainer.rehearse.floor import PassWork, floor_of
from flash_diffusion.trainer.rehearse.gpus import GPUS, gpu_of
from flash_diffusion.trainer.rehearse.meter import ACTIVATIONS, Meter
from flash_diffusion.trainer.rehearse.pretend.fakes import PRETEND_DEVICE
from flash_diffusion.trainer.rehearse.pretend.published import PUBLISHED, published_source
from flash_diffusion.trainer.rehearse.report import shares_above_floor, work_of
from flash_diffusion.trainer.rehearse.samples import PretendExamples
from flash_diffusion.trainer.rehearse.walk import Rehearsal, rehearse
from flash_diffusion.trainer.teachers import family, load_teacher

from ..families.adapters import tiny_controlnet, tiny_unet
from ..families.networks import tiny_network
from ..families.pipelines import save_pipeline
from .models import tiny_recipe

MOMENTS = {"encoding", "rollout", "student", "discriminator", "critic", "optimiser", "preview"}
NOISE = [1, 0, 0, 0]


def small(folder: Path, name: str = "sd15", **fields: Any) -> Recipe:
    """A recipe with every term, of a tiny model; its data are not there."""
    method = {"teacher_steps": 4, "guidance": [1.5, 3.0], "fake_score": "critic"}
    if name.startswith("sd3"):
        method["solver"] = "euler"
    content = tiny_recipe(folder, Path("nowhere"))
    content |= {"model": {"family": name, "path": str(folder)}, "method": method}
    content["phases"] = [{"name": "all", "updates": 3, "modes": NOISE, "adversarial": 0.3, "dmd": 0.7}]
    for section, values in fields.items():
        content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(content)


@pytest.fixture(scope="module")
def rehearsed(tiny_model: Path) -> Rehearsal:
    """The tiny Stable Diffusion 1.5, rehearsed once."""
    return rehearse(small(tiny_model, batch_size=4))


@pytest.fixture(scope="module")
def run(tiny_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with real weights and data, after one update."""
    recipe = small(tiny_model, batch_size=4, data={"path": str(pictures)})
    run = Run(recipe, tmp_path_factory.mktemp("run"), Accelerator(), None)
    run.updater.update(run.state, recipe.phases[0], 1.0)
    return run


def allocated(work: Callable[[], object], folder: Path) -> int:
    """Return by how many bytes the CPU's allocator has grown at most, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        most = max(most, total)
    return most


def test_peak_is_the_allocators(rehearsed: Rehearsal, run: Run, tmp_path: Path) -> None:
    """What an update takes beyond the parts that stay, against torch's profiler on real tensors."""
    phase = rehearsed.phases[0]
    growth = max(moment.peak for moment in phase.moments.values()) - sum(rehearsed.parts.values())
    real = allocated(lambda: run.updater.update(run.state, run.recipe.phases[0], 1.0), tmp_path)
    assert growth == pytest.approx(real, rel=0.1)


def test_parts_that_stay_are_the_real_ones(rehearsed: Rehearsal, run: Run) -> None:
    def size(tensors: Any) -> int:
        return sum(value.untyped_storage().nbytes() for value in tensors if isinstance(value, Tensor))

    trained = run.parts.trained
    states = [
        value for part in trained.optimizers.values() for state in part.state.values() for value in state.values()
    ]
    frozen = [value for name, value in run.parts.teacher.denoiser.network.named_parameters() if ".lora_" not in name]
    real = {
        "base": size(frozen),
        "LoRA": size(trained.parameters["student"].values()),
        "critic": size(trained.parameters["critic"].values()),
        "discriminator": size(trained.parameters["discriminator"].values()),
        "optimisers": size(states),
        "moving average": size(trained.average.values()),
        "VAE": size(run.parts.teacher.vae.parameters()),
    }
    assert {name: rehearsed.parts[name] for name in real} == real
    assert "text encoders" not in rehearsed.parts


def test_work_is_what_torch_counts(rehearsed: Rehearsal, run: Run) -> None:
    """The student's and the critic's steps, by torch's counter on real tensors."""
    recipe = run.recipe
    rollout = run.rollouts.batch(0, recipe.phases[0])
    generator = run.rollouts.generator
    moments = rehearsed.phases[0].moments
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as student:
        step = run.parts.distiller.student_step(rollout, recipe.phases[0].phase(), generator)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as critic:
        run.parts.distiller.critic_step(step.z_student, rollout.conditioning, generator)
    assert moments["student"].flops == pytest.approx(student.get_total_flops(), rel=0.02)
    assert moments["critic"].flops == pytest.approx(critic.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as solution, sdpa_kernel(SDPBackend.MATH):
        run.rollouts.batch(0, recipe.phases[0])
    share = solution.get_total_flops() / (rehearsed.pass_flops * 4 * 2)  # passes: of 4 samples, 2 branches
    assert 3 <= share <= 4.1  # of a grid of 4 steps, from its first or second


def test_passes_need_what_torch_counts(rehearsed: Rehearsal, tiny_model: Path) -> None:
    """Of the base without adapters: torch's counter, with attention that makes no scores again."""
    teacher, counted = load_teacher(ModelSection(family="sd15", path=str(tiny_model))), []
    z = torch.randn(1, *teacher.latent_shape).requires_grad_()
    asked = torch.tensor([500]), teacher.unconditional(1)
    for work in (
        lambda: teacher.denoiser.predict(z, *asked),
        lambda: teacher.denoiser.features(z, *asked),
        lambda: sum(value.sum() for value in teacher.denoiser.features(z, *asked)).backward(),
    ):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        counted.append(counter.get_total_flops())
    needed = rehearsed.needed
    assert [needed.forward, needed.features] == pytest.approx(counted[:2], rel=1e-6)
    assert needed.to_input == pytest.approx(counted[2], rel=0.01)  # fused attention makes the text's gradients too
    assert 2 * needed.forward < needed.student + needed.forward < 4 * needed.forward


def test_the_floor_of_an_update_by_hand(rehearsed: Rehearsal, tiny_model: Path) -> None:
    """4 steps with both branches; then student, adversarial loss, heads, DMD with both branches, critic; 4 samples."""
    recipe = small(tiny_model, batch_size=4)
    work = PassWork(forward=10, student=25, features=7, to_input=16)
    parts = {"base": 1000, "LoRA": 10, "critic": 10, "discriminator": 5, "optimisers": 40, "moving average": 10}
    found = floor_of(recipe, recipe.phases[0], work, {**parts, "VAE": 99})
    solution = update_passes(recipe, recipe.phases[0])["solutions"] / 4  # nearly 8: few samples start lower
    assert found.flops == pytest.approx(4 * (solution * 10 + 25 + 16 + 7 + 3 * 10 + 25))
    calls = solution / 2 + 2 + 2 + 0.5 + 1.5 + 2  # of the base, each with a batch: one branch fills half a call
    assert found.moved == pytest.approx(calls * 1000 + 4 * 25 + 2 * 50)
    flops, _, floor = work_of(rehearsed)
    assert 1 + sum(shares_above_floor(rehearsed).values()) == pytest.approx(flops / floor.flops)
    assert flops > floor.flops


def test_parts_in_half_precision_and_in_4_bits(rehearsed: Rehearsal, tiny_model: Path) -> None:
    """Adapters stay float32 on any base; what is stored, offloaded or recomputed is told by its own part."""
    fields: dict[str, Any] = {"model": {"dtype": "bfloat16", "storage": "nf4"}, "precision": "bf16"}
    fields |= {"optimizer": {"bits": 8}, "memory": {"offload": True}, "gradient_checkpointing": True}
    recipe = small(tiny_model, **fields, batch_size=4)
    made = rehearse(recipe)
    loaded = load_teacher(recipe.model).denoiser.network
    assert made.parts["base"] == sum(value.nbytes for value in [*loaded.parameters(), *loaded.buffers()])
    assert made.parts["base"] < rehearsed.parts["base"] / 2
    assert [made.parts[name] for name in ("LoRA", "moving average")] == [
        rehearsed.parts[name] for name in ("LoRA", "moving average")
    ]
    assert made.parts["optimisers"] < rehearsed.parts["optimisers"]
    step, plain = (one.moments["student"].parts for one in (made, rehearsed))
    assert step["VAE"] == 0 < plain["VAE"]
    assert step[ACTIVATIONS] < plain[ACTIVATIONS]
    again = "recomputed for checkpointing"
    assert shares_above_floor(rehearsed)[again] == 0 < shares_above_floor(made)[again] < 1


def test_encoding_holds_one_group_of_parts_at_a_time(rehearsed: Rehearsal) -> None:
    parts = {name: size for name, size in rehearsed.moments["encoding"].parts.items() if size}
    assert set(parts) in ({"text encoders", ACTIVATIONS}, {"VAE", ACTIVATIONS})


def model_with(channels: int, name: str, folder: Path) -> Path:
    """Save a tiny model whose UNet reads so many channels."""
    config = {key: value for key, value in tiny_network(name).config.items() if not key.startswith("_")}
    return save_pipeline(name, folder, unet=UNet2DConditionModel(**config | {"in_channels": channels}))


# One family of each kind of network beside Stable Diffusion 1.5, which the walks below take.
@pytest.mark.parametrize("name", ["sdxl", "pixart_alpha", "sd35"])
def test_every_family_walks_without_a_forgotten_device_and_without_waits(tmp_path: Path, name: str) -> None:
    """Rollout, student, discriminator, critic, average and preview on a device in name only; SDXL with face-swap."""
    swaps = {"task": {"name": "face-swap", "options": {"identity": "channels"}}} if name == "sdxl" else {}
    model = model_with(13, name, tmp_path) if swaps else save_pipeline(name, tmp_path)
    made = rehearse(small(model, name, **swaps), PRETEND_DEVICE)
    assert set(made.moments) == MOMENTS
    assert made.waits == {}
    assert not made.published


def test_every_kind_of_start_and_term_walks_without_waits(tmp_path: Path) -> None:
    """With the conditions of super-resolution."""
    method = {
        "states": {"student": 0.5, "trajectory": 0.5},
        "discriminator": {"latents": True, "updates": 2},
        "dmd": {"rows": "first_step"},
        "adversarial": "relativistic",
        "adversarial_rows": "first_step",
        "critic": {"updates": 2, "memory": 4, "ida": 0.1},
    }
    task = {"name": "super-resolution", "options": {"scale": 4, "reads": "latent"}}
    recipe = small(model_with(8, "sd15", tmp_path), method=method, task=task)
    terms = {"feature_matching": 0.1, "intra_segment": 0.2, "first_step_distillation": 0.5}
    phase = recipe.phases[0].model_copy(update={"modes": (0.5, 0.0, 0.0, 0.5), **terms})
    made = rehearse(recipe.model_copy(update={"phases": [phase]}), PRETEND_DEVICE)
    assert set(made.moments) == MOMENTS
    assert made.waits == {}


def test_replayed_trajectories_and_a_control_are_rehearsed(tmp_path: Path) -> None:
    """On a base in 4 bits that waits elsewhere while previews are decoded."""
    model = save_pipeline("sd15", tmp_path / "model")
    tiny_controlnet(tiny_unet("sd15")).save_pretrained(tmp_path / "control")
    fields: dict[str, Any] = {"task": {"name": "control"}, "trajectories": {"count": 8, "batch": 3}}
    fields["model"] = {"storage": "nf4", "control": {"path": str(tmp_path / "control")}}
    made = rehearse(small(model, memory={"offload": True}, **fields), PRETEND_DEVICE)
    assert made.moments["recording"].flops > 0
    assert made.moments["rollout"].flops == 0  # its solutions are replayed
    assert made.waits == {}
    assert made.parts["control"] == sum(value.numel() * 4 for value in tiny_controlnet(tiny_unet("sd15")).parameters())


def test_a_condition_left_on_the_cpu_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = PretendExamples.batch

    def forgetful(self: PretendExamples, *args: Any, **kwargs: Any) -> tuple[Tensor, Conditioning]:
        z0, conditioning = batch(self, *args, **kwargs)
        return z0, conditioning.map(lambda value: torch.zeros(value.shape))

    monkeypatch.setattr(PretendExamples, "batch", forgetful)
    with pytest.raises(UserError, match=r"tensors of two devices, cpu and meta.* at \w+/.*\.py:\d+") as error:
        rehearse(small(tiny_model), PRETEND_DEVICE)
    assert "move" in str(error.value)


def test_a_wait_is_counted_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the conditions of inpainting."""
    critic_samples = Distiller.critic_samples

    def curious(self: Distiller, rollout: Any, z_student: Tensor, generator: Any) -> Any:
        if z_student.mean().item() > 9:
            raise AssertionError("values of tensors without values are made up as 1")
        return critic_samples(self, rollout, z_student, generator)

    monkeypatch.setattr(Distiller, "critic_samples", curious)
    recipe = small(model_with(9, "sd15", tmp_path), task={"name": "inpainting"}, gradient_accumulation=2)
    made = rehearse(recipe, PRETEND_DEVICE)
    ((place, count),) = made.waits.items()
    assert place.startswith("tests/trainer/test_rehearse.py:")
    assert count == 2


def test_the_meter_sees_what_lives_and_what_dies() -> None:
    meter = Meter()
    with meter, meter.moment("one"):
        first = torch.zeros(1000)
        second = first.reshape(10, 100)  # shares its memory
        third = second + 1
        del first, second
        fourth = torch.zeros(500)
    assert meter.moments["one"].peak == 8000  # the first is gone when the fourth comes
    assert meter.total == third.nbytes + fourth.nbytes
    del third, fourth
    assert meter.total == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_parameters(name: str) -> None:
    """The table of families has the counts from elsewhere: its sources name them in words."""
    recipe = load_recipe(PUBLISHED[name].recipe)
    source = published_source(recipe.model)
    assert source is not None
    outline = family(name).outline_of(source, recipe.model, recipe.data.resolution)
    known = next(one.parameters for one in CORE_FAMILIES if one.recipe == name)
    assert outline.parameters == pytest.approx(known, rel=0.01)


def test_cost_is_work_over_speed(rehearsed: Rehearsal) -> None:
    gpu = GPUS["4090"]
    whole = cost_of(rehearsed, gpu, 0.5)
    flops = 3 * rehearsed.phases[0].flops
    assert whole.flops == pytest.approx(flops)
    moved = 3 * rehearsed.phases[0].moved
    assert whole.hours == pytest.approx(max(flops / (gpu.fp32 * 1e12 * 0.5), moved / 1008e9) / 3600)
    with pytest.raises(UserError, match="there is no card 'voodoo' in the table; expected one of 3060"):
        gpu_of("voodoo")
    assert gpu_of("RTX 4090") == gpu


def test_ways_to_fit_stand_on_each_other(
    rehearsed: Rehearsal, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each setting saves: see the parts above."""
    assert fits(2**30, 2.0)
    assert not fits(2**30 + 1, 2.0)
    tried: list[Recipe] = []
    monkeypatch.setattr(cost, "rehearse", lambda recipe: tried.append(recipe) or rehearsed)
    ways: list[Way] = list(ways_to_fit(rehearsed, 1.0))  # nothing fits: 1 GiB is kept free
    steps = (
        "data.encode_batch=1",
        "gradient_checkpointing=true",
        "batch_size=1, gradient_accumulation=4",
        "optimizer.bits=8, memory.offload=true, memory.preview_tiles=true",
        "model.storage=int8",
    )
    wanted_words = [", ".join(steps[: count + 1]) for count in range(len(steps))]
    smallest = wanted_words[-1].replace("int8", "nf4")
    assert [way.words for way in ways] == [*wanted_words, smallest, f"{smallest}, memory.base=cpu"]
    wanted = small(
        tiny_model,
        data={"encode_batch": 1},
        gradient_checkpointing=True,
        batch_size=1,
        gradient_accumulation=4,
        optimizer={"bits": 8},
        memory={"offload": True, "preview_tiles": True, "base": "cpu"},
        model={"storage": "nf4"},
    )
    assert tried[-1] == wanted
    assert all(not way.fits(1.0) for way in ways)


def test_the_command_prints_a_rehearsal(
    rehearsed: Rehearsal,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Recipe] = []
    monkeypatch.setattr(report, "rehearse", lambda recipe: asked.append(recipe) or rehearsed)
    recipe, path = small(tiny_model, batch_size=4), tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert main(["distill", str(path), "--rehearse", "--gpu", "4070", "--price", "2"]) == 0
    assert asked == [recipe]
    text = capsys.readouterr().out
    assert "Fits in 12 GB: yes" in text
    assert "On one GeForce RTX 4070" in text
    assert "dollars at 2 an hour" in text
    assert "Rehearsed on fake tensors, not measured" in text
    assert "sharding" not in text
    assert not (tmp_path / "out").exists()
    assert main(["distill", str(path), "--rehearse", "--set", "sharding=base"]) == 0
    assert "each of N devices keeps 1 / N" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["distill", str(path), "--rehearse", "--utilisation", "1.5"])
