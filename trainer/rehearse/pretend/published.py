"""The published models, by what their configuration files say: they stand in for a model that can't be read.

The numbers are those of the repositories in ``Teacher.default_config`` (config.json of each part). A test compares the
parameter counts with :data:`flash_core.families.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ....flash_core.families import FAMILIES as CORE_FAMILIES
from ...config import ModelSection
from ...teachers import family
from ...teachers.loading.source import Source

VP = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}
PIXART_VP = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}  # fmt: skip
SD_X4 = {
    "sample_size": 128, "cross_attention_dim": 1024, "attention_head_dim": 8, "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024), "num_class_embeds": 1000, "use_linear_projection": True,
    "only_cross_attention": (True, True, True, False),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
PIXART = {
    "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152, "num_layers": 28,
    "in_channels": 4, "out_channels": 8, "caption_channels": 4096, "sample_size": 128, "patch_size": 2,
}  # fmt: skip
MMDIT = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
}  # fmt: skip

CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_H = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new",
}  # fmt: skip


def _vae(latents: int, scale: float, levels: tuple[int, ...] = (128, 256, 512, 512), **more: Any) -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(levels),
        "up_block_types": ("UpDecoderBlock2D",) * len(levels),
        "block_out_channels": levels,
        "layers_per_block": 2,
        "latent_channels": latents,
        "scaling_factor": scale,
        **more,
    }


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        recipe: the shipped recipe of the family.
        network: fields of the network's configuration that differ from its class's defaults.
        vae: fields of the autoencoder's configuration.
        scheduler: what its scheduler's configuration says of noise.
        encoders: name of a text encoder -> (its class in transformers, its configuration).
        tokens: of the text that the network reads.
        kind: the network's ``_class_name``.
        index: more fields of the pipeline's index.
    """

    recipe: str
    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    encoders: Mapping[str, tuple[str, Mapping[str, Any]]]
    tokens: int
    kind: str = "UNet2DConditionModel"
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def latents(self) -> int:
        """Channels of the latent."""
        return int(self.vae["latent_channels"])


ONE_CLIP = {"text_encoder": ("CLIPTextModel", CLIP_L)}
CLIP_OF_SD21 = {"text_encoder": ("CLIPTextModel", CLIP_H)}
TWO_CLIPS = {**ONE_CLIP, "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G)}
ONE_T5 = {"text_encoder": ("T5EncoderModel", T5_XXL)}
THREE = {
    "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
    "text_encoder_3": ("T5EncoderModel", T5_XXL),
}
SD_VAE, SDXL_VAE = _vae(4, 0.18215), _vae(4, 0.13025)
SD3_VAE = _vae(16, 1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
DIT, MMDIT_KIND = "PixArtTransformer2DModel", "SD3Transformer2DModel"
SD35 = MMDIT | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}

# What a recipe calls the family -> its published model.
PUBLISHED = {
    "sd15": Published("sd15", SD15, SD_VAE, VP, ONE_CLIP, 77),
    "sd21": Published("sd21", SD21, SD_VAE, VP | {"prediction_type": "v_prediction"}, CLIP_OF_SD21, 77),
    "sd_x4": Published(
        "upscaler_x4",
        SD_X4,
        _vae(4, 0.08333, (128, 256, 512)),
        VP | {"prediction_type": "v_prediction"},
        CLIP_OF_SD21,
        77,
    ),
    "sdxl": Published("sdxl", SDXL, SDXL_VAE, VP, TWO_CLIPS, 77, index={"force_zeros_for_empty_prompt": True}),
    "pixart_alpha": Published(
        "pixart", PIXART | {"use_additional_conditions": True}, SD_VAE, PIXART_VP, ONE_T5, 120, DIT
    ),
    "pixart_sigma": Published(
        "pixart_sigma", PIXART | {"use_additional_conditions": False}, SDXL_VAE, PIXART_VP, ONE_T5, 300, DIT
    ),
    "sd3": Published("sd3", MMDIT | {"pos_embed_max_size": 192}, SD3_VAE, FLOW, THREE, 77 + 256, MMDIT_KIND),
    "sd35": Published("sd35", SD35, SD3_VAE, FLOW, THREE, 77 + 256, MMDIT_KIND),
}


@dataclass(frozen=True)
class PublishedSource(Source):
    """A published model in place of one that can't be read.

    Attributes:
        family: what a recipe calls it.
        in_channels: of the network, which a task's model widens; None for the published number.
        t5: True with SD3's third text encoder.
    """

    family: str = ""
    in_channels: int | None = None
    t5: bool = True

    @property
    def name(self) -> str:
        """The family's name, with what it is."""
        return f"the published {next(one.name for one in CORE_FAMILIES if one.recipe == self.family)}"

    def part_config(self, part: str) -> dict[str, Any]:
        """Return the configuration of one part; ``""`` is the pipeline's index."""
        model, network = PUBLISHED[self.family], family(self.family).network_part
        if part == network:
            wider = {} if self.in_channels is None else {"in_channels": self.in_channels}
            return {"_class_name": model.kind, **model.network, **wider}
        if part.endswith("scheduler"):
            return {**model.scheduler}
        if part == "vae":
            return {**model.vae}
        if part in model.encoders:
            return {**model.encoders[part][1]}
        encoders = {name: made for name, made in model.encoders.items() if self.t5 or name != "text_encoder_3"}
        index: dict[str, Any] = {network: ["diffusers", model.kind], "vae": ["diffusers", "AutoencoderKL"]}
        index |= {name: ["transformers", made[0]] for name, made in encoders.items()}
        index |= {name.replace("text_encoder", "tokenizer"): ["transformers", "a tokenizer"] for name in encoders}
        kind = model.scheduler.get("_class_name", "DDIMScheduler")
        index |= {"scheduler": ["diffusers", kind]}
        index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"]} if self.family == "sd_x4" else {}
        return index | dict(model.index)


def published_source(model: ModelSection, in_channels: int | None = None) -> PublishedSource | None:
    """Return the published model of a recipe's family; None for the demo, which is always there."""
    if model.family not in PUBLISHED:
        return None
    return PublishedSource(family(model.family).default_config, None, None, model.family, in_channels, model.t5)
