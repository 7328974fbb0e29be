"""The table of model families: its facts against ComfyUI's source and diffusers' networks, and its names everywhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from flash_diffusion.flash_core.families import (
    FAMILIES,
    Family,
    family_of,
    name_of,
    of_comfy_class,
    of_text_width,
    of_transformer_width,
    of_vector_width,
)
from flash_diffusion.flash_core.lora import PUBLISHED, FlashMetadata
from flash_diffusion.trainer.teachers import FAMILIES as TEACHERS
from flash_diffusion.trainer.teachers import family as teacher_of

from ..families.published_loras import published_network

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = ROOT / ".runtime" / "ComfyUI"
TABLE = ROOT / "flash_core" / "families.py"
needs_comfyui = pytest.mark.skipif(not COMFYUI.is_dir(), reason="ComfyUI is not installed (make comfy)")


def comfy_classes() -> dict[str, dict[str, Any]]:
    """Return {class: {field: value}} of ComfyUI's model configurations, inherited fields too; read, not imported."""
    classes: dict[str, dict[str, Any]] = {}
    for node in ast.parse((COMFYUI / "comfy" / "supported_models.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            fields = dict(classes.get(ast.unparse(node.bases[0]), {}))
            for line in node.body:
                if isinstance(line, ast.Assign):
                    fields[ast.unparse(line.targets[0])] = line.value
            classes[node.name] = fields
    return classes


def latent_channels() -> dict[str, int]:
    """Return {class: channels} of ComfyUI's latent formats."""
    channels: dict[str, int] = {"LatentFormat": 4}
    for node in ast.parse((COMFYUI / "comfy" / "latent_formats.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            own = [ast.literal_eval(line.value) for line in node.body if _sets(line, "latent_channels")]
            channels[node.name] = own[0] if own else channels.get(ast.unparse(node.bases[0]) if node.bases else "", 4)
    return channels


def _sets(line: ast.stmt, name: str) -> bool:
    return isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name


PUBLISHED_FAMILIES = [family for family in FAMILIES if family.key != "flash-demo"]


@needs_comfyui
@pytest.mark.parametrize("family", PUBLISHED_FAMILIES, ids=lambda family: family.key)
def test_family_agrees_with_comfyui(family: Family) -> None:
    fields = comfy_classes()[family.comfy_class]
    sizes = ast.literal_eval(fields["unet_config"])
    latents = ast.unparse(fields["latent_format"]).rsplit(".", 1)[1]
    assert latent_channels()[latents] == family.latent_channels
    if family.text_width:
        assert sizes["context_dim"] == family.text_width
        assert (sizes.get("adm_in_channels") or 0) == family.vector_width


@needs_comfyui
def test_modelspec_names_agree_with_comfyui() -> None:
    """ComfyUI writes the ModelSpec names of three families into merged checkpoints."""
    source = (COMFYUI / "comfy_extras" / "nodes_model_merging.py").read_text(encoding="utf-8")
    for key in ("sdxl", "sdxl-refiner", "sd3"):
        assert f'"{family_of(key).architecture}"' in source


def test_the_demo_agrees_with_its_files() -> None:
    demo = family_of("flash-demo")
    config = UNet2DConditionModel.load_config(ROOT / "trainer" / "demo" / "teacher" / "unet")
    attention = {
        width
        for width, kind in zip(config["block_out_channels"], config["down_block_types"], strict=True)
        if kind.startswith("CrossAttn")
    }
    assert config["cross_attention_dim"] == demo.text_width
    assert config["in_channels"] == demo.latent_channels
    assert attention == set(demo.level_widths)
    assert f"class {demo.comfy_class}(" in (ROOT / "nodes" / "demo" / "models.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("lora", PUBLISHED, ids=lambda lora: lora.name)
def test_published_networks_agree(lora: Any) -> None:
    """The sizes of the published teachers' networks, in diffusers' classes."""
    family = family_of(lora.base)
    network = published_network(lora.name.rsplit("/", 1)[1])
    assert network.config.in_channels == family.latent_channels
    if isinstance(network, UNet2DConditionModel):
        assert network.config.cross_attention_dim == family.text_width
        assert set(family.level_widths) <= set(network.config.block_out_channels)
        assert (network.config.projection_class_embeddings_input_dim or 0) == family.vector_width
    if isinstance(network, SD3Transformer2DModel):
        assert network.inner_dim in family.sizes


def test_recipes_name_the_teachers() -> None:
    assert {family.recipe for family in FAMILIES if family.recipe} == set(TEACHERS)
    for family in FAMILIES:
        if family.recipe:
            assert teacher_of(family.recipe).base == family.key


def test_every_field_that_identifies_a_family_is_unique() -> None:
    assert len({family.key for family in FAMILIES}) == len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert len({family.architecture for family in FAMILIES}) == len(FAMILIES)


def test_families_are_found_by_their_widths() -> None:
    assert of_text_width(768).key == "sd15"
    assert [of_text_width(1024, channels).key for channels in (0, 320, 512, 1024)] == ["sd21", "sd21", "sd_x4", "sd_x4"]
    assert of_text_width(0) is of_text_width(333) is None
    assert of_vector_width(2816).key == "sdxl"
    assert of_vector_width(0) is None
    assert [family.sized(1536) for family in of_transformer_width(1536)] == ["SD3 medium", "SD3.5 medium"]
    assert [family.sized(2432) for family in of_transformer_width(2432)] == ["SD3.5 large"]
    assert of_comfy_class(["Segmind_Vega", "SDXL", "BASE"]).key == "sdxl"
    assert of_comfy_class(["Segmind_Vega"]) is None


def test_a_family_of_another_maker_keeps_its_own_name() -> None:
    assert name_of("hidream") == "hidream"
    header = FlashMetadata("hidream", "flow", "flow", {4: (1000.0, 750.0, 500.0, 250.0)}).to_header()
    assert header["modelspec.architecture"] == "hidream/lora"
    assert FlashMetadata.from_header(header).base == "hidream"


# -- one spelling ------------------------------------------------------------------------------------------------------

OTHER_SPELLINGS = re.compile(
    r"\bSD ?v?1\.5\b(?<!SD 1\.5)|\bSD-?XL\b(?<!SDXL)|\bSd ?xl\b|\bSD [v]?3(\.5)?\b|\bSD2\b|\bPix[Aa]rt[- ]?[Ss]igma\b"
    r"(?<!PixArt-Sigma)(?<!PixArtSigma)|\bPix[Aa]rt[- ]?(Alpha|alpha)\b(?<!PixArt-alpha)(?<!PixArtAlpha)"
)
# Names of other people's things: repositories on the Hub, files of theirs.
FOREIGN = re.compile(r"[\w.-]+/[\w./-]+|[\w./-]+\.safetensors|``[^`]*``|`[^`]*`|\w+_\w+")


def prose() -> Iterator[tuple[str, str]]:
    """Yield (place, line) of everything that people read: the packages' Python and YAML, and the documentation."""
    for folder, patterns in {
        ".": ("README.md", "CONTRIBUTING.md"),
        "docs": ("*.md",),
        "web": ("**/*.md",),
        "flash_core": ("**/*.py",),
        "nodes": ("**/*.py",),
        "trainer": ("**/*.py", "**/*.yaml"),
    }.items():
        for pattern in patterns:
            for path in sorted((ROOT / folder).glob(pattern)):
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                    yield f"{path.relative_to(ROOT)}:{number}", line


def test_families_have_one_spelling() -> None:
    wrong = [place for place, line in prose() if OTHER_SPELLINGS.search(FOREIGN.sub(" ", line))]
    assert not wrong, f"write the names of flash_core/families.py: {wrong}"


@pytest.mark.parametrize("line", ["an SD1.5 model", "for SD-XL", "the SD 3 model", "PixArt-sigma", "Pixart Alpha"])
def test_another_spelling_is_found(line: str) -> None:
    assert OTHER_SPELLINGS.search(line)


def test_only_the_table_holds_the_names() -> None:
    """A constant that is a family's name would be a second table; sentences may hold names."""
    # "SDXL", "SD3" and "Flux" are ComfyUI's classes too.
    names = {family.name for family in FAMILIES} - {family.comfy_class for family in FAMILIES}
    for room in ("flash_core", "nodes", "trainer"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if path != TABLE:
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    held = isinstance(node, ast.Constant) and node.value in names
                    assert not held, f"{path.relative_to(ROOT)}:{node.lineno}: read it from flash_core/families.py"
