"""PixArt-alpha and PixArt-Sigma: a transformer that reads T5's tokens by cross-attention.

Alpha also reads the picture's size and aspect ratio; Sigma does not. Both predict the noise and the noise's variance;
few-step sampling does not use the variance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor

from ....flash_core.denoiser import Conditioning
from ...config import ModelSection
from ...errors import UserError
from ..loading.source import Source
from .transformer import TransformerDenoiser, TransformerTeacher


class PixArtDenoiser(TransformerDenoiser):
    """``PixArtTransformer2DModel`` on T5's tokens and their mask, and on (height, width, aspect ratio) for alpha."""

    network: PixArtTransformer2DModel

    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the prediction: the first C channels of the transformer's output."""
        if conditioning.residuals or conditioning.vector is not None:
            raise ValueError(
                "PixArt takes text with its mask, size_ids and extra input channels; residuals or a vector were given"
            )
        sizes = conditioning.size_ids
        if (sizes is not None) != self.network.use_additional_conditions:
            wanted = "needs" if sizes is None else "takes no"
            raise ValueError(f"this PixArt model {wanted} size_ids (B, 3) of height, width and aspect ratio")
        added = {} if sizes is None else {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
        inputs = z_t if conditioning.concat is None else torch.cat([z_t, conditioning.concat], dim=1)
        output: Tensor = self.network(
            inputs,
            encoder_hidden_states=conditioning.cross_attention,
            encoder_attention_mask=conditioning.attention_mask,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None, **added},
            return_dict=False,
        )[0]
        return output[:, : z_t.shape[1]]


class PixArt(TransformerTeacher):
    """The shared code of Alpha and Sigma.

    Class attributes:
        prompt_length: the number of T5's tokens of a prompt.
    """

    network_class = PixArtTransformer2DModel
    denoiser_class = PixArtDenoiser
    # Attention, feed-forward, the embeddings of caption, timestep and size, adaLN and both ends: 55 M parameters at
    # rank 64 (arXiv 2406.02347, section 5). They are all the layers there are, and ComfyUI can patch every one of them
    # (comfy.utils.pixart_to_diffusers).
    default_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "linear_1", "linear_2", "adaln_single.linear",
        "pos_embed.proj", "proj_out",
    )  # fmt: skip
    # PixArt's pipelines have no LoRA loader of their own; PEFT is what they are given adapters with.
    loading_code = """from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

weights = load_file("{folder}/{file}")
weights = {{name.removeprefix("transformer."): value for name, value in weights.items()}}
layers = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
inject_adapter_in_model(LoraConfig(r={rank}, lora_alpha={rank}, target_modules=layers), pipe.transformer)
set_peft_model_state_dict(pipe.transformer, weights)
"""
    call_options: ClassVar[Mapping[str, Any]] = {"clean_caption": False, "use_resolution_binning": False}
    prompt_length: ClassVar[int]

    @classmethod
    def locate(cls, model: ModelSection) -> Source:
        """Return the folder or Hub name; raise UserError for a single file, which diffusers can't read for PixArt."""
        if model.path is not None and model.path.endswith(".safetensors") and Path(model.path).is_file():
            raise UserError(
                f"model.path: {model.path} is a single file, which diffusers can't read for PixArt; expected a "
                f"diffusers folder or a Hub name such as {cls.default_config}"
            )
        return super().locate(model)

    @classmethod
    def check_network(cls, config: Mapping[str, Any], name: str) -> None:
        """Check the class, and that Sigma's transformer reads no sizes."""
        kind = config.get("_class_name")
        # The published models name the class that PixArt's was once a part of; diffusers tells them by their norm.
        before_the_split = kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single"
        if kind != PixArtTransformer2DModel.__name__ and not before_the_split:
            raise UserError(f"model.family: the transformer of {name} is {kind}; expected a PixArt model")
        sized = config.get("use_additional_conditions")
        sized = config.get("sample_size", 128) == 128 if sized is None else sized  # as the class itself decides
        if sized and cls is PixArtSigma:
            raise UserError(
                f"model.family: {name} reads the picture's size, so it is a PixArt-alpha model; set model.family: "
                "pixart_alpha, or choose a PixArt-Sigma model"
            )

    def text_conditions(self, prompts: Sequence[str]) -> Conditioning:
        """Return T5's tokens (B, L, D) of the lower-cased prompts, their mask (B, L), and alpha's picture size.

        As diffusers' pipeline with ``clean_caption=False``: cleaning needs packages that few users have; without them
        the pipeline does not clean either.
        """
        hidden, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts), False, device=self.device, clean_caption=False, max_sequence_length=self.prompt_length
        )
        return self.with_size(Conditioning(cross_attention=hidden, attention_mask=mask), self.resolution)

    def size_ids(self, height: int, width: int) -> list[float]:
        """Return height, width and aspect ratio for models that read these."""
        return [height, width, height / width] if self.denoiser.network.use_additional_conditions else []

    def prompt_lengths(self) -> dict[str, int]:
        """Return the length that the pipeline is called with."""
        return {"tokenizer": self.prompt_length}

    def prompt_as_read(self, prompt: str) -> str:
        """Return the prompt in lower case, without space around it."""
        return prompt.lower().strip()


class PixArtAlpha(PixArt):
    """PixArt-alpha, 512 or 1024 pixels."""

    base = "pixart"
    pipeline_class = PixArtAlphaPipeline
    default_config = "PixArt-alpha/PixArt-XL-2-1024-MS"
    prompt_length = 120


class PixArtSigma(PixArt):
    """PixArt-Sigma: longer prompts, SDXL's VAE."""

    base = "pixart-sigma"
    pipeline_class = PixArtSigmaPipeline
    default_config = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
    prompt_length = 300
