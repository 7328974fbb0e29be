"""The embedded demo: its pictures, its latents, its weights, and the training that made them."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from flash_diffusion.trainer.demo.assets import CONTROLS, DATA, FEATURES, GLYPHS, LORAS, ROOT, TASK_ADAPTERS, TEACHER
from flash_diffusion.trainer.demo.making import emoji_packages
from flash_diffusion.trainer.demo.making.autoencoder import AutoencoderTraining, held_out
from flash_diffusion.trainer.demo.making.features import accuracy, augment
from flash_diffusion.trainer.demo.making.patch_pca import PatchPCA, psnr
from flash_diffusion.trainer.demo.making.teacher import command
from flash_diffusion.trainer.demo.making.teacher.training import WARM_UP, Trainer, TrainingSet, schedule
from flash_diffusion.trainer.demo.shards import TEACHER_STYLE, Caption, Pictures, load_pictures, shard_path, write_shard
from flash_diffusion.trainer.metrics.feature_network import FeatureNetwork

FITTED = ("fluent3d", "noto")  # the styles from which the code was fitted
STYLES = (*FITTED, "flat")


@pytest.fixture(scope="module")
def fluent() -> Pictures:
    return load_pictures(TEACHER_STYLE)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(TEACHER, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


class TestPictures:
    def test_every_style_has_the_same_subjects_with_a_licence(self) -> None:
        codes = {}
        for style in STYLES:
            loaded = load_pictures(style)
            assert loaded.images.shape == (len(loaded), 3, 128, 128)
            assert loaded.images.dtype == torch.uint8
            names = [caption.name for caption in loaded.captions]
            assert len(set(names)) == len(names) == len(loaded)
            assert all(name == name.lower() and name for name in names)
            assert {caption.license for caption in loaded.captions} == {emoji_packages.LICENSES[style]}
            assert (DATA / f"LICENSE.{style}.txt").read_text().strip()
            codes[style] = [caption.code for caption in loaded.captions]
        assert codes["fluent3d"] == codes["noto"] == codes["flat"]
        for style in ("fluent3d", "flat"):
            assert "Microsoft" in (DATA / f"LICENSE.{style}.txt").read_text()
        assert "Apache License" in (DATA / "LICENSE.noto.txt").read_text()

    def test_general_captions_are_shared_and_differ_from_names(self, fluent: Pictures) -> None:
        general = [caption.general for caption in fluent.captions]
        assert min(general.count(caption) for caption in general) >= 4
        assert not {caption.name for caption in fluent.captions} & (set(general) - {"heart"})

    def test_a_shard_is_an_ordinary_tar_of_triples(self) -> None:
        with tarfile.open(shard_path(TEACHER_STYLE)) as tar:
            members = tar.getnames()
            fox = tar.extractfile("1f98a.txt")
            assert fox is not None
            assert fox.read() == b"fox"
        stems = {Path(name).stem for name in members}
        assert sorted(members) == sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("json", "txt", "webp"))

    def test_writing_is_reproducible_and_reading_gives_the_captions_back(self, tmp_path: Path) -> None:
        caption = Caption("1f600", "grinning face", "smiley face", "smiley", "test", "MIT")
        for folder in ("first", "second"):
            count = write_shard([(caption, Image.new("RGB", (128, 128), "red"))], shard_path("test", tmp_path / folder))
            assert count == 1
        first, second = (shard_path("test", tmp_path / folder).read_bytes() for folder in ("first", "second"))
        assert first == second
        loaded = load_pictures("test", tmp_path / "first")
        assert loaded.captions == [caption]
        # WebP is not exact, but a flat red stays one.
        assert (loaded.images[0].float().mean((1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 4

    def test_unknown_style_error_lists_the_styles(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"'crayon'.*flat, fluent3d, noto.*demo data"):
            load_pictures("crayon")

    def test_package_reads_the_same_from_tarball_and_folder(self, tmp_path: Path) -> None:
        picture = io.BytesIO()
        half = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
        half.paste((0, 0, 255, 255), (0, 128, 256, 256))
        half.save(picture, "WEBP", lossless=True)
        asset = tmp_path / "unpacked" / "lobehub-fluent-emoji-3d-1.1.0" / "assets" / "2764-fe0f.webp"
        asset.parent.mkdir(parents=True)
        asset.write_bytes(picture.getvalue())
        (tmp_path / "packed").mkdir()
        with tarfile.open(tmp_path / "packed" / "lobehub-fluent-emoji-3d-1.1.0.tgz", "w:gz") as tar:
            tar.add(asset, "package/assets/2764-fe0f.webp")
        for folder in ("unpacked", "packed"):
            drawn = emoji_packages.fluent3d(tmp_path / folder)("2764")
            assert drawn.size == (128, 128)
            assert drawn.getpixel((64, 16)) == (255, 255, 255)  # transparent becomes white
            assert drawn.getpixel((64, 112)) == (0, 0, 255)

    def test_a_missing_package_names_the_command_that_fetches_it(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="npm pack @iconify-json/noto"):
            emoji_packages.iconify(tmp_path, "@iconify-json/noto")

    def test_demo_files_stay_below_their_size_limit(self) -> None:
        files = [path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        flash = LORAS / "flash_demo.safetensors"
        further = [path for path in files if path.parent in (TASK_ADAPTERS, CONTROLS, LORAS) and path != flash]
        second = [path for path in files if GLYPHS in path.parents]
        first = [path for path in files if path not in further and path not in second]
        assert sum(path.stat().st_size for path in first) <= 30_000_000
        assert sum(path.stat().st_size for path in second if path.name != "reference.safetensors") <= 5_000_000
        assert (GLYPHS / "reference.safetensors").stat().st_size <= 1_500_000
        assert {path.parent for path in further} == {TASK_ADAPTERS, CONTROLS, LORAS}
        large = {
            LORAS / f"flash_demo_{task}.safetensors" for task in ("inpainting", "controlnet", "face_swap")
        }  # rank 32
        assert all(path.stat().st_size <= (5_000_000 if path in large else 2_000_000) for path in further)


def same_up_to_sign(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((torch.cosine_similarity(first, second).abs() > 0.999).all())


class TestPatchPCA:
    def test_with_all_components_nothing_is_lost(self) -> None:
        images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        code = PatchPCA.fit(images, channels=192)
        torch.testing.assert_close(code.decode(code.encode(images)), images, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
    def test_latents_have_unit_variance_on_average(self, fluent: Pictures, whitening: float) -> None:
        images = fluent.images[:20] / 255
        code = PatchPCA.fit(images, whitening=whitening)
        both = torch.cat([images, images.flip(-1)])
        variance = code.encode(both).var((0, 2, 3), unbiased=False)
        assert variance.mean().item() == pytest.approx(1, abs=1e-3)
        assert (variance[0] / variance[-1]).item() == pytest.approx(1, abs=1e-3) if whitening == 1 else variance[0] > 2

    def test_the_order_of_pictures_does_not_matter(self, fluent: Pictures) -> None:
        images = fluent.images[:40] / 255
        forward, backward = PatchPCA.fit(images), PatchPCA.fit(images.flip(0))
        assert same_up_to_sign(forward.encoder, backward.encoder)

    def test_shipped_code_equals_a_new_fit(self) -> None:
        shipped = PatchPCA.load()
        fitted = PatchPCA.fit(torch.cat([load_pictures(style).images for style in FITTED]) / 255)
        assert same_up_to_sign(shipped.encoder, fitted.encoder)


class TestAutoencoder:
    def test_reconstructs_pictures_and_agrees_with_the_code(
        self, pipeline: StableDiffusionPipeline, fluent: Pictures
    ) -> None:
        other = load_pictures("noto")
        code = PatchPCA.load()
        for images, floor in ((fluent.images[::15] / 255, 29.0), (other.images[held_out(other)] / 255, 24.0)):
            with torch.no_grad():
                latents = pipeline.vae.encode(2 * images - 1).latent_dist.mean
                decoded = pipeline.vae.decode(latents).sample / 2 + 0.5
            assert psnr(decoded.clamp(0, 1), images).mean() > floor
            assert (latents - code.encode(images)).square().mean() < 0.05

    def test_no_latent_channel_is_dead(self, pipeline: StableDiffusionPipeline, fluent: Pictures) -> None:
        images = fluent.images[::120] / 255
        latents = PatchPCA.load().encode(images)

        @torch.no_grad()
        def quality(latents: torch.Tensor) -> float:
            return psnr((pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1), images).mean().item()

        whole = quality(latents)
        for channel in range(latents.shape[1]):
            ablated = latents.clone()
            ablated[:, channel] = 0
            assert whole - quality(ablated) > 0.2, f"without latent channel {channel} nothing is missing"  # dB

    def test_posterior_has_no_variance(self, pipeline: StableDiffusionPipeline, fluent: Pictures) -> None:
        with torch.no_grad():
            posterior = pipeline.vae.encode(fluent.images[:2] / 127.5 - 1).latent_dist
        torch.testing.assert_close(posterior.sample(), posterior.mean, atol=1e-3, rtol=0)

    def test_every_stage_trains_only_its_part(self, fluent: Pictures) -> None:
        network = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
        )
        training = AutoencoderTraining.of_styles(network, [fluent, load_pictures("noto")], "cpu")
        batch = training.batch(32, 2)
        assert batch.shape == (2, 3, 32, 32)
        trained = {"decoder": {"decoder", "post_quant_conv"}, "encoder": {"encoder", "quant_conv"}}
        for stage, parts in trained.items():
            network.zero_grad()
            training.loss(stage, batch).backward()
            assert {name.split(".")[0] for name, value in network.named_parameters() if value.grad is not None} == parts


class TestTeacher:
    def test_loads_as_a_stock_pipeline_with_the_promised_noise(self, pipeline: StableDiffusionPipeline) -> None:
        assert (pipeline.unet.config.in_channels, pipeline.unet.config.cross_attention_dim) == (16, 128)
        assert pipeline.vae_scale_factor == 8
        assert pipeline.vae.config.scaling_factor == 1.0
        scheduler = pipeline.scheduler
        assert scheduler.config.prediction_type == "v_prediction"
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
        # DDPM's published schedule: prod(1 - beta) at the last step is 4.04e-5.
        assert scheduler.alphas_cumprod[-1].item() == pytest.approx(4.036e-5, rel=1e-2)

    def test_weights_are_finite_half_precision(self) -> None:
        for part in ("unet", "text_encoder", "vae"):
            (file,) = (TEACHER / part).glob("*.safetensors")
            for name, value in load_file(file).items():
                assert value.dtype == torch.float16 or not value.is_floating_point(), name
                assert value.isfinite().all(), name

    def test_captions_survive_the_tokenizer(self, pipeline: StableDiffusionPipeline, fluent: Pictures) -> None:
        tokenizer = pipeline.tokenizer
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
        for caption in fluent.captions:
            ids = tokenizer(caption.name).input_ids
            assert len(ids) <= tokenizer.model_max_length
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert text.replace(" ", "") == caption.name.replace(" ", "")
        assert tokenizer.decode(tokenizer("Ünseen, 7!").input_ids, skip_special_tokens=True).strip() == "ünseen , 7 !"

    def test_card_names_data_licences_and_figures(self) -> None:
        card = (TEACHER / "README.md").read_text()
        assert all(word in card for word in ("Fluent", "MIT", "Noto", "Apache-2.0", "PSNR", "grid.webp"))
        assert "{" not in card
        with Image.open(TEACHER / "grid.webp") as grid:
            assert min(grid.size) >= 512

    def test_draws_the_named_subjects(self, pipeline: StableDiffusionPipeline, fluent: Pictures) -> None:
        names = [caption.name for caption in fluent.captions][::15]
        drawn = pipeline(
            names,
            num_inference_steps=12,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        assert drawn.shape == (10, 3, 128, 128)
        # By chance it would be 1 in 150.
        assert accuracy(FeatureNetwork.from_pretrained(), drawn, names) >= 0.5


class TestTraining:
    @staticmethod
    def trainer(seed: int = 0) -> Trainer:
        torch.manual_seed(7)
        unet = UNet2DConditionModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=16,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=6,
            )
        )
        data = TrainingSet(
            torch.randn(5, 2, 4, 4),
            torch.randint(16, (5, 6)),
            torch.randint(16, (5, 6)),
            torch.zeros(1, 6, dtype=torch.long),
        )
        return Trainer(unet, text_encoder, data, batch_size=4, seed=seed)

    def test_resumed_training_continues_exactly(self, tmp_path: Path) -> None:
        whole = self.trainer()
        losses = [whole.update(0.5) for _ in range(6)]
        first = self.trainer()
        for _ in range(3):
            first.update(0.5)
        first.save(tmp_path / "checkpoint.safetensors")
        second = self.trainer(seed=99)
        second.load(tmp_path / "checkpoint.safetensors")
        assert second.step == 3
        assert [second.update(0.5) for _ in range(3)] == losses[3:]
        for name, value in whole.parameters.items():
            assert torch.equal(value, second.parameters[name]), name
            assert torch.equal(whole.average.tensors[name], second.average.tensors[name]), name

    def test_timesteps_are_stratified_and_captions_are_mixed(self) -> None:
        trainer = self.trainer()
        null, total = 0, 0
        for _ in range(200):
            latents, noise, timesteps, tokens = trainer.batch()
            assert latents.shape == noise.shape == (4, 2, 4, 4)
            assert sorted((timesteps // 250).tolist()) == [0, 1, 2, 3]
            null += int((tokens == 0).all(1).sum())
            total += len(tokens)
        assert null / total == pytest.approx(0.1, abs=0.04)

    def test_learning_rate_warms_up_stays_and_falls(self) -> None:
        assert schedule(0, 0.0) == pytest.approx(1 / WARM_UP)
        assert schedule(1000, 0.3) == 1.0
        assert schedule(1000, 0.65) == pytest.approx(0.51)
        assert schedule(1000, 1.0) == pytest.approx(0.02)

    def test_resuming_without_a_teacher_is_explained(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no teacher in .*--output.*without --resume"):
            command.shipped(tmp_path)

    def test_the_command_trains_exports_and_resumes(self, tmp_path: Path) -> None:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        common = ["--output", str(tmp_path / "teacher"), "--batch-size", "2"]
        checkpoint = tmp_path / "checkpoint.safetensors"
        assert command.run(parser.parse_args([*common, "--updates", "2", "--checkpoint", str(checkpoint)])) == 0
        assert json.loads((tmp_path / "teacher" / "training.json").read_text())["updates"] == 2
        assert (
            command.run(parser.parse_args([*common, "--updates", "3", "--checkpoint", str(checkpoint), "--resume"]))
            == 0
        )
        assert json.loads((tmp_path / "teacher" / "training.json").read_text())["updates"] == 3
        # Without a checkpoint it goes on from the exported weights.
        elsewhere = str(tmp_path / "other.safetensors")
        assert command.run(parser.parse_args([*common, "--updates", "1", "--checkpoint", elsewhere, "--resume"])) == 0
        assert json.loads((tmp_path / "teacher" / "training.json").read_text())["updates"] == 4
        assert str(tmp_path) not in (tmp_path / "teacher" / "unet" / "config.json").read_text()
        assert (tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


class TestFeatures:
    def test_recognises_the_pictures_even_when_disturbed(self, fluent: Pictures) -> None:
        network = FeatureNetwork.from_pretrained()
        names = [caption.name for caption in fluent.captions]
        images = fluent.images / 255
        assert accuracy(network, images, names) > 0.95
        assert accuracy(network, augment(images, torch.Generator().manual_seed(5)), names) > 0.75

    def test_shapes_sizes_and_file_size(self) -> None:
        network = FeatureNetwork.from_pretrained()
        for size in (128, 64):
            embedding, logits = network(torch.rand(2, 3, size, size))
            assert embedding.shape == (2, 64)
            assert logits.shape == (2, len(network.classes))
        assert len(network.general) == len(network.classes)
        assert (FEATURES / "model.safetensors").stat().st_size < 1_000_000

    def test_saved_network_computes_the_same(self, tmp_path: Path) -> None:
        network = FeatureNetwork(["a", "b"], ["letter", "letter"]).eval()
        network.save_pretrained(tmp_path, accuracy={"augmented": 1.0})
        images = torch.rand(3, 3, 128, 128)
        with torch.no_grad():
            before, after = network(images), FeatureNetwork.from_pretrained(tmp_path)(images)
        torch.testing.assert_close(before[0], after[0], atol=1e-2, rtol=0)
        assert json.loads((tmp_path / "config.json").read_text())["accuracy"] == {"augmented": 1.0}
