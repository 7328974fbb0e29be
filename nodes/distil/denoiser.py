"""A ComfyUI MODEL as a :class:`~..flash_core.denoiser.Denoiser`: what the trainer distils can be distilled in a graph.

The MODEL is taken as it is, with its LoRAs, hooks and wrappers: all of that is the teacher. Latents and outputs are in
the method's convention, ``z_t = alpha_t z0 + sigma_t eps``, and never in ComfyUI's (see :func:`model_input`): the
model is called through ``BaseModel.apply_model``, so that its patches work, and what its network returned is caught on
the way, before ComfyUI makes a denoised latent of it. Catching it loses no digits where the noise is small, and holds
where there is none; patches that rewrite the denoised latent itself are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...flash_core.denoiser import Conditioning, Role
from ...flash_core.lora import LoraModule
from ...flash_core.process import NUM_TIMESTEPS, Process, broadcast
from ..shared.process import process_of
from .adapters import ModelAdapters
from .conditions import by_token_count, model_arguments, read_conditionings
from .features import Tap, capture, taps

# Networks that write into no tensor which their backward pass needs. Others do (Flux adds to its image in place), as do
# patches, and run under a guard that copies what is overwritten, which costs every operation a little.
WRITE_NOTHING_IN_PLACE = ("UNetModel", "OpenAISignatureMMDITWrapper", "PixArtMS")


class ModelDenoiser:
    """A ComfyUI MODEL whose roles share its weights; use it as a context, inside of which all training happens.

    Inside, inference mode is off and gradients are on, as ComfyUI's nodes run in inference mode; the model is loaded
    whole. Afterwards, and after an exception or an interrupt, every hook is off the model and it computes what it
    computed before, bit for bit. Gradient checkpointing is not applied.

    ``teacher`` is the MODEL alone; ``student`` and ``critic`` are it with the adapter of that name. An adapter takes
    gradients while its role is on: run the backward pass inside the block as well.

    Args:
        model: the MODEL.

    Raises:
        ValueError: the model's sampling or architecture cannot be distilled; the message says which.
    """

    def __init__(self, model: ModelPatcher) -> None:
        if getattr(model, "is_dynamic", bool)():
            model = model.get_non_dynamic_delegate()  # newer ComfyUI pages weights in and out between calls
        self.patcher = model
        self.device: torch.device = model.load_device
        self._sampling = model.get_model_object("model_sampling")
        self._process = process_of(self._sampling, to_distil=True)
        self._adapters = ModelAdapters(model, self.device)
        self._options: dict[str, Any] | None = None  # ComfyUI's model options, inside the context
        self._stack = ExitStack()

    # -- the context -----------------------------------------------------------------------------------------------

    def __enter__(self) -> ModelDenoiser:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.callback(self._adapters.detach)
            others = self.patcher.get_nested_additional_models()
            comfy.model_management.load_models_gpu([self.patcher, *others], memory_required=1e20, force_full_load=True)
            make_trainable_through(self.patcher.model)
            options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
            comfy.sampler_helpers.prepare_model_patcher(self.patcher, {}, options)
            stack.callback(self.patcher.restore_hook_patches)
            stack.callback(self.patcher.cleanup)
            self.patcher.pre_run()
            self._adapters.attach()
            stack.enter_context(_training_mode())
            patched = any(options["transformer_options"].get(name) for name in ("patches", "patches_replace"))
            if patched or type(self._network).__name__ not in WRITE_NOTHING_IN_PLACE:
                stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
            self._options, self._stack = options, stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        self._options = None
        comfy.model_management.soft_empty_cache()

    # -- the protocol ----------------------------------------------------------------------------------------------

    @property
    def process(self) -> Process:
        """How noise enters this model's latents."""
        return self._process

    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output (B, C, h, w), float32, in the current role.

        Raises:
            InterruptProcessingException: ComfyUI's, where the user interrupts.
        """
        return self._run(z_t, t, conditioning, [])[0]

    def features(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Hidden states of several depths as maps (B, C_i, H_i, W_i), in the current role."""
        return self._run(z_t, t, conditioning, taps(self._network))[1:]

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Switch to ``role`` inside the block, and back to the previous one after it."""
        if role != "teacher" and not self._adapters.has(role):
            raise ValueError(f"There is no {role} adapter; call add_adapter({role!r}, ...) first.")
        previous, self._adapters.role = self._adapters.role, role
        try:
            yield
        finally:
            self._adapters.role = previous

    # -- what ComfyUI gives ----------------------------------------------------------------------------------------

    def latents(self, samples: Tensor) -> Tensor:
        """A LATENT's samples as the network sees them (B, C, h, w): scaled, float32, on the model's device."""
        scaled = self.patcher.model.process_latent_in(samples)
        return scaled.to(self.device, torch.float32, copy=True)

    def conditions(
        self, positive: list[Any], negative: list[Any], latent_shape: tuple[int, ...]
    ) -> tuple[Conditioning, Conditioning]:
        """Two CONDITIONINGs as conditions that can be batched; see :func:`~.conditions.read_conditionings`.

        Args:
            latent_shape: (C, h, w) of the latents that will be denoised.
        """
        both = {"positive": positive, "negative": negative}
        conditions, unconditional = read_conditionings(self.patcher.model, both, latent_shape, self.device)
        return conditions, unconditional

    # -- adapters --------------------------------------------------------------------------------------------------

    def add_adapter(self, role: Role, rank: int, alpha: float, targets: Sequence[str], seed: int = 0) -> None:
        """Give a role its LoRA, float32, which changes nothing until it is trained (its up half is 0).

        Args:
            rank, alpha: the update is scaled by ``alpha / rank``.
            targets: what the adapted layers' paths end in, in diffusers' spelling.
            seed: of the down half.

        Raises:
            ValueError: a target that no layer is called.
        """
        self._entered()  # outside, in inference mode, parameters would take no gradients
        self._adapters.add(role, rank, alpha, targets, seed)

    def load_adapter(self, role: Role, modules: Mapping[str, LoraModule]) -> None:
        """Give a role the LoRA of a file, at its own scale.

        Args:
            modules: as :class:`~..flash_core.lora.LoraFile` holds them; every one must belong to this model.

        Raises:
            ValueError: it does not fit this model.
        """
        self._entered()
        self._adapters.load(role, modules.values())

    def has_adapter(self, role: Role) -> bool:
        """Whether the role has an adapter."""
        return self._adapters.has(role)

    def adapter_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The parameters of a role's adapter by name."""
        return self._adapters.parameters(role)

    def adapter(self, role: Role) -> dict[str, LoraModule]:
        """A role's adapter as :func:`~..flash_core.lora.write_lora` takes it, by diffusers' module path."""
        return self._adapters.modules(role)

    # -- the call --------------------------------------------------------------------------------------------------

    def _entered(self) -> dict[str, Any]:
        if self._options is None:
            raise RuntimeError("A ModelDenoiser is used as a context: 'with ModelDenoiser(model) as denoiser: ...'.")
        return self._options

    @property
    def _network(self) -> nn.Module:
        return self.patcher.model.diffusion_model

    def _run(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, places: list[Tap]) -> list[Tensor]:
        """The output, then the hidden states at ``places``, of the whole batch."""
        groups, results = [], []
        for rows, part in by_token_count(conditioning):
            chosen = (z_t, t) if rows is None else (z_t[rows], t[rows])
            groups.append(rows)
            results.append(self._call(*chosen, part, places))
        if len(results) == 1:
            return results[0]
        order = torch.cat(groups).argsort()
        return [torch.cat(parts)[order] for parts in zip(*results, strict=True)]

    def _call(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, places: list[Tap]) -> list[Tensor]:
        options = self._entered()
        comfy.model_management.throw_exception_if_processing_interrupted()
        model = self.patcher.model
        x, sigma = model_input(self._sampling, self._process, z_t, t)
        transformer_options = {
            **options.get("transformer_options", {}),
            "cond_or_uncond": [0],  # one batch, whatever is in it
            "uuids": [],
            "sigmas": sigma,
            "optimized_attention_override": _differentiable_attention,
        }
        arguments = {**model_arguments(conditioning), "transformer_options": transformer_options}
        outputs: list[Tensor] = []
        handle = self._network.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            with capture(self._network, places, z_t) as states:
                wrapper = options.get("model_function_wrapper")
                if wrapper is None:
                    model.apply_model(x, sigma, **arguments)
                else:
                    call = {"input": x, "timestep": sigma, "c": arguments, "cond_or_uncond": [0]}
                    wrapper(model.apply_model, call)
        finally:
            handle.remove()
        if len(outputs) != 1 or len(states) != len(places):
            raise RuntimeError(
                f"The network was called {len(outputs)} times for one prediction, and {len(states)} of {len(places)} "
                "hidden states were seen; expected once and all of them. A patch of this MODEL calls the network or "
                "its blocks in its own way: remove it before distilling."
            )
        return [outputs[0].float(), *states]


def model_input(sampling: Any, process: Process, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The latent and sigma that ``BaseModel.apply_model`` takes for ``z_t = alpha_t z0 + sigma_t eps`` at ``t``.

    ComfyUI's variance-preserving models take ``x = z0 + sigma eps`` with ``sigma = sigma_t / alpha_t`` and scale it
    back to ``z_t`` before the network sees it; its flow models take ``z_t`` and ``sigma = t / 1000``.

    Returns:
        ``(x, sigma)``, (B, C, h, w) and (B,).
    """
    if process.kind == "flow":
        return z_t, t.float() / NUM_TIMESTEPS
    index = t.round().long() if t.is_floating_point() else t.long()
    sigma = sampling.sigmas.to(z_t.device)[index]
    return z_t * broadcast(torch.sqrt(1 + sigma**2), z_t), sigma


def make_trainable_through(model: nn.Module) -> None:
    """Freeze a model so that gradients can pass through it.

    Weights that were loaded in inference mode can't be saved for a backward pass; each is replaced by its copy, once.
    """
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                copied = value.is_inference()
                module._parameters[name] = nn.Parameter(value.detach().clone(), False) if copied else value
        for name, value in module._buffers.items():
            if value is not None and value.is_inference():
                module._buffers[name] = value.clone()
    model.requires_grad_(False)


def _differentiable_attention(_function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention for whichever ComfyUI was started with: some of those have no backward pass."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


@contextmanager
def _training_mode() -> Iterator[None]:
    """Newer ComfyUI has kernels without a backward pass, and this flag to do without them."""
    if not hasattr(comfy.model_management, "in_training"):
        yield
        return
    previous, comfy.model_management.in_training = comfy.model_management.in_training, True
    try:
        yield
    finally:
        comfy.model_management.in_training = previous
