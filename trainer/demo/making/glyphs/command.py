"""``flash-diffusion demo glyphs``: read fonts, train the second teacher's parts, and write its model card."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch

from ....files import write_text_whole
from ...assets import GLYPHS, ROOT
from ..autoencoder import export as export_autoencoder
from ..patch_pca import PCA_FILE, PatchPCA
from ..teacher.architecture import train_tokenizer
from ..teacher.command import export, shipped
from ..teacher.training import train
from . import features
from .architecture import MAX_TOKENS, build_scheduler, build_text_encoder, build_unet
from .autoencoder import GlyphAutoencoderTraining
from .card import write_card
from .fonts import CATEGORIES, WEIGHTS, Glyph, read_fonts
from .fonts import GLYPHS as CHARACTERS
from .training import GlyphLatents, GlyphTrainer, all_captions, fit_code

logger = logging.getLogger(__name__)

STAGES = ("features", "autoencoder", "teacher", "card")
CHECKPOINT = ROOT.parents[1] / "out" / "demo-glyphs" / "checkpoint.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `flash-diffusion demo glyphs`."""
    parser.add_argument(
        "--packages", type=Path, required=True, help="folder with the tarballs of npm packages @fontsource/NAME"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        help="what to make, in this order (default: %(default)s)",
    )
    parser.add_argument(
        "--updates", type=int, default=16500, help="of the teacher, those of its checkpoint included (default: 16500)"
    )
    parser.add_argument(
        "--features-updates", type=int, default=1100, help="of the network that measures (default: 1100)"
    )
    parser.add_argument(
        "--autoencoder-updates",
        nargs=2,
        type=int,
        default=[2000, 1250],
        help="of decoder and encoder (default: 2000 1250)",
    )
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="of the teacher (default: %(default)s)")
    parser.add_argument(
        "--resume", action="store_true", help="train the teacher on from the checkpoint, or else from its weights"
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="of the teacher, every few minutes")
    parser.add_argument("--output", type=Path, default=GLYPHS, help="folder to write (default: the shipped one)")


def write_captions(folder: Path) -> None:
    """Write the captions that the teacher trains on, and the captions of the pairs that it never sees."""
    every = [
        Glyph(glyph, "", kind, weight) for glyph in CHARACTERS for kind in CATEGORIES for weight in WEIGHTS.values()
    ]
    for name, unseen in (("captions.txt", False), ("unseen.txt", True)):
        captions = [glyph.caption for glyph in every if glyph.has_held_out_pair == unseen]
        write_text_whole(folder / name, "\n".join(captions) + "\n")


def run(args: argparse.Namespace) -> int:
    """Read the fonts and make the stages."""
    torch.set_flush_denormal(True)  # optimiser moments that fade to denormal numbers slow a CPU down tenfold
    torch.manual_seed(0)
    pictures, families = read_fonts(args.packages)
    pictures_seen, held_out = pictures.split()
    logger.info("%d pictures of %d families to train on, %d held out", len(pictures_seen), len(families), len(held_out))
    teacher = args.output / "teacher"
    if not (args.output / PCA_FILE).is_file():
        fit_code(pictures_seen).save(args.output)
    code = PatchPCA.load(args.output)
    write_text_whole(args.output / "fonts.json", json.dumps(families, indent=1, ensure_ascii=False) + "\n")
    write_captions(args.output)
    if "features" in args.stages:
        network = features.build_features()
        features.train(network, pictures_seen, code, args.features_updates)
        figures = features.report(network, held_out, code)
        network.save_pretrained(args.output / "features", title="the glyphs’ feature network", accuracy=figures)
        logger.info("features: %s", figures)
    if "autoencoder" in args.stages:
        training = GlyphAutoencoderTraining.of_glyphs(pictures_seen, held_out, code)
        for stage, updates in zip(("decoder", "encoder"), args.autoencoder_updates, strict=True):
            training.train(stage, updates)
            export_autoencoder(training.network, teacher / "vae")
    if "teacher" in args.stages:
        if args.resume:
            start = shipped(teacher)
            tokenizer, unet, text_encoder = start.tokenizer, start.unet, start.text_encoder
        else:
            tokenizer = train_tokenizer(all_captions(), teacher / "tokenizer", MAX_TOKENS)
            unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
        data = GlyphLatents.encoded(pictures_seen, code, tokenizer)
        trainer = GlyphTrainer(unet, text_encoder, data, learning_rate=args.learning_rate)
        if args.resume and args.checkpoint.is_file():
            trainer.load(args.checkpoint)
        elif args.resume:
            trainer.count_from(teacher)
        train(trainer, args.checkpoint, args.updates)
        trainer.save(args.checkpoint)
        export(trainer, teacher, build_scheduler())
    if "card" in args.stages:
        logger.info("%s", write_card(args.output, pictures_seen, held_out))
    return 0
