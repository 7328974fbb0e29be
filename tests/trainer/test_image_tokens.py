"""IP-Adapters under a teacher: diffusers' own rollout, what trains and what does not, and face-swap by tokens."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from rich.console import Console
from transformers import CLIPVisionModelWithProjection

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.distiller import Distiller, DistillerSettings
from flash_diffusion.flash_core.process import FlowProcess, VPProcess
from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.config import DataSection, ModelSection, TaskSection, parse_recipe
from flash_diffusion.trainer.data.batches.trajectories import trajectory_fingerprint
from flash_diffusion.trainer.data.cache.stores import conditions_store
from flash_diffusion.trainer.data.framing import to_tensor
from flash_diffusion.trainer.distill.loop import Run
from flash_diffusion.trainer.distill.plan import print_plan
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.recipes import load_recipe
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher, outline_teacher
from flash_diffusion.trainer.teachers.base import count_parameters
from flash_diffusion.trainer.teachers.conditions.control import Control

from ..families.adapters import tiny_controlnet, tiny_unet
from ..families.image_adapters import SIDE, save_image_adapter, save_image_encoder
from ..families.networks import tiny_network
from ..families.pipelines import save_pipeline
from .models import tiny_recipe

PROMPTS = ["red ball", "a yellow star"]
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
SCALE = 0.7
PROCESS = VPProcess.from_betas()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, adapters and the encoder."""
    root = tmp_path_factory.mktemp("image-adapters")
    save_image_encoder(root / "encoder")
    save_image_encoder(root / "other-encoder", embedding=40)
    for family in PIPELINES:
        save_pipeline(family, root / family)
        save_image_adapter(root / f"{family}.safetensors", tiny_network(family))
    save_image_adapter(root / "sd15-plus.safetensors", tiny_network("sd15"), plus=True)
    config = {name: value for name, value in tiny_network("sd15").config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    save_pipeline("sd15", root / "inpainting", unet=UNet2DConditionModel(**config | {"in_channels": 9}))
    return root


def section(root: Path, family: str = "sd15", adapter: str | None = None, **fields: Any) -> ModelSection:
    return ModelSection.model_validate(
        {
            "family": family,
            "path": str(root / family),
            "image_adapter": {
                "path": str(root / f"{adapter or family}.safetensors"),
                "image_encoder": str(root / "encoder"),
                "scale": SCALE,
            },
            **fields,
        }
    )


def picture(seed: int = 4) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


@pytest.mark.parametrize(("family", "adapter"), [("sd15", "sd15"), ("sd15", "sd15-plus"), ("sdxl", "sdxl")])
def test_the_rollout_is_the_stock_pipelines(root: Path, family: str, adapter: str) -> None:
    teacher = load_teacher(section(root, family, adapter))
    assert teacher.image_adapter is not None
    tokens = teacher.image_adapter.tokens(to_tensor(picture(), (SIDE, SIDE))[None])
    conditioning = teacher.encode_prompts(PROMPTS).joined(Conditioning(image_tokens=tokens.expand(2, -1, -1)))
    start = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    solve = Distiller(teacher.denoiser, DistillerSettings(teacher_steps=6)).teacher_solution
    ours = solve(start, conditioning, teacher.unconditional(2), torch.full((2,), 4.0))

    pipeline = PIPELINES[family].from_pretrained(
        root / family, image_encoder=CLIPVisionModelWithProjection.from_pretrained(root / "encoder")
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_ip_adapter(str(root), subfolder="", weight_name=f"{adapter}.safetensors", image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(SCALE)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    # Of the picture, not of our tokens: the pipeline's own encoding is part of what is compared.
    embeds = pipeline.prepare_ip_adapter_image_embeds([picture()], None, "cpu", 1, True)
    absent, present = embeds[0].chunk(2)
    given = torch.cat([absent, absent, present, present])
    theirs = pipeline(
        PROMPTS,
        ip_adapter_image_embeds=[given],
        latents=start.clone(),
        num_inference_steps=6,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    assert float(theirs.std()) > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    blind = Conditioning(image_tokens=teacher.image_adapter.absent.expand(2, -1, -1))
    other = solve(start, teacher.encode_prompts(PROMPTS).joined(blind), teacher.unconditional(2), torch.full((2,), 4.0))
    assert float((other - ours).abs().max()) > 0.01, "the picture changes nothing"


def face_swap(root: Path, pictures: Path, adapter: str = "sd15") -> dict[str, Any]:
    model = section(root, "sd15", adapter, path=str(root / "inpainting"))
    return tiny_recipe(root / "inpainting", pictures) | {
        "model": model.model_dump(mode="json"),
        "task": {"name": "face-swap", "options": {"identity": "tokens"}},
        "optimizer": {"lr": 0.02},
    }


def test_five_updates_of_face_swap_by_tokens_change_the_students_lora_alone(
    root: Path, pictures: Path, tmp_path: Path
) -> None:
    """With the kind of adapter that has layers called as attention's are."""
    recipe = parse_recipe(face_swap(root, pictures, "sd15-plus"))
    run = Run(recipe, tmp_path / "run", Accelerator(), None)
    teacher = run.parts.teacher
    network = teacher.denoiser.network
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    assert any(".to_k_ip." in name for name in before)
    assert not any(".lora_" in name and ("processor" in name or "encoder_hid_proj" in name) for name in before)
    _, conditioning = run.parts.examples.batch(torch.tensor([0, 3]), "cpu")
    lora = run.train()
    changed = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all(".lora_" in name for name in changed)

    z = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([999.0, 249.0])
    with torch.no_grad(), run.parts.average.applied(), teacher.denoiser.role("student"):
        trained = teacher.denoiser.predict(z, t, conditioning)
    pipeline = StableDiffusionPipeline.from_pretrained(root / "inpainting")
    pipeline.load_ip_adapter(str(root), subfolder="", weight_name="sd15-plus.safetensors", image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(SCALE)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    assert conditioning.concat is not None
    assert conditioning.image_tokens is not None
    with torch.no_grad():
        theirs = pipeline.unet(
            torch.cat([z, conditioning.concat], 1),
            t,
            encoder_hidden_states=conditioning.cross_attention,
            added_cond_kwargs={"image_embeds": [conditioning.image_tokens[:, None]]},
        ).sample
    torch.testing.assert_close(trained, theirs, atol=1e-5, rtol=1e-5)


def test_guidance_strengthens_the_identity(root: Path) -> None:
    teacher = load_teacher(section(root, path=str(root / "inpainting")))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    task = build_task(TaskSection(name="face-swap", options={"identity": "tokens"}))
    assert task.extra_channels(4) == 5
    with torch.no_grad():
        own = task.conditions(images, teacher, torch.Generator().manual_seed(1))
    assert own.concat is not None
    assert own.image_tokens is not None
    assert own.concat.shape == (2, 5, 8, 8)
    empty = teacher.unconditional(2)
    branch = task.unconditional(teacher.encode_prompts(["", ""]).joined(own), empty)
    assert torch.equal(branch.concat, own.concat)  # type: ignore[arg-type]
    assert branch.image_tokens is not None
    assert branch.image_tokens.shape == own.image_tokens.shape
    assert not branch.image_tokens.any(), "diffusers' zeros"
    both = build_task(TaskSection(name="face-swap", options={"identity": "both"}))
    assert both.extra_channels(4) == 9
    with torch.no_grad():
        own = both.conditions(images, teacher, torch.Generator().manual_seed(1))
    branch = both.unconditional(teacher.encode_prompts(["", ""]).joined(own), empty)
    assert own.concat is not None
    assert branch.concat is not None
    assert own.concat[:, 5:].any()
    assert not branch.concat[:, 5:].any()
    assert torch.equal(branch.concat[:, :5], own.concat[:, :5])


@pytest.mark.parametrize("adapter", ["sd15", "sd15-plus"])
def test_the_outline_counts_the_adapter(root: Path, pictures: Path, adapter: str) -> None:
    model = section(root, "sd15", adapter)
    outline, teacher = outline_teacher(model), load_teacher(model)
    names = {name: value.shape for name, value in teacher.denoiser.network.named_parameters()}
    assert {name: value.shape for name, value in outline.denoiser.network.named_parameters()} == names
    assert outline.parameters == count_parameters(teacher.denoiser.network)
    assert all(value.is_meta for value in outline.denoiser.network.parameters())
    console = Console(record=True, width=120, file=io.StringIO())
    print_plan(parse_recipe(face_swap(root, pictures, adapter)), console)
    plan = console.export_text()
    assert "trains:" in plan
    counted = sum(
        value.numel()
        for name, value in teacher.denoiser.network.named_parameters()
        if "encoder_hid_proj" in name or "_ip." in name
    )
    assert f"image adapter: {adapter} (IP-Adapter) x 0.7, frozen, {counted / 1e6:.1f} M parameters" in plan


def test_adapters_that_read_an_encoder_differently_share_no_cache(root: Path, pictures: Path) -> None:
    """One reads the picture's embedding (1 token), one the hidden states (17 tokens) of the same encoder."""
    data = DataSection(source="folder", path=pictures)
    task = build_task(TaskSection(name="face-swap", options={"identity": "tokens"}))
    teachers = [load_teacher(section(root, "sd15", adapter)) for adapter in ("sd15", "sd15-plus", "sd15")]
    stores = [conditions_store(data, teacher, task).folder for teacher in teachers]
    assert stores[0] == stores[2]
    assert stores[0] != stores[1]


def test_trajectories_depend_on_what_is_beside_the_base(root: Path, pictures: Path) -> None:
    def changed(**fields: Any) -> str:
        content = face_swap(root, pictures)
        content["model"]["image_adapter"] |= fields
        return trajectory_fingerprint(parse_recipe(content), "data", "the same", PROCESS, None)

    assert changed() == changed()
    assert len({changed(), changed(scale=0.5), changed(image_encoder="another")}) == 3
    other = parse_recipe(face_swap(root, pictures))
    assert trajectory_fingerprint(other, "other data", "the same", PROCESS, None) != changed()
    recipe = parse_recipe(tiny_recipe(root / "sd15", pictures))
    steered = [
        trajectory_fingerprint(
            recipe, "data", "the same", PROCESS, Control(tiny_controlnet(tiny_unet("sd15"), seed), scale)
        )
        for seed, scale in ((0, 1.0), (0, 1.0), (1, 1.0), (0, 0.5))
    ]
    assert steered[0] == steered[1]
    other_process = trajectory_fingerprint(recipe, "data", "the same", FlowProcess(), None)
    assert len({*steered, other_process, trajectory_fingerprint(recipe, "data", "the same", PROCESS, None)}) == 5


def test_a_face_swap_by_tokens_is_evaluated_with_the_adapter_named_on_the_command_line(
    root: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--task", "face-swap", "--task-options", '{"identity": "tokens"}', "--family", "sd15"]
    command += ["--teacher", str(root / "inpainting"), "--data", str(pictures), "--samples", "2", "--steps", "1"]
    command += ["--output", str(tmp_path), "--pictures", "1"]
    adapter = f"path: {root / 'sd15.safetensors'}, image_encoder: {root / 'encoder'}, scale: 0.7"
    assert main([*command, "--model", f"image_adapter={{{adapter}}}"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["task"] == "face-swap"
    for given, words in (
        ('{"path": "x.safetensors"}', "model.image_adapter.image_encoder: is missing; expected the CLIP vision"),
        ('{"path": "x", "image_encoder": "y", "scales": 1}', "model.image_adapter.scales: there is no such field"),
        ("{path: x", "the value of image_adapter is not YAML or JSON"),
    ):
        assert main([*command, "--model", f"image_adapter={given}"]) == 2
        assert words in capsys.readouterr().err
    assert main([*command, "--model", "control={path: x, strength: 1}"]) == 2
    assert "model.control.strength: there is no such field; expected one of path, scale" in capsys.readouterr().err


def test_the_tokens_outlive_the_encoder(root: Path) -> None:
    teacher = load_teacher(section(root))
    before = teacher.unconditional(2).image_tokens
    teacher.release_encoders()
    assert torch.equal(teacher.unconditional(2).image_tokens, before)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="released"):
        teacher.image_adapter.tokens(torch.zeros(1, 3, 64, 64))  # type: ignore[union-attr]


def test_an_adapter_that_does_not_fit_raises_a_readable_error(root: Path, pictures: Path, tmp_path: Path) -> None:
    def refusal(**fields: Any) -> str:
        adapter = section(root).image_adapter
        assert adapter is not None
        model = section(root, image_adapter=adapter.model_copy(update=fields))
        with pytest.raises(UserError) as error:
            load_teacher(model)
        return str(error.value)

    pickled = tmp_path / "ip-adapter_sd15.bin"
    pickled.write_bytes(b"\x80\x04N.")
    assert "is not a .safetensors file; loading other files can run code" in refusal(path=str(pickled))
    assert "does not exist" in refusal(path=str(tmp_path / "none.safetensors"))
    assert "is no IP-Adapter" in refusal(path=str(root / "sd15" / "unet" / "diffusion_pytorch_model.safetensors"))
    assert "of width 24, but" in refusal(image_encoder=str(root / "other-encoder"))
    assert "CLIP vision encoder with safetensors weights" in refusal(image_encoder=str(tmp_path))
    wide = tiny_network("sd15")
    save_image_adapter(
        tmp_path / "wide.safetensors",
        UNet2DConditionModel(
            **{name: value for name, value in wide.config.items() if not name.startswith("_")}
            | {"cross_attention_dim": 48}
        ),
    )
    message = refusal(path=str(tmp_path / "wide.safetensors"))
    assert "is for another model, whose attention reads 48 channels, but sd15 reads 32" in message
    content = face_swap(root, pictures)
    lacking = parse_recipe({**content, "model": {**content["model"], "image_adapter": None}})
    with pytest.raises(UserError, match=r"model\.image_adapter: is missing"):
        print_plan(lacking, Console(file=io.StringIO()))
    unread = parse_recipe({**content, "task": {"name": "inpainting"}})
    with pytest.raises(UserError, match="reads a picture's tokens, but the task inpainting"):
        print_plan(unread, Console(file=io.StringIO()))


def test_the_shipped_recipe_has_what_it_needs() -> None:
    recipe = load_recipe("face_swap")
    task = build_task(recipe.task)
    assert task.gives_image_tokens
    assert task.extra_channels(4) == 5
    assert recipe.model.image_adapter is not None
    assert recipe.model.image_adapter.weight_name is not None
    assert recipe.model.image_adapter.weight_name.endswith(".safetensors")
