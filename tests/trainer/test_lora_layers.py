"""LoRA files on teachers: ranks of their own for every layer, convolutions, and style LoRAs merged into the base."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from flash_diffusion.flash_core.lora import LoraError, LoraModule, flat_name, read_lora, write_lora
from flash_diffusion.flash_core.process import VPProcess
from flash_diffusion.trainer.config import ModelSection, parse_recipe
from flash_diffusion.trainer.distill.assembly import assemble
from flash_diffusion.trainer.distill.checkpoint import last_intact
from flash_diffusion.trainer.distill.loop import Run
from flash_diffusion.trainer.distill.plan import print_plan
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.families.stable_diffusion import UNetDenoiser

from ..families.networks import tiny_network
from ..families.pipelines import save_pipeline
from .models import tiny_recipe

PROMPTS = ["red ball", "a yellow star"]
STOCK: dict[str, Any] = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline of each family."""
    root = tmp_path_factory.mktemp("families")
    return {family: save_pipeline(family, root / family) for family in STOCK}


def stock(family: str, folder: Path) -> Any:
    """The stock pipeline."""
    options = {"safety_checker": None, "requires_safety_checker": False} if family == "sd15" else {}
    return STOCK[family].from_pretrained(folder, **options)


def random_lora(network: nn.Module, *ends: str, ranks: tuple[int, ...] = (4,)) -> dict[str, LoraModule]:
    """Updates of all layers whose paths end so, with the given ranks in turn and an alpha of 1.5 times the rank."""
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for path, layer in network.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and path.endswith(ends):
            rank = ranks[len(modules) % len(ranks)]
            out, *rest = layer.weight.shape
            down = 0.3 * torch.randn(rank, *rest, generator=generator)
            up = 0.3 * torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator)
            modules[flat_name(path)] = LoraModule(path, down, up, 1.5 * rank)
    assert modules
    return modules


@pytest.mark.parametrize("family", list(STOCK))
def test_a_file_may_have_a_rank_and_an_alpha_for_every_layer(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """Against weights added up by hand: stock diffusers scales such files by the most frequent rank and alpha."""
    network = stock(family, folders[family]).unet
    ends = ("to_q", "attn2.to_k", "proj_in", "conv1", "conv_shortcut", "ff.net.0.proj", "linear_2")
    modules = random_lora(network, *ends, ranks=(1, 4, 7))
    modules = {
        name: LoraModule(module.path, module.down, module.up, 2.0 if "to_k" in name else module.alpha)
        for name, module in modules.items()
    }
    write_lora(tmp_path / "lora.safetensors", modules, None, dialect="kohya")
    teacher = load_teacher(ModelSection(family=family, path=str(folders[family])))
    teacher.denoiser.load_adapter("student", read_lora(tmp_path / "lora.safetensors").modules)
    applied = teacher.denoiser.adapter("student")
    assert {flat_name(path): (module.rank, module.scale) for path, module in applied.items()} == {
        name: (module.rank, module.scale) for name, module in modules.items()
    }
    with torch.no_grad():
        for module in modules.values():
            weight = network.get_submodule(module.path).weight
            up = module.up.reshape(len(module.up), -1)
            weight += module.alpha / module.rank * torch.einsum("or,r...->o...", up, module.down)
    given = teacher.encode_prompts(PROMPTS)
    z = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999.0, 249.0])
    added = {"text_embeds": given.vector, "time_ids": given.size_ids}
    with torch.no_grad(), teacher.denoiser.role("student"):
        ours = teacher.denoiser.predict(z, t, given)
        theirs = network(z, t, encoder_hidden_states=given.cross_attention, added_cond_kwargs=added).sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_linear_layers_update_may_be_written_as_a_convolutions() -> None:
    """SD 1.5's proj_in is a 1 x 1 convolution, SDXL's a linear layer, and old files mix the two."""
    for family in ("sd15", "sdxl"):
        network = tiny_network(family)
        modules = random_lora(network, "proj_in")
        other = {
            name: LoraModule(
                module.path,
                module.down.flatten(1) if module.down.ndim == 4 else module.down[:, :, None, None],
                module.up.flatten(1) if module.up.ndim == 4 else module.up[:, :, None, None],
                module.alpha,
            )
            for name, module in modules.items()
        }
        denoiser = UNetDenoiser(network, VPProcess.from_betas())
        denoiser.load_adapter("student", other)
        for path, module in denoiser.adapter("student").items():
            assert torch.equal(module.down, modules[flat_name(path)].down)


def test_a_layer_is_matched_by_its_whole_path() -> None:
    """Flux's ``proj_out`` is also the end of its single blocks' paths."""
    network = tiny_network("flux")
    denoiser = UNetDenoiser(network, VPProcess.from_betas())
    whole = random_lora(network, "proj_out")
    denoiser.load_adapter("student", {"proj_out": whole["proj_out"]})
    assert list(denoiser.adapter("student")) == ["proj_out"]


def test_a_layer_of_another_size_is_refused_with_both_sizes() -> None:
    modules = random_lora(tiny_network("sd15"), "attn2.to_k")
    wide = {
        name: LoraModule(module.path, torch.ones(4, 768), module.up, module.alpha) for name, module in modules.items()
    }
    denoiser = UNetDenoiser(tiny_network("sd15"), VPProcess.from_betas())
    with pytest.raises(UserError, match=r"attn2\.to_k is \(32, 32\), the LoRA's is \(32, 768\)"):
        denoiser.load_adapter("student", wide)


# -- style LoRAs -----------------------------------------------------------------------------------------------------


def style_file(family: str, folder: Path, path: Path, dialect: Any = "kohya") -> Path:
    """A LoRA of the UNet and of all text encoders, in kohya's names, which most style LoRAs have."""
    pipeline = stock(family, folder)
    encoders = [pipeline.text_encoder, *([pipeline.text_encoder_2] if family == "sdxl" else [])]
    text = {}
    for number, encoder in enumerate(encoders, 1):
        prefix = "lora_te" if len(encoders) == 1 else f"lora_te{number}"
        for name, module in random_lora(encoder, "q_proj", "fc1").items():
            text[f"{prefix}_{name}"] = LoraModule(f"{prefix}_{name}", module.down, module.up, module.alpha)
    write_lora(path, random_lora(pipeline.unet, "to_k", "conv1"), None, text_encoder=text, dialect=dialect)
    return path


@pytest.mark.parametrize("family", list(STOCK))
def test_a_style_is_merged_as_stock_diffusers_fuses_it(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    style = style_file(family, folders[family], tmp_path / "style.safetensors")
    model = {"family": family, "path": str(folders[family]), "style_lora": [{"path": str(style), "strength": 0.6}]}
    teacher = load_teacher(ModelSection.model_validate(model))
    plain = load_teacher(ModelSection(family=family, path=str(folders[family])))
    assert teacher.weights_hash() != plain.weights_hash()
    pipeline = stock(family, folders[family])
    # Stock diffusers leaves out the text encoders' attention of kohya's files.
    other = style_file(family, folders[family], tmp_path / "other.safetensors", "diffusers")
    pipeline.load_lora_weights(tmp_path, weight_name=other.name)
    parts = ["unet", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])]
    pipeline.fuse_lora(components=parts, lora_scale=0.6)
    pipeline.unload_lora_weights()
    fused = pipeline.unet.state_dict()
    for name, value in teacher.denoiser.network.state_dict().items():
        torch.testing.assert_close(value, fused[name], atol=1e-6, rtol=1e-5)
    text = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False, num_images_per_prompt=1)[0]
    ours = teacher.encode_prompts(PROMPTS).cross_attention
    torch.testing.assert_close(ours, text, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(text, plain.encode_prompts(PROMPTS).cross_attention, atol=1e-2)  # type: ignore[arg-type]


# diffusers warns of the second adapter, which is loaded here on purpose.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_a_flash_lora_of_a_style_is_used_together_with_it(
    folders: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    style = style_file("sd15", folders["sd15"], tmp_path / "style.safetensors")
    content = tiny_recipe(folders["sd15"], pictures, optimizer={"lr": 0.02})
    content["model"]["style_lora"] = [{"path": str(style), "strength": 0.6}]
    content["phases"] = content["phases"][:1]
    recipe = parse_recipe(content)
    plan = Console(record=True, width=120, file=io.StringIO())
    print_plan(recipe, plan)
    assert "style LoRAs merged into the teacher: style.safetensors x 0.6" in plan.export_text()
    run = Run(recipe, tmp_path / "run", Accelerator(), None)
    conditioning = run.parts.teacher.unconditional(1)
    lora = run.train()
    z, t = torch.ones(1, 4, 8, 8), torch.tensor([749.0])
    denoiser = run.parts.teacher.denoiser
    with torch.no_grad(), run.parts.average.applied(), denoiser.role("student"):
        trained = denoiser.predict(z, t, conditioning)
    pipeline = stock("sd15", folders["sd15"])
    pipeline.load_lora_weights(tmp_path, weight_name=style.name, adapter_name="style")
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="flash")
    pipeline.set_adapters(["style", "flash"], [0.6, 1.0])
    with torch.no_grad():
        loaded = pipeline.unet(z, t, encoder_hidden_states=conditioning.cross_attention).sample
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=1e-4)
    metadata = read_lora(lora).metadata
    assert metadata is not None
    assert metadata.training["style_lora"] == "style.safetensors x 0.6"
    assert "style.safetensors" in (lora.parent / "README.md").read_text()
    assert str(tmp_path) not in (lora.parent / "README.md").read_text()


def test_a_style_of_another_model_is_refused_by_its_name(folders: dict[str, Path], tmp_path: Path) -> None:
    style = style_file("sdxl", folders["sdxl"], tmp_path / "style.safetensors")
    model = {"family": "sd15", "path": str(folders["sd15"]), "style_lora": [{"path": str(style)}]}
    with pytest.raises(UserError, match=r"style\.safetensors, unet: this LoRA does not fit"):
        load_teacher(ModelSection.model_validate(model))
    with pytest.raises(LoraError, match="no LoRA file"):
        load_teacher(
            ModelSection.model_validate({**model, "style_lora": [{"path": str(tmp_path / "nothing.safetensors")}]})
        )


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ({"something.else": torch.ones(4)}, 1),
        ({"lora_unet_mid_block_attentions_0_norm.diff_b": torch.ones(64), "something.else": torch.ones(1)}, 2),
    ],
)
def test_a_style_with_more_than_lora_is_refused_with_its_keys(
    folders: dict[str, Path], tmp_path: Path, more: dict[str, torch.Tensor], count: int
) -> None:
    style = style_file("sd15", folders["sd15"], tmp_path / "style.safetensors")
    save_file({**load_file(style), **more}, style)
    model = {"family": "sd15", "path": str(folders["sd15"]), "style_lora": [{"path": str(style)}]}
    with pytest.raises(UserError, match=rf"style\.safetensors: {count} of its keys are not plain LoRA") as caught:
        load_teacher(ModelSection.model_validate(model))
    assert any(name in str(caught.value) for name in more)


# -- training on -----------------------------------------------------------------------------------------------------


def start_recipe(model: Path, pictures: Path, file: Path, **lora: Any) -> dict[str, Any]:
    content = tiny_recipe(model, pictures)
    content["lora"] |= {"start": str(file), **lora}
    return content


def test_a_student_begins_as_the_lora_that_it_trains_on(
    folders: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """Before its first update it predicts what stock diffusers predicts with the file."""
    first = Run(
        parse_recipe(tiny_recipe(folders["sd15"], pictures, optimizer={"lr": 0.02})),
        tmp_path / "1",
        Accelerator(),
        None,
    )
    lora = first.train()
    content = start_recipe(folders["sd15"], pictures, lora, rank=6, alpha=3)
    run = Run(parse_recipe(content), tmp_path / "2", Accelerator(), None)
    conditioning = run.parts.teacher.unconditional(1)
    z, t = torch.ones(1, 4, 8, 8), torch.tensor([749.0])
    pipeline = stock("sd15", folders["sd15"])
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    denoiser = run.parts.teacher.denoiser
    with torch.no_grad():
        wanted = pipeline.unet(z, t, encoder_hidden_states=conditioning.cross_attention).sample
        for average in (nullcontext(), run.parts.average.applied()):
            with average, denoiser.role("student"):
                torch.testing.assert_close(denoiser.predict(z, t, conditioning), wanted, atol=1e-5, rtol=1e-4)
    metadata = read_lora(run.train()).metadata
    assert metadata is not None
    assert metadata.training["start"] == lora.name
    lora.unlink()  # a resumed run has its weights in the checkpoint
    Run(parse_recipe(content), tmp_path / "2", Accelerator(), last_intact(tmp_path / "2"))


def test_a_lora_that_can_not_be_trained_on_is_refused(folders: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    style = style_file("sd15", folders["sd15"], tmp_path / "style.safetensors")
    other = tmp_path / "sdxl.safetensors"
    write_lora(other, random_lora(tiny_network("sdxl"), "attn2.to_k"), None)
    file = tmp_path / "file.safetensors"
    write_lora(file, random_lora(tiny_network("sd15"), "attn2.to_k"), None)
    model = folders["sd15"]
    for content, message in (
        (start_recipe(model, pictures, style), r"lora\.start: .*keys are not LoRA on a layer of the network"),
        (start_recipe(model, pictures, other), r"lora\.start: .*sdxl\.safetensors: this LoRA does not fit"),
        (start_recipe(model, pictures, file, rank=1), r"lora\.start: .*rank 4, more than the recipe's 1; set"),
        (start_recipe(model, pictures, file, targets=["to_q"]), r"does not train, such as .*attn2\.to_k; add them"),
        (
            start_recipe(model, pictures, tmp_path / "nothing.safetensors"),
            r"lora\.start: there is no LoRA at .*nothing\.safetensors",
        ),
    ):
        with pytest.raises((UserError, LoraError), match=message):
            assemble(parse_recipe(content), Accelerator())
