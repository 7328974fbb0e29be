"""Updates a second and peak memory of distilling a family at its true size, with random weights: nothing is downloaded.

    python -m benchmarks.train_speed --family sdxl --output benchmarks/results/train_speed_sdxl.md

One update is what ``flash-diffusion distill`` does with the family's shipped recipe in its last phase, where all terms
count: the teacher's solution, the student's step, the discriminator's. Random weights cost the same as trained ones.
Pictures and prompts are encoded before training and their encoders freed, so that they are not here either; the VAE's
decoder, which previews need, is. ``--estimate`` only counts parameters; ``--tiny`` runs reduced networks, anywhere.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from rich.console import Console
from torch import nn

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.discriminator import Discriminator
from flash_diffusion.flash_core.distiller import Distiller
from flash_diffusion.flash_core.runs.schedule import WeightAverage
from flash_diffusion.trainer.config import Recipe
from flash_diffusion.trainer.distill.assembly import add_adapters
from flash_diffusion.trainer.distill.plan import AVERAGE_BYTES, BYTES, TRAINED_BYTES
from flash_diffusion.trainer.recipes import load_recipe
from flash_diffusion.trainer.rehearse.pretend.published import PUBLISHED
from flash_diffusion.trainer.teachers import family as family_class
from flash_diffusion.trainer.teachers.base import count_parameters
from flash_diffusion.trainer.teachers.denoiser import DiffusersDenoiser
from flash_diffusion.trainer.teachers.schedulers import process_from_scheduler

GIB = 2**30


FAMILIES = [name for name in PUBLISHED if name != "sd_x4"]  # the upscaler reads a noise level and a picture too


@dataclass(frozen=True)
class Measured:
    """One line of the table; seconds are of one update, memory in bytes, None where it was too much or unknown."""

    batch: int
    checkpointing: bool
    solution: float | None = None
    learning: float | None = None
    memory: int | None = None


def build_network(family: str, tiny: bool) -> nn.Module:
    """The denoising network, on the device of the context."""
    if tiny:
        from tests.families.networks import tiny_network

        return tiny_network(family)
    return family_class(family).network_class(**PUBLISHED[family].network)


def build_decoder(family: str, tiny: bool) -> nn.Module:
    """The VAE's decoding half."""
    config = {**PUBLISHED[family].vae}
    if tiny:
        config["block_out_channels"] = (32,) * len(config["block_out_channels"])
    vae = AutoencoderKL(**config)
    vae.encoder = vae.quant_conv = None
    return vae


def random_conditioning(network: nn.Module, tokens: int, batch: int, pixels: int, device: str) -> Conditioning:
    """Noise in the shape of what the network is conditioned on."""
    config = network.config
    width = next(
        config[name] for name in ("joint_attention_dim", "caption_channels", "cross_attention_dim") if config.get(name)
    )
    text = torch.randn(batch, tokens, width, device=device)
    pooled = config.get("pooled_projection_dim")
    sizes = mask = None
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * batch, dtype=torch.float32, device=device)
    if "caption_channels" in config:
        mask = torch.ones(batch, tokens, device=device)
        if config["use_additional_conditions"]:
            sizes = torch.tensor([[pixels, pixels, 1.0]] * batch, device=device)
    vector = None if pooled is None else torch.randn(batch, pooled, device=device)
    return Conditioning(cross_attention=text, attention_mask=mask, vector=vector, size_ids=sizes)


class Bench:
    """One family's networks on the device, as training has them there."""

    def __init__(self, family: str, device: str, tiny: bool) -> None:
        self.size = PUBLISHED[family]
        self.recipe: Recipe = load_recipe(self.size.recipe, ["method.teacher_steps=4"] if tiny else [])
        self.device = device
        teacher = family_class(family)
        with torch.device(device):
            network = nn.Module.to(build_network(family, tiny), dtype=getattr(torch, self.recipe.model.dtype))
            self.decoder = build_decoder(family, tiny)
        self.denoiser: DiffusersDenoiser = teacher.denoiser_class(network, process_from_scheduler(self.size.scheduler))
        add_adapters(self.denoiser, self.recipe, teacher.default_targets)
        pixels = network.config.sample_size * 8
        self.resolution = pixels if tiny else (self.recipe.data.resolution or pixels)
        self.latent_shape = (self.size.latents, self.resolution // 8, self.resolution // 8)
        with torch.no_grad(), self._autocast():
            features = self.denoiser.features(*self._inputs(1))
        self.discriminator = Discriminator([feature.shape[1] for feature in features]).to(device)
        self.distiller = Distiller(self.denoiser, self.recipe.method.settings(), discriminator=self.discriminator)
        student = self.denoiser.adapter_parameters("student")
        self.average = WeightAverage(student, self.recipe.ema)
        section = self.recipe.optimizer
        self.optimizers = [
            torch.optim.AdamW(student.values(), section.lr, fused=True),
            torch.optim.AdamW(self.discriminator.parameters(), section.discriminator_lr, fused=True),
        ]

    def measure(self, batch: int, checkpointing: bool, updates: int) -> Measured:
        """Run a few updates and as many more on the clock."""
        (self.denoiser.network.enable_gradient_checkpointing if checkpointing
         else self.denoiser.network.disable_gradient_checkpointing)()  # fmt: skip
        try:
            list(self._updates(batch, 1))
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = list(self._updates(batch, updates))
        except torch.cuda.OutOfMemoryError:
            return Measured(batch, checkpointing)
        finally:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            if self.device == "cuda":
                torch.cuda.empty_cache()
        memory = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        solution, learning = (sum(part) / updates for part in zip(*seconds, strict=True))
        return Measured(batch, checkpointing, solution, learning, memory)

    def _updates(self, batch: int, updates: int) -> Iterator[tuple[float, float]]:
        """Seconds of the teacher's solution and of all that learns from it, for each update; the same draws always."""
        generator = torch.Generator().manual_seed(0)
        phase = self.recipe.phases[-1].phase()
        for update in range(updates):
            z0 = torch.randn(batch, *self.latent_shape, generator=generator).to(self.device)
            started = self._now()
            with self._autocast():
                rollout = self.distiller.rollout(z0, self._text(batch), self._text(batch), phase, generator)
            solved = self._now()
            with self._autocast():
                step = self.distiller.student_step(rollout, phase, generator)
                self.distiller.discriminator_step(rollout, step.z_student, generator)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.average.update(update)
            yield solved - started, self._now() - solved

    def _inputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        z = torch.randn(batch, *self.latent_shape, device=self.device)
        return z, torch.full((batch,), self.denoiser.process.timestep(0.5), device=self.device), self._text(batch)

    def _text(self, batch: int) -> Conditioning:
        return random_conditioning(self.denoiser.network, self.size.tokens, batch, self.resolution, self.device)

    def _autocast(self) -> torch.autocast:
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def estimate(family: str, tiny: bool) -> list[str]:
    """What is certain without a measurement: bytes of parameters, gradients and moments, at the recipe's batch or any.

    Counted on the ``meta`` device.
    """
    recipe = load_recipe(PUBLISHED[family].recipe)
    teacher = family_class(family)
    with init_empty_weights():
        network, decoder = build_network(family, tiny), build_decoder(family, tiny)
    base, decoding = count_parameters(network), count_parameters(decoder)
    denoiser = teacher.denoiser_class(network, process_from_scheduler(PUBLISHED[family].scheduler))
    add_adapters(denoiser, recipe, teacher.default_targets)
    lora = sum(value.numel() for value in denoiser.adapter_parameters("student").values())
    parts = {
        f"base, {base / 1e6:,.1f} M parameters in {recipe.model.dtype}": base * BYTES[recipe.model.dtype],
        f"LoRA of rank {recipe.lora.rank}, {lora / 1e6:,.1f} M: itself, gradients, two moments, average": lora
        * (TRAINED_BYTES[recipe.optimizer.bits] + AVERAGE_BYTES),
        f"VAE's decoder, {decoding / 1e6:,.1f} M in float32": decoding * BYTES["float32"],
    }
    lines = [f"{name}: {size / GIB:.2f} GiB" for name, size in parts.items()]
    return [*lines, f"together {sum(parts.values()) / GIB:.2f} GiB, before activations and discriminator heads"]


def table(rows: list[Measured]) -> list[str]:
    """A Markdown table."""
    lines = [
        "| batch | gradient checkpointing | updates/s | images/s | solution, s | learning, s | peak memory, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row.batch} | {'on' if row.checkpointing else 'off'} |"
        if row.solution is None or row.learning is None:
            lines.append(f"{start} out of memory | | | | |")
            continue
        rate = 1 / (row.solution + row.learning)
        memory = "not measured" if row.memory is None else f"{row.memory / GIB:.2f}"
        lines.append(
            f"{start} {rate:.3f} | {rate * row.batch:.3f} | {row.solution:.2f} | {row.learning:.2f} | {memory} |"
        )
    return lines


def device_name(device: str) -> str:
    """The device in words."""
    if device != "cuda":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="sdxl")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4], help="batch sizes (default: 1 2 4)")
    parser.add_argument("--checkpointing", choices=["on", "off", "both"], default="both")
    parser.add_argument("--updates", type=int, default=8, help="on the clock, after one that is not (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="reduced networks, to see that it runs")
    parser.add_argument("--estimate", action="store_true", help="count parameters only; needs no device")
    parser.add_argument("--output", type=Path, help="write the table into this Markdown file as well")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(highlight=False, soft_wrap=True)
    lines = [f"# Distilling {arguments.family}{' (reduced)' if arguments.tiny else ''}", ""]
    lines += [f"- {line}" for line in estimate(arguments.family, arguments.tiny)]
    if not arguments.estimate:
        bench = Bench(arguments.family, device, arguments.tiny)
        method = bench.recipe.method
        lines += [
            "",
            f"{device_name(device)}; torch {torch.__version__}, {date.today().isoformat()}. {bench.resolution} px, "
            f"K = {method.teacher_steps} ({method.solver}), fake score: {method.fake_score}; recipe "
            f"{bench.size.recipe}, its last phase, mean of {arguments.updates} updates. Solution: the teacher's, from "
            "where each sample starts; learning: student and discriminator.",
            "",
        ]
        modes = {"on": [True], "off": [False], "both": [False, True]}[arguments.checkpointing]
        lines += table([
            bench.measure(batch, mode, arguments.updates) for batch in arguments.batch for mode in modes
        ])  # fmt: skip
    console.print("\n".join(lines), markup=False)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
