"""ControlNets, Control-LoRAs and T2I-adapters under a UNet: as stock diffusers has them, from hint to LoRA."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from kornia.filters import canny
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.distiller import Distiller, DistillerSettings
from flash_diffusion.flash_core.lora import LoraModule, read_lora
from flash_diffusion.trainer.config import DataSection, ModelSection, TaskSection, parse_recipe
from flash_diffusion.trainer.data.encoding.examples import from_rows
from flash_diffusion.trainer.data.encoding.prepare import prepare_examples
from flash_diffusion.trainer.demo.making.adapters.control import KINDS, ControlTraining, moved, moved_examples
from flash_diffusion.trainer.demo.shards import Pictures, load_pictures
from flash_diffusion.trainer.distill.assembly import assemble
from flash_diffusion.trainer.distill.loop import Run
from flash_diffusion.trainer.distill.plan import print_plan
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.recipes import load_recipe
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher, outline_teacher
from flash_diffusion.trainer.teachers.base import Teacher
from flash_diffusion.trainer.teachers.conditions.control_lora import diffusers_path, native_path, write_control_lora

from ..families.adapters import save_weights, tiny_controlnet, tiny_t2i_adapter, tiny_unet
from ..families.pipelines import save_pipeline
from .models import tiny_recipe

PROMPTS = ["red ball", "a yellow star"]
# Which stock pipeline draws with which network.
PIPELINES: dict[tuple[str, str], Any] = {
    ("sd15", "controlnet"): StableDiffusionControlNetPipeline,
    ("sdxl", "controlnet"): StableDiffusionXLControlNetPipeline,
    ("sd15", "full_adapter"): StableDiffusionAdapterPipeline,
    ("sd15", "light_adapter"): StableDiffusionAdapterPipeline,
    ("sdxl", "full_adapter_xl"): StableDiffusionXLAdapterPipeline,
}
CONTROLNETS = [("sd15", "controlnet"), ("sdxl", "controlnet")]


def network(family: str, kind: str) -> ControlNetModel | T2IAdapter:
    """A tiny random network that reads hints."""
    return tiny_controlnet(tiny_unet(family)) if kind == "controlnet" else tiny_t2i_adapter(kind)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of each family, and every network beside it."""
    root = tmp_path_factory.mktemp("control")
    found = {family: save_pipeline(family, root / family, unet=tiny_unet(family)) for family in ("sd15", "sdxl")}
    for family, kind in PIPELINES:
        found[f"{family} {kind}"] = root / f"{family}_{kind}"
        network(family, kind).save_pretrained(found[f"{family} {kind}"])
    return found


def section(folders: dict[str, Path], family: str, control: Path | str, **fields: Any) -> ModelSection:
    """A base with a network beside it."""
    content = {"family": family, "path": str(folders[family]), "control": {"path": str(control), **fields}}
    return ModelSection.model_validate(content)


def hints(batch: int = 2, size: int = 64) -> Tensor:
    """Random edges (B, 3, H, W), each 0 or 1."""
    edges = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(1)) > 0.8
    return edges.float().expand(-1, 3, -1, -1)


def noise(teacher: Teacher) -> Tensor:
    """Two latents of pure noise."""
    return torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))


def output(teacher: Teacher, hint: Tensor | None = None) -> Tensor:
    """Return the network's output on noise, at two timesteps."""
    with torch.no_grad():
        conditioning = teacher.unconditional(2).joined(Conditioning(hint=hint))
        return teacher.denoiser.predict(noise(teacher), torch.tensor([999.0, 249.0]), conditioning)


# -- the same as diffusers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), PIPELINES)
def test_the_rollout_is_the_stock_pipelines(folders: dict[str, Path], family: str, kind: str) -> None:
    scale = 0.7
    teacher = load_teacher(section(folders, family, folders[f"{family} {kind}"], scale=scale))
    task, start, hint = build_task(TaskSection(name="control")), noise(teacher), hints()
    conditioning = teacher.encode_prompts(PROMPTS).joined(Conditioning(hint=hint))
    unconditional = task.unconditional(conditioning, teacher.unconditional(2))
    assert unconditional.hint is hint
    ours = Distiller(teacher.denoiser, DistillerSettings(teacher_steps=8)).teacher_solution(
        start, conditioning, unconditional, torch.full((2,), 4.0)
    )
    options: dict[str, Any] = {} if family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    part, argument = ("controlnet", "controlnet_conditioning_scale")
    if kind != "controlnet":
        part, argument = ("adapter", "adapter_conditioning_scale")
    pipeline = PIPELINES[family, kind].from_pretrained(folders[family], **{part: network(family, kind)}, **options)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    theirs = pipeline(
        PROMPTS,
        image=hint,
        latents=start.clone(),
        num_inference_steps=8,
        guidance_scale=4.0,
        output_type="latent",
        **{argument: scale},
    ).images
    assert float(theirs.std()) > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert float((output(teacher, hint) - output(teacher)).abs().max()) > 0.01


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [*CONTROLNETS, ("sd15", "full_adapter"), ("sdxl", "full_adapter_xl")])
def test_a_single_file_in_diffusers_layout_is_the_folder(
    folders: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    file = save_weights(network(family, kind), tmp_path / "single.safetensors")
    ours, theirs = (load_teacher(section(folders, family, path)) for path in (file, folders[f"{family} {kind}"]))
    torch.testing.assert_close(output(ours, hints()), output(theirs, hints()))


@pytest.mark.parametrize(("family", "layers"), [("sd15", 1), ("sdxl", 2), ("demo", 1)])
def test_every_layer_of_a_controlnet_has_a_name_in_control_loras(family: str, layers: int) -> None:
    unet = load_teacher(ModelSection(family="demo")).denoiser.network if family == "demo" else tiny_unet(family)
    assert unet.config["layers_per_block"] == layers
    for name in ControlNetModel.from_unet(unet).state_dict():
        path = name.rpartition(".")[0]
        assert diffusers_path(native_path(path, layers), layers) == path


def test_names_are_stabilitys() -> None:
    """As in the published Control-LoRAs of SDXL."""
    names = {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": (
            "input_blocks.4.1.transformer_blocks.1.attn2.to_k"
        ),
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "add_embedding.linear_2": "label_emb.0.2",
        "controlnet_cond_embedding.conv_out": "input_hint_block.14",
        "controlnet_down_blocks.8": "zero_convs.8.0",
        "controlnet_mid_block": "middle_block_out.0",
    }
    assert {path: native_path(path, 2) for path in names} == names


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_control_lora_of_full_rank_is_the_controlnet_it_was_made_of(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    base = tiny_unet(family)
    whole = tiny_controlnet(tiny_unet(family, seed=7))  # copied from another UNet: every layer differs
    begun = ControlNetModel.from_unet(base).state_dict()
    modules, rest = {}, {}
    for name, value in whole.state_dict().items():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and value.ndim > 1 and not name.startswith("controlnet_"):
            change = (value - begun[name]).flatten(1)
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            modules[path] = LoraModule(path, s[:, None] * v, u)
        else:
            rest[name] = value
    file = tmp_path / "control_lora.safetensors"
    write_control_lora(file, modules, rest, base.config["layers_per_block"], {}, torch.float32)
    whole.save_pretrained(tmp_path / "whole")
    ours, theirs = (load_teacher(section(folders, family, path)) for path in (file, tmp_path / "whole"))
    torch.testing.assert_close(output(ours, hints()), output(theirs, hints()), atol=1e-4, rtol=1e-4)
    outline = outline_teacher(section(folders, family, file))
    assert outline.control is not None
    assert sum(value.numel() for value in outline.control.network.parameters()) == sum(
        value.numel() for value in whole.parameters()
    )


def test_scale_defaults_depend_on_the_kind(folders: dict[str, Path]) -> None:
    controlnet = outline_teacher(section(folders, "sd15", folders["sd15 controlnet"])).control
    adapter = outline_teacher(section(folders, "sdxl", folders["sdxl full_adapter_xl"])).control
    assert controlnet is not None
    assert adapter is not None
    assert controlnet.title == "sd15_controlnet (ControlNet) x 1"
    assert adapter.title == "sdxl_full_adapter_xl (T2I-adapter) x 0.8"


# -- hints -----------------------------------------------------------------------------------------------------------


def test_hints_are_kornias_edges_and_companions_come_first() -> None:
    task = build_task(TaskSection(name="control"))
    images = load_pictures().images[:3].float() / 127.5 - 1
    drawn = task.draw(images, {}, torch.Generator())["hint"]
    expected = canny(images / 2 + 0.5, 0.4, 0.8)[1]  # the thresholds of ComfyUI's node
    assert torch.equal(drawn, expected.expand(-1, 3, -1, -1))
    assert 0.005 < float(drawn.mean()) < 0.3
    beside = torch.rand(3, 3, 128, 128) * 2 - 1
    torch.testing.assert_close(task.draw(images, {"hint": beside}, torch.Generator())["hint"], beside / 2 + 0.5)
    varied = build_task(
        TaskSection(name="control", options={"low_threshold": [0.1, 0.4], "high_threshold": [0.4, 1.5]})
    )
    first, second = (varied.draw(images, {}, torch.Generator().manual_seed(seed))["hint"] for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, varied.draw(images, {}, torch.Generator().manual_seed(0))["hint"])


@pytest.mark.parametrize("colours", [1, 3])
def test_hints_survive_their_storage_as_bytes(folders: dict[str, Path], tmp_path: Path, colours: int) -> None:
    pictures, levels = tmp_path / "pictures", torch.randint(0, 256, (3, 64, 64, colours), dtype=torch.uint8)
    pictures.mkdir()
    for index, hint in enumerate(levels):
        Image.new("RGB", (64, 64)).save(pictures / f"{index}.png")
        Image.fromarray(hint.expand(-1, -1, 3).numpy()).save(pictures / f"{index}.hint.png")
        (pictures / f"{index}.txt").write_text("red ball")
    teacher = load_teacher(section(folders, "sd15", folders["sd15 controlnet"]))
    task = build_task(TaskSection(name="control"))
    data = DataSection(source="folder", path=pictures, encode_batch=2)
    examples = prepare_examples(data, teacher, task, 2)
    assert examples.task is not None
    for row in examples.stores[2].rows(examples.task):
        hint = from_rows(row).hint
        assert hint is not None
        assert (hint.dtype, hint.shape[1]) == (torch.uint8, colours)
    _, conditioning = examples.batch(torch.tensor([5, 0]), "cpu")
    expected = levels[[2, 0]].expand(-1, -1, -1, 3).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(conditioning.hint, expected)


# -- distillation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [("sd15", "controlnet"), ("sdxl", "full_adapter_xl")])
def test_five_updates_change_the_lora_alone(
    folders: dict[str, Path], pictures: Path, tmp_path: Path, family: str, kind: str
) -> None:
    control = folders[f"{family} {kind}"]
    content = tiny_recipe(folders[family], pictures) | {
        "model": {"family": family, "path": str(folders[family]), "control": {"path": str(control)}},
        "task": {"name": "control"},
        "optimizer": {"lr": 0.02},
    }
    run = Run(parse_recipe(content), tmp_path / "run", Accelerator(), None)
    denoiser: Any = run.parts.teacher.denoiser
    parts = {"base": denoiser.network, "control": denoiser.control.network}
    before = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    file = run.train()
    changed = {
        key for name, part in parts.items() for key, value in part.state_dict().items()
        if not torch.equal(value, before[name][key])
    }  # fmt: skip
    assert changed
    assert all(".student." in key for key in changed)
    metadata = read_lora(file).metadata
    assert metadata is not None
    assert metadata.task == "control"
    assert metadata.training["control"].startswith(f"{control.name} (")
    assert metadata.training["control"] in (tmp_path / "run" / "README.md").read_text()


def test_the_discriminator_sees_the_hint(folders: dict[str, Path], pictures: Path) -> None:
    content = tiny_recipe(folders["sd15"], pictures) | {"task": {"name": "control"}}
    content["model"]["control"] = {"path": str(folders["sd15 full_adapter"])}
    parts = assemble(parse_recipe(content), Accelerator())
    z, conditioning = parts.examples.batch(torch.tensor([0, 1]), "cpu")
    other = Conditioning(cross_attention=conditioning.cross_attention, hint=1 - conditioning.hint)  # type: ignore[operator]
    with torch.no_grad():
        first, second = (
            parts.teacher.denoiser.features(z, torch.tensor([499.0, 499.0]), given) for given in (conditioning, other)
        )
    for one, two in zip(first, second, strict=True):
        assert float((one - two).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_controlnet_is_recomputed_too(folders: dict[str, Path], family: str) -> None:
    """The adversarial loss goes back through it to the latents: the same gradient, of fewer activations."""
    teacher = load_teacher(section(folders, family, folders[f"{family} controlnet"]))
    denoiser, t = teacher.denoiser, torch.tensor([999.0, 249.0])
    conditioning = teacher.unconditional(2).joined(Conditioning(hint=hints()))

    def gradient() -> tuple[Tensor, int]:
        kept = 0

        def count(value: Tensor) -> Tensor:
            nonlocal kept
            kept += value.nbytes
            return value

        given = noise(teacher).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            loss = denoiser.predict(given, t, conditioning).square().sum()
        return torch.autograd.grad(loss, given)[0], kept

    plain, _ = gradient()
    denoiser.network.enable_gradient_checkpointing()
    _, network_alone = gradient()
    denoiser.recompute_activations()
    again, kept = gradient()
    assert torch.equal(again, plain)
    assert kept < 0.75 * network_alone


def test_a_dry_run_counts_the_network(folders: dict[str, Path], pictures: Path) -> None:
    content = tiny_recipe(folders["sdxl"], pictures) | {"task": {"name": "control"}}
    content["model"] = section(folders, "sdxl", folders["sdxl controlnet"]).model_dump()
    text = io.StringIO()
    print_plan(parse_recipe(content), Console(file=text, width=200))
    count = sum(value.numel() for value in network("sdxl", "controlnet").parameters()) / 1e6
    assert f"control: sdxl_controlnet (ControlNet) x 1, frozen, {count:.1f} M parameters" in text.getvalue()
    assert "the base and its control" in text.getvalue()


@pytest.mark.parametrize(
    ("name", "family", "control", "scale"),
    [
        ("controlnet_sd15", "sd15", "sd15 controlnet", 1),
        ("controlnet_sdxl", "sdxl", "sdxl controlnet", 1),
        ("t2i_adapter_sdxl", "sdxl", "sdxl full_adapter_xl", 0.8),
    ],
)
def test_the_recipes_run_dry(
    folders: dict[str, Path], pictures: Path, name: str, family: str, control: str, scale: float
) -> None:
    data = ["data.source=folder", f"data.path={pictures}"]
    recipe = load_recipe(name, [*data, f"model.path={folders[family]}", f"model.control.path={folders[control]}"])
    assert recipe.model.control is not None
    assert (recipe.task.name, recipe.model.control.scale) == ("control", scale)
    text = io.StringIO()
    print_plan(recipe, Console(file=text, width=200))
    assert f"x {scale:g}, frozen" in text.getvalue()


# -- the demo's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_demo_control_networks_read_back_unchanged(tmp_path: Path, kind: str) -> None:
    teacher, task = load_teacher(ModelSection(family="demo")), build_task(TaskSection(name="control"))
    pictures = load_pictures()
    examples = moved_examples(teacher, task, Pictures(pictures.images[:4], pictures.captions[:4]), 2, 0)
    assert len(examples) == 8
    base = {name: value.clone() for name, value in teacher.denoiser.network.state_dict().items()}
    training: ControlTraining = KINDS[kind](teacher, examples, task, 2, 1e-3, 0)
    for update in range(4):
        training.update(update / 4)
    assert all(torch.equal(value, base[name]) for name, value in teacher.denoiser.network.state_dict().items())
    file = tmp_path / "control.safetensors"
    training.write(file, {"flash.training.kind": kind})
    assert file.stat().st_size < 2e6
    _, conditioning = examples.batch(torch.tensor([0, 5]), "cpu")
    written = load_teacher(
        ModelSection.model_validate({"family": "demo", "control": {"path": str(file), "scale": 1.0}})
    )
    z, t = noise(teacher), torch.tensor([800.0, 300.0])
    with torch.no_grad(), training.average.applied():
        trained, read = (part.denoiser.predict(z, t, conditioning) for part in (teacher, written))
        plain = teacher.denoiser.predict(z, t, Conditioning(cross_attention=conditioning.cross_attention))
    effect = float((trained - plain).abs().max())
    assert effect > 1e-3
    assert float((trained - read).abs().max()) < 0.01 * effect


def test_moved_pictures_stay_on_white() -> None:
    images = load_pictures().images[:8].float() / 127.5 - 1
    images[:, :, :2] = images[:, :, -2:] = 1
    images[:, :, :, :2] = images[:, :, :, -2:] = 1
    other = moved(images, torch.Generator().manual_seed(0))
    assert float(other[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].min()) > 0.9
    assert float((other - images).abs().mean()) > 0.05
    assert float(((1 - other).mean() / (1 - images).mean() - 1).abs()) < 0.4


# -- what does not fit -----------------------------------------------------------------------------------------------


def refusal(model: ModelSection) -> str:
    """The message that refuses a model, which an outline gives too, before any weights are read."""
    with pytest.raises(UserError) as error:
        outline_teacher(model)
    with pytest.raises(UserError) as loaded:
        load_teacher(model)
    assert str(loaded.value) == str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("family", "control", "words"),
    [
        ("sdxl", "sd15 controlnet", ["is a ControlNet for another model", "choose a ControlNet made for this model"]),
        ("sdxl", "sd15 full_adapter", ["of the kind full_adapter at 1/8", "takes full_adapter_xl at 1/16"]),
        ("sd15", "sdxl full_adapter_xl", ["full_adapter_xl at 1/16", "takes full_adapter or light_adapter at 1/8"]),
        ("sd15", "sd15", ["no config.json"]),
        ("sd15", "nothing", ["'nothing' does not exist"]),
        ("sd15", "nothing.safetensors", ["the file nothing.safetensors does not exist"]),
        ("sd15", "control.ckpt", ["is a pickle"]),
    ],
)
def test_a_network_for_another_base_is_refused(
    folders: dict[str, Path], family: str, control: str, words: list[str]
) -> None:
    message = refusal(section(folders, family, folders.get(control, Path(control))))
    assert "model.control.path" in message
    for word in words:
        assert word in message


def test_another_width_of_text_and_other_channels_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    changes = {"cross_attention_dim": 40, "block_out_channels": (64, 64, 64)}
    for field, value in changes.items():
        config = dict(tiny_unet("sd15").config)
        if field == "block_out_channels":
            value = tuple(2 * width for width in config[field])
        other = ControlNetModel.from_unet(UNet2DConditionModel.from_config({**config, field: value}))
        other.save_pretrained(tmp_path / field)
        message = refusal(section(folders, "sd15", tmp_path / field))
        assert field in message
        assert str(list(value) if isinstance(value, tuple) else value) in message
    T2IAdapter(channels=[64, 128, 128], adapter_type="full_adapter").save_pretrained(tmp_path / "wide")
    assert "[64, 128, 128]" in refusal(section(folders, "sd15", tmp_path / "wide"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("hint", "has no encoder for the hint"),
        ("half", "without"),
        ("other base", "is for another base"),
        ("unknown layer", "does not have"),
        ("no control", "is no known ControlNet, Control-LoRA or T2I-adapter"),
    ],
)
def test_a_damaged_control_lora_is_refused(folders: dict[str, Path], tmp_path: Path, change: str, words: str) -> None:
    file = tmp_path / "control_lora.safetensors"
    whole = tiny_controlnet(tiny_unet("sd15")).state_dict()
    rest = {name: value for name, value in whole.items() if name.startswith("controlnet_")}
    path = "mid_block.resnets.0.conv1"
    width = whole[f"{path}.weight"].shape[0]
    up, down = torch.ones(width + (change == "other base"), 1), torch.ones(1, width, 3, 3)
    write_control_lora(file, {path: LoraModule(path, down, up)}, rest, 1, {})
    tensors = load_file(file)
    if change == "hint":
        tensors = {name: value for name, value in tensors.items() if "hint" not in name}
    elif change == "half":
        tensors = {name: value for name, value in tensors.items() if not name.endswith(".down")}
    elif change == "unknown layer":
        tensors["input_blocks.77.0.in_layers.2.weight"] = torch.ones(2, 2)
    elif change == "no control":
        tensors = {"some.weight": torch.ones(2)}
    save_file(tensors, file)
    assert words in refusal(section(folders, "sd15", file))


def test_a_size_that_an_adapter_does_not_read_is_refused(folders: dict[str, Path]) -> None:
    model = section(folders, "sdxl", folders["sdxl full_adapter_xl"])
    with pytest.raises(UserError, match="multiples of 16 pixels, not 72 x 72"):
        outline_teacher(model, 72)
    outline_teacher(section(folders, "sdxl", folders["sdxl controlnet"]), 72)


def test_unknown_fields_are_named_with_what_there_is(folders: dict[str, Path], pictures: Path) -> None:
    content = tiny_recipe(folders["sd15"], pictures)
    with pytest.raises(UserError, match="model.control.strength.*expected one of path, scale"):
        parse_recipe({**content, "model": {**content["model"], "control": {"path": "x", "strength": 1}}})


def test_control_of_a_transformer_raises_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save_pipeline("pixart_sigma", tmp_path / "pixart")
    control = {"path": str(folders["sd15 controlnet"])}
    model = ModelSection.model_validate({"family": "pixart_sigma", "path": str(folder), "control": control})
    assert "is no UNet" in refusal(model)


def test_the_task_and_the_network_come_together(folders: dict[str, Path], pictures: Path) -> None:
    content = tiny_recipe(folders["sd15"], pictures)
    without = parse_recipe({**content, "task": {"name": "control"}})
    control = {"path": str(folders["sd15 controlnet"])}
    alone = parse_recipe({**content, "model": {**content["model"], "control": control}})
    for recipe, words in ((without, "model.control: is missing"), (alone, "set task.name: control")):
        with pytest.raises(UserError, match=words):
            assemble(recipe, Accelerator())
        with pytest.raises(UserError, match=words):
            print_plan(recipe, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low_threshold": [0.5, 0.2]}, "must be \\[low, high\\]"),
        ({"low_threshold": [0.5, 0.9]}, "low_threshold must not be above"),
        ({"threshold": 1}, "low_threshold, high_threshold"),
    ],
)
def test_thresholds_are_in_order(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_task(TaskSection(name="control", options=options))
