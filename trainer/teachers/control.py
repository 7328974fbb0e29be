"""ControlNets and T2I-adapters beside a UNet: frozen networks that read a hint and steer every role alike."""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetModel, T2IAdapter
from torch import Tensor, nn

from ...flash_core.denoiser import Conditioning


class Control:
    """A frozen network that turns a hint into what is added inside the UNet.

    Args:
        network: a ControlNet, which looks at the noisy latents too, or a T2I-adapter, which reads the hint alone.
        scale: factor of what is added; the paper's for the SDXL canny adapter is 0.8.
    """

    def __init__(self, network: ControlNetModel | T2IAdapter, scale: float = 1.0) -> None:
        self.network: nn.Module = network.requires_grad_(False).eval()
        self.scale = scale

    def __call__(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, added: dict[str, Any]) -> dict[str, Any]:
        """The UNet's arguments for the hint (B, 3, H, W) in [0, 1].

        Args:
            z_t: (B, C, h, w) latents without a task's further channels.
            added: what the UNet takes beside text, which ControlNets of SDXL take too.
        """
        hint = conditioning.hint
        if isinstance(self.network, T2IAdapter):
            return {"down_intrablock_additional_residuals": [state * self.scale for state in self.network(hint)]}
        down, middle = self.network(
            z_t,
            t,
            encoder_hidden_states=conditioning.cross_attention,
            controlnet_cond=hint,
            conditioning_scale=self.scale,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
