"""``flash-diffusion demo autoencoder``: train the autoencoder of the demo's latents.

The latents are DEFINED as scaled patch-PCA coefficients (`patch_pca.py`), which need no training. So the teacher can
train at once on the final latents, while decoder and encoder of a stock `AutoencoderKL` train apart, each with a fixed
target. End-to-end training in the same time still loses the picture's colours, because nothing fixes the latents. A
joint stage after the two (8 minutes) changed the PSNR by less than 0.1 dB, so there is no joint stage.
"""

from __future__ import annotations

import argparse
import logging
from copy import deepcopy
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ....flash_core.runs.schedule import warmup_cosine
from ...errors import UserError
from ...files import replace_folder
from ..assets import DATA, TEACHER
from ..shards import TEACHER_STYLE, load_pictures
from .patch_pca import LATENT_CHANNELS, PATCH, PCA_FILE, PatchPCA, psnr

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor, nn

    from ..shards import Pictures

logger = logging.getLogger(__name__)

STAGES = ("decoder", "encoder")


def build_autoencoder() -> AutoencoderKL:
    """Return a stock `AutoencoderKL`, factor 8, 3.2 M parameters.

    64 channels at full size, although 32 would cost a third less: ComfyUI's decoder has 32 normalisation groups, and a
    group of one channel would erase that channel's level, and with it the picture's colours.
    """
    from diffusers import AutoencoderKL

    network: AutoencoderKL = AutoencoderKL(
        block_out_channels=(64, 64, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32,
        sample_size=16 * PATCH,
        scaling_factor=1.0,
    )
    return network


def reconstruction_loss(images: Tensor, reference: Tensor) -> Tensor:
    """Return absolute error + 4 x squared error + 0.5 x error of neighbours' differences, which keeps edges sharp."""
    error = images - reference
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges


def held_out(pictures: Pictures) -> Tensor:
    """Return (N,) bool, True for pictures that the autoencoder never sees: every tenth subject of the other styles.

    The autoencoder trains on all of the teacher's own pictures, because the teacher draws them.
    """
    return torch.tensor([c.style != TEACHER_STYLE and i % 10 == 9 for i, c in enumerate(pictures.captions)])


class AutoencoderTraining:
    """The two stages that fill an `AutoencoderKL` with the patch-PCA code.

    - "decoder": pictures from exact latents with a little noise, because the teacher's samples are not exact either.
    - "encoder": regression of the exact latents.

    Both stages start on crops, where an update is cheap and most is learnt, and end on whole pictures: GroupNorm's
    statistics differ between crops and pictures, and training on crops alone loses 3 dB on pictures.
    """

    # Until this share of the time: size in pixels, crops an update.
    CROPS: tuple[tuple[float, int, int], ...] = ((0.3, 32, 8), (0.6, 64, 4), (1.0, 128, 2))
    NOISE = 0.08  # standard deviation, of latents with unit variance, at most

    def __init__(
        self,
        network: AutoencoderKL,
        code: PatchPCA,
        images: Tensor,
        measured: dict[str, Tensor],
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        """Prepare to train `network` on the `code` of `images` (N, 3, H, W) uint8; `measured` are pictures by name."""
        # diffusers' wrapper of ``to`` hides the method's parameters.
        placed: AutoencoderKL = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-arg]
        self.network = placed.train()
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.code = PatchPCA(*(tensor.to(device) for tensor in astuple(code)))
        self.images = images.to(device)
        self.measured = {name: pictures.to(device) / 255 for name, pictures in measured.items()}

    @classmethod
    def of_styles(cls, network: AutoencoderKL, pictures: list[Pictures], device: str) -> AutoencoderTraining:
        """Prepare to train on all pictures of the styles but the held-out ones."""
        images, unseen = (
            torch.cat([style.images[held_out(style) ^ kept] for style in pictures]) for kept in (True, False)
        )
        # A fifth of the teacher's pictures is enough to measure on.
        return cls(network, PatchPCA.load(), images, {"teacher": pictures[0].images[::5], "held_out": unseen}, device)

    def batch(self, size: int, count: int) -> Tensor:
        """Return crops on the block grid, half of them mirrored: (count, 3, size, size) in [0, 1]."""
        index = torch.randint(len(self.images), (count,), generator=self.generator)
        images = self.images[index.to(self.device)] / 255
        mirrored = torch.rand(len(images), 1, 1, 1, generator=self.generator).to(self.device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
        places = (images.shape[-1] - size) // PATCH + 1
        corners = (PATCH * torch.randint(places, (count, 2), generator=self.generator)).tolist()
        crops = [image[:, y : y + size, x : x + size] for image, (y, x) in zip(images, corners, strict=True)]
        return torch.stack(crops).contiguous(memory_format=torch.channels_last)

    def loss(self, stage: str, images: Tensor) -> Tensor:
        """Return the stage's loss on a batch."""
        target = self.code.encode(images)
        if stage == "encoder":
            return F.mse_loss(self.encode(images), target)
        level = self.NOISE * torch.rand(len(images), 1, 1, 1, generator=self.generator)
        noise = level * torch.randn(target.shape, generator=self.generator)
        return reconstruction_loss(self.decode(target + noise.to(self.device)), images)

    def encode(self, images: Tensor) -> Tensor:
        """Return the network's latents (the posterior's mean) of images in [0, 1]."""
        latents: Tensor = self.network.encode(2 * images - 1).latent_dist.mean
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Return the network's images, about [0, 1], of latents."""
        images: Tensor = (self.network.decode(latents).sample + 1) / 2
        return images

    def train(self, stage: str, updates: int, learning_rate: float = 1e-3) -> None:
        """Train one stage with a cosine learning rate."""
        parts: dict[str, list[nn.Module | None]] = {
            "decoder": [self.network.decoder, self.network.post_quant_conv],
            "encoder": [self.network.encoder, self.network.quant_conv],
        }
        parameters = [parameter for part in parts[stage] if part is not None for parameter in part.parameters()]
        optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), fused=True)
        for step in range(updates):
            progress = step / updates
            _, size, count = next(entry for entry in self.CROPS if progress < entry[0])
            loss = self.loss(stage, self.batch(size, count))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warmup_cosine(step, progress, warmup=50, final=0.02)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % 500 == 0:
                logger.info("%s: update %d of %d  loss %.4f", stage, step + 1, updates, loss.item())
        logger.info("%s: %d updates; %s", stage, updates, self.measure())

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the PSNR in dB from exact latents and through the encoder, and the encoder's latent error."""
        self.network.eval()
        figures = {}
        for name, images in self.measured.items():
            batches = images.split(16)
            exact = torch.cat([self.decode(self.code.encode(batch)) for batch in batches])
            latents = torch.cat([self.encode(batch) for batch in batches])
            through = torch.cat([self.decode(batch) for batch in latents.split(16)])
            figures[f"{name}_from_exact"] = psnr(exact.clamp(0, 1), images).mean().item()
            figures[f"{name}"] = psnr(through.clamp(0, 1), images).mean().item()
            figures[f"{name}_latent_mse"] = F.mse_loss(latents, self.code.encode(images)).item()
        self.network.train()
        return {name: round(value, 4) for name, value in figures.items()}


def fix_posterior(network: AutoencoderKL) -> None:
    """Make the encoder's log-variance a constant -20: the code is deterministic, and `sample()` equals `mean`.

    The stages train only the mean; the log-variance would depend on the initial weights.
    """
    with torch.no_grad():
        convolution = network.quant_conv
        assert convolution is not None
        assert convolution.bias is not None
        convolution.weight[LATENT_CHANNELS:] = 0
        convolution.bias[LATENT_CHANNELS:] = -20


def export(network: AutoencoderKL, folder: Path) -> None:
    """Write the autoencoder in half precision into `folder`, with a constant posterior."""
    # diffusers' wrapper of ``to`` hides the method's parameters.
    copy: AutoencoderKL = deepcopy(network).cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-arg]
    fix_posterior(copy)
    replace_folder(folder, copy.half().save_pretrained)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `flash-diffusion demo autoencoder`."""
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        help="stages to train, in order (default: %(default)s)",
    )
    parser.add_argument(
        "--updates", nargs="+", type=int, default=[2000, 1000], help="updates of each stage (default: 2000 1000)"
    )
    parser.add_argument("--resume", action="store_true", help="start from the weights in --output")
    parser.add_argument(
        "--output", type=Path, default=TEACHER, help="folder in diffusers' layout; its `vae` is replaced"
    )
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda, mps (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Fit the latents' code where it is missing, train the stages, and write the autoencoder after each stage."""
    from diffusers import AutoencoderKL

    if len(args.updates) != len(args.stages):
        raise UserError(f"--updates has {len(args.updates)} values for {len(args.stages)} stages; give one per stage")
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    pictures = [load_pictures(style) for style in (TEACHER_STYLE, "noto")]
    if not (DATA / PCA_FILE).is_file():
        PatchPCA.fit(torch.cat([style.images for style in pictures]) / 255).save()
    folder = args.output / "vae"
    network = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32) if args.resume else build_autoencoder()
    training = AutoencoderTraining.of_styles(network, pictures, args.device)
    for stage, updates in zip(args.stages, args.updates, strict=True):
        training.train(stage, updates)
        export(network, folder)
    return 0
