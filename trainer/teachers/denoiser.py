"""A diffusers network as a :class:`~...flash_core.denoiser.Denoiser`: one frozen base, an adapter per role."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from diffusers import ControlNetModel, ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ...flash_core.denoiser import Conditioning, Role
from ...flash_core.lora import LoraModule
from ...flash_core.process import Process
from ..errors import UserError
from .conditions.control import Control
from .lora_layers import fit_lora

# An IP-Adapter's own layers, some with the names of the UNet's layers. They get no LoRA: no file format names them.
IMAGE_ADAPTER = re.compile(r"\.processor\.|^encoder_hid_proj\.")


class _AllRead(Exception):
    """Ends a pass of the network whose hidden states are all read."""


class DiffusersDenoiser(ABC):
    """A frozen diffusers network with a LoRA adapter for each role.

    ``teacher`` is the network alone; ``student`` and ``critic`` are it with the adapter of that name. An adapter is
    float32 whatever the base is stored in, since its updates are far below bfloat16's resolution.

    Args:
        network: the backbone; frozen here.
        process: its noise process.

    Attributes:
        control: the frozen ControlNet or T2I-adapter that reads ``hint`` in every role; None without one.
        sharded: True where processes share the network's weights.
    """

    control: Control | None = None
    sharded: bool = False

    def __init__(self, network: ModelMixin, process: Process) -> None:
        self.network: ModelMixin = network.requires_grad_(False).eval()
        self._process = process
        self._role: Role = "teacher"
        self._layers: list[LoraLayer] = []

    @property
    def process(self) -> Process:
        """The noise process of the model."""
        return self._process

    @property
    def dtype(self) -> torch.dtype:
        """The type of the base's weights, and of its computation without autocast."""
        return next(
            value.dtype
            for name, value in self.network.named_parameters()
            if ".lora_" not in name and value.is_floating_point() and not name.endswith(".weight_scale")
        )

    def recompute_activations(self, checkpoint: Callable[..., Any] | None = None) -> None:
        """Keep few activations for backward passes, of the network and its ControlNet, and compute the others again.

        Args:
            checkpoint: computes a block, and computes it again in the backward pass. Default: torch's checkpointing.
        """
        for part in self._differentiated():
            part.enable_gradient_checkpointing(checkpoint)

    def keep_activations(self) -> None:
        """Keep all activations again."""
        for part in self._differentiated():
            part.disable_gradient_checkpointing()

    def _differentiated(self) -> Iterator[ModelMixin]:
        """Yield the networks that backward passes go through: a T2I-adapter reads the hint alone, and is none."""
        yield self.network
        if self.control is not None and isinstance(self.control.network, ControlNetModel):
            yield self.control.network

    # -- what a family says ----------------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the network's output (B, C, H, W); inputs have the network's dtype, except ``t`` (B,) and size ids."""

    @abstractmethod
    def feature_blocks(self) -> Sequence[nn.Module]:
        """Return the blocks whose outputs the discriminator reads, in running order."""

    def as_map(self, output: Any, z_t: Tensor) -> Tensor:
        """Return a block's output as a map (B, C, H, W); families whose blocks return tokens override this method."""
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    # -- the protocol ----------------------------------------------------------------------------------------------

    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the network's output (B, C, H, W), float32, in the current role."""
        # Sizes are whole numbers up to some thousands, which bfloat16 can't hold; networks embed them in float32.
        cast = replace(conditioning.map(self._cast), size_ids=conditioning.size_ids)
        return self.forward(z_t.to(self.dtype), t, cast).float()

    def features(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Return hidden states of several depths as maps (B, C_i, H_i, W_i), in the current role.

        The pass ends after the last block that is read. With gradient checkpointing it runs to its end: a transformer's
        blocks then run inside a checkpoint, which an exception must not leave. So it does where processes share the
        network's weights, which are given back at the end.
        """
        captured: list[Tensor] = []
        blocks = self.feature_blocks()
        ends_early = not (self.sharded or getattr(self.network, "is_gradient_checkpointing", False))

        def capture(_module: nn.Module, _inputs: Any, output: Any) -> None:
            captured.append(self.as_map(output, z_t))
            if ends_early and len(captured) == len(blocks):
                raise _AllRead

        handles = [block.register_forward_hook(capture) for block in blocks]
        try:
            with suppress(_AllRead):
                self.predict(z_t, t, conditioning)
        finally:
            for handle in handles:
                handle.remove()
        return captured

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Switch to ``role`` inside the block, and back to the previous one after it.

        An adapter takes gradients while its role is on: run the backward pass inside the block as well.
        """
        previous = self._role
        self._switch(role)
        try:
            yield
        finally:
            self._switch(previous)

    def _switch(self, role: Role) -> None:
        if role == self._role:
            return
        if role != "teacher" and not self.has_adapter(role):
            raise ValueError(f"there is no {role} adapter; call add_adapter({role!r}, ...) first")
        for layer in self._layers:
            if role == "teacher":
                layer.enable_adapters(False)
            else:
                # Gradients are on for the active adapter alone: a step taken for one role can't touch another.
                layer.set_adapter([role])
                layer.enable_adapters(True)
        self._role = role

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    # -- adapters --------------------------------------------------------------------------------------------------

    def has_adapter(self, role: Role) -> bool:
        """Return whether the role has an adapter."""
        return any(role in layer.lora_A for layer in self._layers)

    def add_adapter(self, role: Role, rank: int, alpha: float, targets: Sequence[str], seed: int = 0) -> None:
        """Give a role its LoRA, which changes nothing until it is trained (its up half is 0).

        Args:
            rank, alpha: the update is scaled by ``alpha / rank``.
            targets: ends of the adapted layers' paths.
            seed: of the random down half.

        Raises:
            UserError: no layer's path ends in a target.
        """
        paths = [path for path, module in self.network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        paths = [path.removesuffix(".base_layer") for path in paths if ".lora_" not in path]
        fixed = [path for path in paths if IMAGE_ADAPTER.search(path)]
        paths = [path for path in paths if path not in set(fixed)]
        for target in targets:
            if not any(path == target or path.endswith(f".{target}") for path in paths):
                names = sorted({path.rsplit(".", 1)[-1] for path in paths} - {str(index) for index in range(10)})
                raise UserError(
                    f"lora.targets: no layer of this model is called {target!r}; expected one of {', '.join(names)}"
                )
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=list(targets),
            exclude_modules=fixed or None,
        )
        self._inject(role, config, seed)

    def _inject(self, role: Role, config: LoraConfig, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                # PEFT warns when a network gets a second adapter. Here this is on purpose: the roles share one base.
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                inject_adapter_in_model(config, self.network, adapter_name=role)
        self._layers = [module for module in self.network.modules() if isinstance(module, LoraLayer)]
        # PEFT puts an adapter where its layer's weight is, which may wait elsewhere.
        for layer in self._layers:
            for half in (layer.lora_A, layer.lora_B):
                if role in half:
                    half[role].to(self.network.device, torch.float32)
        # Injection leaves the new adapter on, whatever the role.
        current, self._role = self._role, role
        self._switch(current)

    def adapter_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """Return the parameters of a role's adapter by name."""
        return {name: value for name, value in self.network.named_parameters() if f".{role}." in name}

    def adapter(self, role: Role) -> dict[str, LoraModule]:
        """Return the layers of a role's adapter by module path, as written to a file."""
        return {
            path: LoraModule(
                path,
                module.lora_A[role].get_parameter("weight"),
                module.lora_B[role].get_parameter("weight"),
                float(module.lora_alpha[role]),
            )
            for path, module in self.network.named_modules()
            if isinstance(module, LoraLayer) and role in module.lora_A
        }

    def load_adapter(self, role: Role, modules: Mapping[str, LoraModule]) -> None:
        """Load the LoRA of a file as a role's adapter.

        Args:
            modules: as :class:`~...flash_core.lora.LoraFile` holds them; every one must belong to this network.

        Raises:
            UserError: the file does not fit this network.
        """
        fitted = fit_lora(self.network, modules)
        ranks = {path: module.rank for path, module in fitted.items()}
        # PEFT reads names as patterns: exact ones, since "proj_out" is also the end of other layers' names.
        exact = {path: re.escape(path) for path in fitted}
        config = LoraConfig(
            r=max(ranks.values()),
            target_modules="|".join(exact.values()),
            rank_pattern={f"^{exact[path]}": rank for path, rank in ranks.items()},
            alpha_pattern={f"^{exact[path]}": module.scale * module.rank for path, module in fitted.items()},
        )
        self._inject(role, config, seed=0)
        with torch.no_grad():
            for path, source in fitted.items():
                self.network.get_parameter(f"{path}.lora_A.{role}.weight").copy_(source.down)
                self.network.get_parameter(f"{path}.lora_B.{role}.weight").copy_(source.up)
