"""Build the demo's teacher as ComfyUI objects (MODEL, CLIP and VAE) from its diffusers folder.

ComfyUI's loaders recognise published models by their sizes. The demo has Stable Diffusion 1.5's architecture at other
sizes. So each part (ComfyUI's UNet, CLIP text model and AutoencoderKL) is built from its ``config.json``; core's nodes
work with these objects as usual. The weights are small, so they are float32 on every device.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ...flash_core.task_adapter import TaskAdapter, read_task_adapter, with_task_adapter

DEMO = Path(__file__).resolve().parents[2] / "trainer" / "demo"
TEACHER = DEMO / "teacher"
SHIPPED_LORAS = DEMO / "lora"
SHIPPED_ADAPTERS = DEMO / "control"
TASK_ADAPTERS = DEMO / "tasks"
TEXT_TO_IMAGE = "text-to-image"

DTYPE = torch.float32
VAE_LEVELS = 4  # the only number that ComfyUI's reader of diffusers VAEs knows: a downscale of 8

# diffusers' names and ComfyUI's: "linear" differs.
BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "squaredcos_cap_v2"}
PREDICTIONS = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
}


def read_config(folder: Path, part: str, name: str = "config.json") -> dict[str, Any]:
    """Read the JSON file ``folder/part/name``; raise FileNotFoundError with its path if it is missing."""
    path = folder / part / name
    if not path.is_file():
        raise FileNotFoundError(
            f"The demo's teacher is incomplete: {path} is missing. Reinstall this extension, or train the teacher with "
            "`flash-diffusion demo teacher`."
        )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def read_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """Read the weights of one part, in float32."""
    files = sorted((folder / part).glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"Expected one .safetensors file in {folder / part}, found {len(files)}. Reinstall this extension."
        )
    weights, _ = comfy.utils.load_torch_file(str(files[0]), safe_load=True, return_metadata=True)
    return {key: value.to(DTYPE) if value.is_floating_point() else value for key, value in weights.items()}


def require(part: str, config: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError where a value in ``config`` differs from ComfyUI's class for this part."""
    wrong = {key: config[key] for key, value in expected.items() if key in config and config[key] != value}
    if wrong:
        wanted = {key: expected[key] for key in wrong}
        raise ValueError(
            f"ComfyUI cannot run this teacher's {part}: its config.json has {wrong}, but ComfyUI's class needs "
            f"{wanted}. Train the teacher with these values."
        )


def load_strictly(part: str, missing: list[str], unexpected: list[str]) -> None:
    """Raise ValueError where weights are missing or unexpected."""
    if missing or unexpected:
        raise ValueError(
            f"The weights of the teacher's {part} do not fit its config.json: {len(missing)} are missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} are unexpected ({', '.join(unexpected[:3])}). Reinstall "
            "this extension."
        )


class DemoModelConfig(comfy.supported_models_base.BASE):
    """The settings for ComfyUI's model base class, without its guesses from channel counts."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012  as in ComfyUI; the heads are in unet_config
    supported_inference_dtypes = [DTYPE]  # noqa: RUF012
    memory_usage_factor = 1.0

    def __init__(
        self,
        unet_config: dict[str, Any],
        latent_format: comfy.latent_formats.LatentFormat,
        sampling_settings: dict[str, Any],
        prediction: comfy.model_base.ModelType,
        inpainting: bool = False,
    ) -> None:
        super().__init__(unet_config)
        self.inpainting = inpainting
        self.latent_format = latent_format
        self.sampling_settings = sampling_settings
        self.prediction = prediction
        self.set_inference_dtype(DTYPE, None)

    def model_type(self, state_dict: dict[str, Tensor], prefix: str = "") -> comfy.model_base.ModelType:
        """Return the UNet's prediction."""
        return self.prediction

    def inpaint_model(self) -> bool:
        """Return whether the further channels are a mask and the masked picture."""
        return self.inpainting


class DemoLatentFormat(comfy.latent_formats.LatentFormat):
    """The demo's latents, with the linear map to colours for live previews."""

    def __init__(self, channels: int, scale_factor: float, colours: Tensor) -> None:
        """Set the map ``colours`` (channels + 1, 3); its last row is the offset."""
        self.latent_channels = channels
        self.scale_factor = scale_factor
        self.latent_rgb_factors = colours[:-1].tolist()
        self.latent_rgb_factors_bias = colours[-1].tolist()


class DemoTextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text model with the vocabulary size of its config instead of 49408."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, device: torch.device, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        embedding = operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
        self.set_input_embeddings(embedding)


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return ComfyUI's UNet arguments for a diffusers ``UNet2DConditionModel`` of Stable Diffusion's kind.

    Raises:
        ValueError: ComfyUI's UNet does not have a feature of the config.
    """
    require(
        "UNet",
        config,
        {
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
            "act_fn": "silu",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "center_input_sample": False,
            "class_embed_type": None,
            "addition_embed_type": None,
            "time_embedding_type": "positional",
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "resnet_time_scale_shift": "default",
            "only_cross_attention": False,
            "dual_cross_attention": False,
            "upcast_attention": False,
        },
    )
    widths = config["block_out_channels"]
    levels = len(widths)
    layers = config["layers_per_block"]
    depth = config.get("transformer_layers_per_block", 1)
    heads = config.get("num_attention_heads") or config["attention_head_dim"]  # diffusers' old name of the number
    if not all(isinstance(value, int) for value in (layers, depth, heads)):
        raise ValueError(
            "ComfyUI's UNet needs the same number of layers, transformer layers and heads at all levels; got "
            f"{layers}, {depth} and {heads}."
        )
    if any(width % widths[0] for width in widths):
        raise ValueError(f"ComfyUI's UNet needs widths that are multiples of the first width; got {widths}.")
    attention = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    if [kind.startswith("CrossAttn") for kind in config["up_block_types"]] != attention[::-1]:
        raise ValueError("ComfyUI's UNet needs attention in the same levels of the down blocks and the up blocks.")
    return {
        "image_size": 32,
        "use_checkpoint": False,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * levels,
        "transformer_depth": [depth * attention[level] for level in range(levels) for _ in range(layers)],
        "transformer_depth_output": [depth * attention[level] for level in range(levels) for _ in range(layers + 1)],
        "transformer_depth_middle": depth,
        "use_linear_in_transformer": config.get("use_linear_projection", False),
        "context_dim": config["cross_attention_dim"],
        "num_heads": heads,
        "num_head_channels": -1,
    }


def sampling_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return ComfyUI's noise schedule for a diffusers scheduler's config."""
    schedule = config["beta_schedule"]
    if schedule not in BETA_SCHEDULES:
        raise ValueError(f"ComfyUI has no beta schedule {schedule!r}; expected one of {', '.join(BETA_SCHEDULES)}.")
    return {
        "beta_schedule": BETA_SCHEDULES[schedule],
        "linear_start": config["beta_start"],
        "linear_end": config["beta_end"],
        "timesteps": config["num_train_timesteps"],
        "zsnr": config.get("rescale_betas_zero_snr", False),
    }


def build_model(folder: Path, colours: Tensor, adapter: TaskAdapter | None = None) -> comfy.model_patcher.ModelPatcher:
    """Build the UNet with its noise schedule.

    Args:
        folder: the teacher's, in diffusers' layout.
        colours: see :func:`preview_colours`.
        adapter: makes the UNet the teacher of a further task. Default: text-to-image.
    """
    config = read_config(folder, "unet")
    latent_channels = config["in_channels"]
    weights = read_weights(folder, "unet")
    if adapter is not None:
        weights = with_task_adapter(weights, adapter)
        config = {**config, "in_channels": latent_channels + adapter.extra_channels}
    scheduler = read_config(folder, "scheduler", "scheduler_config.json")
    if scheduler["prediction_type"] not in PREDICTIONS:
        raise ValueError(
            f"Expected a prediction_type of {', '.join(PREDICTIONS)}, got {scheduler['prediction_type']!r}."
        )
    scale_factor = read_config(folder, "vae")["scaling_factor"]
    model_config = DemoModelConfig(
        unet_config(config),
        DemoLatentFormat(latent_channels, scale_factor, colours),
        sampling_settings(scheduler),
        PREDICTIONS[scheduler["prediction_type"]],
        inpainting=adapter is not None and adapter.task == "inpainting",
    )
    model = model_config.get_model({})
    names = comfy.utils.unet_to_diffusers(model_config.unet_config)  # diffusers' name -> ComfyUI's
    renamed = {names.get(key, key): value for key, value in weights.items()}
    outcome = model.diffusion_model.load_state_dict(renamed, strict=False)
    load_strictly("UNet", outcome.missing_keys, outcome.unexpected_keys)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def build_clip(folder: Path, embedding_directory: list[str] | None = None) -> comfy.sd.CLIP:
    """Build the text encoder and its tokenizer.

    Args:
        folder: the teacher's, in diffusers' layout.
        embedding_directory: folders of textual inversions. Default: none.
    """
    config = read_config(folder, "text_encoder")
    require("text encoder", config, {"layer_norm_eps": 1e-5})
    tokenizer = functools.partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(folder / "tokenizer"),
        max_length=config["max_position_embeddings"],
        embedding_size=config["hidden_size"],
        pad_token=config["pad_token_id"],
    )
    text_model = functools.partial(
        comfy.sd1_clip.SDClipModel,
        max_length=config["max_position_embeddings"],
        textmodel_json_config=config,
        model_class=DemoTextModel,
        special_tokens={
            "start": config["bos_token_id"],
            "end": config["eos_token_id"],
            "pad": config["pad_token_id"],
        },
        return_projected_pooled=False,
    )
    target = comfy.supported_models_base.ClipTarget(
        functools.partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        functools.partial(comfy.sd1_clip.SD1ClipModel, clip_model=text_model),
    )
    clip = comfy.sd.CLIP(target, embedding_directory=embedding_directory, model_options={"dtype": DTYPE})
    weights = read_weights(folder, "text_encoder")
    weights.pop("text_model.embeddings.position_ids", None)  # a constant in files of older transformers
    # CLIPTextModel has no projection. ComfyUI's class has one, but the demo does not use its output.
    weights["text_projection.weight"] = torch.eye(config["hidden_size"], dtype=DTYPE)
    missing, unexpected = clip.load_sd(weights)
    load_strictly("text encoder", missing, unexpected)
    return clip


def build_vae(folder: Path) -> comfy.sd.VAE:
    """Build the VAE, for images with sides that are multiples of 8."""
    config = read_config(folder, "vae")
    require(
        "VAE",
        config,
        {
            "norm_num_groups": 32,
            "act_fn": "silu",
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "mid_block_add_attention": True,
            "shift_factor": None,
        },
    )
    widths = config["block_out_channels"]
    if len(widths) != VAE_LEVELS:
        raise ValueError(f"ComfyUI needs a VAE of {VAE_LEVELS} levels (a downscale of 8); got {len(widths)}.")
    if any(width % widths[0] for width in widths):
        raise ValueError(f"ComfyUI's VAE needs widths that are multiples of the first width; got {widths}.")
    channels = config["latent_channels"]
    layout = {
        "double_z": True,
        "z_channels": channels,
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    weights = read_weights(folder, "vae")
    vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": layout, "embed_dim": channels}}, dtype=DTYPE)
    vae.latent_channels = channels  # for tiled encoding; with a config ComfyUI leaves it at 4
    loaded = sum(value.numel() for value in vae.get_sd().values())
    given = sum(value.numel() for value in weights.values())
    if loaded != given:
        raise ValueError(
            f"The weights of the teacher's VAE do not fit its config.json: the file has {given} values, expected "
            f"{loaded}. Reinstall this extension."
        )
    return vae


def preview_colours(vae: comfy.sd.VAE, scale_factor: float, pictures: int = 8, size: int = 16) -> Tensor:
    """Fit a linear map from a latent position to its mean colour, for ComfyUI's live previews.

    The map is a least-squares fit on decoded random latents.

    Args:
        vae: decodes the latents.
        scale_factor: of the latents.
        pictures: number of random latents. Default: 8.
        size: their sides. Default: 16.

    Returns:
        (channels + 1, 3) for colours in -1..1; the last row is the offset.
    """
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(pictures, vae.latent_channels, size, size, generator=generator)
    images = vae.decode(latents / scale_factor).movedim(-1, 1).cpu().float()  # (B, 3, 8 size, 8 size) in 0..1
    colours = torch.nn.functional.adaptive_avg_pool2d(images, size) * 2 - 1
    features = (
        torch.cat([latents, torch.ones_like(latents[:, :1])], 1).movedim(1, -1).reshape(-1, vae.latent_channels + 1)
    )
    solution: Tensor = torch.linalg.lstsq(features, colours.movedim(1, -1).reshape(-1, 3)).solution
    return solution


def demo_tasks() -> list[str]:
    """Return the tasks for which the demo has a teacher."""
    return [TEXT_TO_IMAGE, *sorted(file.stem for file in TASK_ADAPTERS.glob("*.safetensors"))]


def build_demo(
    folder: Path = TEACHER, embedding_directory: list[str] | None = None, adapter: Path | None = None
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """Build MODEL, CLIP and VAE of a teacher.

    Args:
        folder: in the layout of a diffusers ``StableDiffusionPipeline``. Default: the embedded teacher.
        embedding_directory: folders of textual inversions. Default: none.
        adapter: a task adapter's file, merged into the UNet. Default: none.
    """
    vae = build_vae(folder)
    colours = preview_colours(vae, read_config(folder, "vae")["scaling_factor"])
    if not math.isfinite(float(colours.sum())):
        raise ValueError(
            f"The VAE in {folder} decodes to NaN or infinite values, so its weights are damaged. Reinstall this "
            "extension."
        )
    task = None if adapter is None else read_task_adapter(adapter)
    return build_model(folder, colours, task), build_clip(folder, embedding_directory), vae
