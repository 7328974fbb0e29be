"""Stand-ins for what evaluations need, made on the spot: a LoRA, a COCO folder, Inception's weights, a CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from flash_diffusion.flash_core.lora import FlashMetadata, write_lora
from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.metrics.inception import Inception
from flash_diffusion.trainer.teachers import load_teacher

from ..families.pipelines import clip_tokenizer

CAPTIONS = ("red ball", "green box", "blue cone", "a yellow star", "grey cloud", "white cup")


def random_lora(model: Path, path: Path) -> Path:
    """A random LoRA of a Stable Diffusion 1.5 in a diffusers folder, strong enough to be seen."""
    teacher = load_teacher(ModelSection(family="sd15", path=str(model)))
    teacher.denoiser.add_adapter("student", 4, 4, ["to_q", "to_v"])
    with torch.no_grad():
        for name, value in teacher.denoiser.adapter_parameters("student").items():
            value.copy_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    metadata = FlashMetadata(
        base="sd15",
        prediction="epsilon",
        process="vp",
        timesteps={1: (999.0,)},
        title="Tiny",
        teacher_hash=teacher.weights_hash(),
    )
    write_lora(path, teacher.denoiser.adapter("student"), metadata)
    return path


def coco_folder(folder: Path, pictures: int = 12, split: str = "val2017") -> Path:
    """COCO in small: pictures of several shapes, two captions each, and ids out of order."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir()
    random = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(pictures):
        number = 900 - 7 * index
        size = ((64, 48), (40, 72), (56, 56))[index % 3]
        pixels = random.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        name = f"{number:012d}.jpg"
        picture = Image.fromarray(pixels)
        (picture.convert("L") if index == 4 else picture).save(folder / split / name)  # COCO has grey ones
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        text = CAPTIONS[index % len(CAPTIONS)]
        annotations.append({"id": 50 + index, "image_id": number, "caption": f"a later one of {text}"})
        annotations.append({"id": 20 + index, "image_id": number, "caption": f" {text.capitalize()} no. {number}.\n"})
    content = {"images": images, "annotations": annotations[::-1]}
    (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return folder


def made_up(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights that follow from their name, and keep activations in range."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    if name.endswith(("running_var", "bn.weight")):
        return 0.5 + torch.rand(shape, generator=generator)
    if name.endswith(("bn.bias", "running_mean")):
        return 0.2 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5


def inception_file(path: Path) -> Path:
    """Weights of the true shapes, in the published file's form, classifier included."""
    wanted = Inception().state_dict().items()
    tensors = {name: made_up(name, value.shape) for name, value in sorted(wanted) if "num_batches" not in name}
    torch.save({**tensors, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


def tiny_clip(folder: Path) -> Path:
    """A random CLIP of the true class with its tokenizer and picture processor, as a transformers folder."""
    tokenizer = clip_tokenizer(folder / "vocabulary", length=77)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, **text}, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
