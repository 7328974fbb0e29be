"""CLIP score: the cosine between CLIP's embeddings of a picture and of its caption (arXiv 2104.08718).

Papers print the mean over all pictures, at most 1 (torchmetrics: at most 100).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import fingerprint

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor
    from transformers import CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase

# ViT-g/14: used for InstaFlow's figures, which the paper compares with, and in GigaGAN's script.
DEFAULT = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"


class ClipScorer:
    """A CLIP model with its tokenizer and its picture processor.

    Attributes:
        name: the model's name, with a hash or a revision.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, processor: CLIPImageProcessor, name: str
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name

    @classmethod
    def load(cls, source: str, device: torch.device | str, option: str = "--clip") -> ClipScorer:
        """Load a CLIP in transformers' layout, in float32; its weights must be .safetensors.

        Args:
            source: folder or Hub name.
            option: the option of the command line that names the source, for errors.

        Raises:
            UserError: the model can't be loaded.
        """
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        try:
            model = CLIPModel.from_pretrained(source, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(source)
            # Not AutoImageProcessor: its class needs torchvision, and resizes a little differently.
            processor = CLIPImageProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{option}: {source!r} can't be loaded ({reason}); expected a folder or a Hub name of a CLIP for "
                "transformers with model.safetensors, tokenizer and preprocessor_config.json"
            ) from error
        if Path(source).is_dir():
            name = f"{Path(source).name} ({fingerprint(Path(source))})"
        else:
            name = f"{source} ({str(model.config._commit_hash)[:12]})"
        return cls(model.to(device), tokenizer, processor, name)

    def __call__(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Return the cosines (B,) of B pictures with their captions, float32; captions are cut at CLIP's length."""
        import torch

        texts = self.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.model.device)
        with torch.inference_mode():
            # get_image_features and get_text_features return other things in transformers 4 and 5.
            both = self.model(texts["input_ids"], pixels, texts["attention_mask"])
            return torch.nn.functional.cosine_similarity(both.image_embeds, both.text_embeds).cpu()
