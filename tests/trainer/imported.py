"""Import the trainer and the parts of diffusers and transformers that tiny models need (see ``tests/forks``)."""

from __future__ import annotations

import sys

del sys.path[0]  # this folder's files must not pass for libraries of their names

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402, F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: E402, F401

from flash_diffusion.trainer.distill import loop  # noqa: E402, F401
from flash_diffusion.trainer.evaluate.coco import zero_shot  # noqa: E402, F401
