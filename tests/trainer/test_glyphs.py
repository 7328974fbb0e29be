"""The second embedded teacher: its fonts, its making, and how recipes and evaluations find it."""

from __future__ import annotations

import io
import json
import tarfile
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFont

from flash_diffusion.trainer.config import DataSection, ModelSection
from flash_diffusion.trainer.data.reading import open_source
from flash_diffusion.trainer.demo import assets
from flash_diffusion.trainer.demo.assets import GLYPHS, ROOT, embedded_home
from flash_diffusion.trainer.demo.making.glyphs import command
from flash_diffusion.trainer.demo.making.glyphs.architecture import build_scheduler
from flash_diffusion.trainer.demo.making.glyphs.fonts import (
    BASELINE,
    CAPITAL_HEIGHT,
    CATEGORIES,
    read_fonts,
)
from flash_diffusion.trainer.demo.making.glyphs.fonts import (
    GLYPHS as CHARACTERS,
)
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.evaluate.teacher.defaults import default_features, default_reference
from flash_diffusion.trainer.evaluate.teacher.reference import Reference
from flash_diffusion.trainer.evaluate.teacher_comparison import fitting_classes
from flash_diffusion.trainer.files import fingerprint
from flash_diffusion.trainer.metrics.feature_network import FeatureNetwork
from flash_diffusion.trainer.recipes import load_recipe
from flash_diffusion.trainer.teachers import load_teacher

FAMILIES = 7  # of one category: the sixth is held out


def write_package(folder: Path, name: str, license: str = "OFL-1.1") -> None:
    """Write the tarball of a font package, with Pillow's own font."""
    font = ImageFont.load_default(20)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert isinstance(font.path, io.BytesIO)
    facts = {"id": name, "category": "sans-serif", "license": {"type": license, "attribution": "its authors"}}
    files = {
        "metadata.json": json.dumps(facts).encode(),
        "package.json": b'{"version": "5.0.0"}',
        f"files/{name}-latin-400-normal.woff2": font.path.getvalue(),
    }
    with tarfile.open(folder / f"fontsource-{name}-5.0.0.tgz", "w:gz") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for letter in "abcdefg"[:FAMILIES]:
        write_package(folder, f"font-{letter}")
    write_package(folder, "font-a-closed", license="proprietary")  # its name begins like another's
    return folder


class TestFonts:
    def test_glyphs_share_height_and_baseline(self, packages: Path) -> None:
        pictures, families = read_fonts(packages)
        assert [family["package"] for family in families] == [f"@fontsource/font-{letter}" for letter in "abcdefg"]
        assert {family["license"] for family in families} == {"OFL-1.1"}
        assert len(pictures) == FAMILIES * len(CHARACTERS)
        characters = [glyph.character for glyph in pictures.glyphs]
        for character in "HEx":
            rows = (pictures.images[characters.index(character)] < 128).any(1).nonzero().flatten().numpy()
            assert rows[-1] == BASELINE - 1
            assert (np.ptp(rows) + 1 == CAPITAL_HEIGHT) == character.isupper()
        assert bool((pictures.images[:, 0] == 255).all())

    def test_captions_say_case_category_and_weight(self, packages: Path) -> None:
        captions = {glyph.character: glyph.caption for glyph in read_fonts(packages)[0].glyphs}
        assert captions["A"] == "capital letter a, sans serif, regular"
        assert captions["a"] == "small letter a, sans serif, regular"
        assert captions["7"] == "digit 7, sans serif, regular"

    def test_families_and_pairs_are_held_out(self, packages: Path) -> None:
        train, held_out = read_fonts(packages)[0].split()
        assert {glyph.family for glyph in held_out.glyphs} == {"font-f"}
        assert "font-f" not in {glyph.family for glyph in train.glyphs}
        pairs = {(glyph.character, glyph.category) for glyph in train.glyphs}
        unseen = {(glyph.character, glyph.category) for glyph in held_out.glyphs} - pairs
        assert 2 <= len(unseen) <= 8  # every fifteenth of 62
        assert len(train) == (FAMILIES - 1) * (len(CHARACTERS) - len(unseen))

    def test_folder_without_packages_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no font packages in .*npm pack"):
            read_fonts(tmp_path)


class TestMaking:
    def test_makes_a_stock_pipeline_that_draws_and_resumes(self, packages: Path, tmp_path: Path) -> None:
        from diffusers import StableDiffusionPipeline

        def make(*options: str) -> None:
            parser = ArgumentParser()
            command.add_arguments(parser)
            places = ["--packages", str(packages), "--output", str(tmp_path), "--checkpoint", str(tmp_path / "last")]
            short = ["--updates=2", "--features-updates=2", "--autoencoder-updates", "2", "2"]
            command.run(parser.parse_args([*places, *short, *options]))

        make("--stages", "features", "autoencoder", "teacher")
        training = json.loads((tmp_path / "teacher" / "training.json").read_text())
        make("--stages", "teacher", "--resume", "--updates=4")
        assert json.loads((tmp_path / "teacher" / "training.json").read_text())["updates"] == 4 > training["updates"]
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher", torch_dtype=torch.float32)
        assert pipeline.scheduler.config.prediction_type == "epsilon"
        pictures = pipeline(["digit 7", ""], num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
        assert pictures.shape == (2, 3, 64, 64)
        teacher = load_teacher(ModelSection(family="demo", path=str(tmp_path / "teacher")))
        assert teacher.denoiser.process.prediction == "epsilon"
        network = FeatureNetwork.from_pretrained(tmp_path / "features")
        assert network(pictures)[1].shape == (2, len(CHARACTERS))
        assert (tmp_path / "features" / "model.safetensors").stat().st_size < 300_000

    def test_noise_is_stable_diffusions(self) -> None:
        alphas_cumprod = build_scheduler().alphas_cumprod
        # SD 1.5's published range of sigma, as k-diffusion has it: 0.0292 to 14.6146.
        sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        assert sigma[[0, -1]].tolist() == pytest.approx([0.0292, 14.6146], rel=2e-3)


class TestNames:
    def test_a_name_stands_for_an_embedded_teacher(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert embedded_home(None) == ROOT
        assert embedded_home("glyphs") == GLYPHS
        assert embedded_home(tmp_path) is None
        glyphs = ModelSection(family="demo", path="glyphs")
        assert default_features(glyphs) == GLYPHS / "features"
        assert default_reference(glyphs).parent == GLYPHS
        for own in (ModelSection(family="demo"), ModelSection(family="sd15", path="glyphs")):
            assert default_features(own) == ROOT / "features"
        monkeypatch.setitem(assets.NAMED, "glyphs", tmp_path)
        with pytest.raises(UserError, match="flash-diffusion demo glyphs --packages"):
            load_teacher(glyphs)
        (tmp_path / "glyphs").mkdir()
        monkeypatch.chdir(tmp_path)
        assert embedded_home("glyphs") is None

    def test_recipe_reads_captions_alone(self) -> None:
        recipe = load_recipe("glyphs")
        assert (recipe.model.path, recipe.data.source) == ("glyphs", "demo-glyphs")
        source = open_source(DataSection(source="demo-glyphs"))
        captions = [sample.captions[0] for unit in range(len(source)) for sample in source.read(unit)]
        unseen = (GLYPHS / "unseen.txt").read_text().splitlines()
        assert len(captions) + len(unseen) == len(set(captions) | set(unseen)) == 2 * len(CHARACTERS) * len(CATEGORIES)
        assert len(unseen) == 2 * 21
        assert {caption.split(", ")[1] for caption in unseen} == set(CATEGORIES)

    def test_caption_with_style_names_its_glyph(self) -> None:
        names = ["small letter a", "capital letter a", "digit 1"]
        network = FeatureNetwork(names, names)
        assert fitting_classes(network, "small letter a, serif, bold") == {0}
        assert fitting_classes(network, "digit 1") == {2}
        assert fitting_classes(network, "digit 10, serif") == fitting_classes(network, "serif, bold") == set()

    def test_fonts_are_listed_with_open_licences(self) -> None:
        fonts = json.loads((GLYPHS / "fonts.json").read_text(encoding="utf-8"))
        assert len(fonts) > 200
        assert {font["license"] for font in fonts} == {"OFL-1.1", "Apache-2.0"}
        assert all(
            font["package"].startswith("@fontsource/") and font["version"] and font["category"] for font in fonts
        )


class TestShippedTeacher:
    """The files in the repository: they load without a network, and draw what captions ask for."""

    def test_draws_what_captions_ask_for(self) -> None:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(GLYPHS / "teacher", torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        network = FeatureNetwork.from_pretrained(GLYPHS / "features")
        seen, unseen = ((GLYPHS / name).read_text().splitlines() for name in ("captions.txt", "unseen.txt"))
        for prompts in (seen[::12], unseen):  # the card: 87 % of both are recognised; by chance 2 % would be
            generator = torch.Generator().manual_seed(0)
            options = {"num_inference_steps": 16, "guidance_scale": 2.0, "generator": generator}
            pictures = pipeline(prompts, output_type="pt", **options).images
            named = network(pictures)[1].argmax(1).tolist()
            right = [name in fitting_classes(network, prompt) for name, prompt in zip(named, prompts, strict=True)]
            assert sum(right) >= 0.7 * len(prompts)

    def test_reference_is_of_the_shipped_files(self) -> None:
        reference = Reference.load(default_reference(ModelSection(family="demo", path="glyphs")))
        assert (reference.origin.steps, reference.origin.guidance) == (32, 2.0)
        assert reference.origin.teacher == fingerprint(GLYPHS / "teacher")
        assert reference.origin.features == fingerprint(GLYPHS / "features")

    def test_model_card_tells_licence_and_what_it_can_not_do(self) -> None:
        card = (GLYPHS / "README.md").read_text(encoding="utf-8")
        for part in ("license:", "OFL", "nearest", "ComfyUI"):
            assert part in card, part
