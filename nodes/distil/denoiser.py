"""A ComfyUI MODEL as a :class:`~..flash_core.denoiser.Denoiser`, so that a graph's model can be distilled.

The teacher is the MODEL with all its LoRAs, hooks and wrappers. Latents and outputs are in the method's convention,
``z_t = alpha_t z0 + sigma_t eps``, not in ComfyUI's (see :func:`model_input`). The model is called through
``BaseModel.apply_model``, so that its patches work. The network's output is captured with a hook, before ComfyUI
computes the denoised latent: so no digits are lost at low noise, and sigma = 0 works too. Patches that change the
denoised latent have no effect.
"""

from __future__ import annotations

import inspect
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
from ..shared.model_facts import has_frames
from ..shared.process import process_of
from .adapters import ModelAdapters
from .checkpointing import checkpointed
from .conditions import TOKEN_COUNT, by_token_count, model_arguments, read_conditionings
from .features import Tap, capture, taps

# Networks without in-place operations on tensors that the backward pass needs. Other networks (Flux) and patches have
# such operations; they run under a guard that copies overwritten tensors, at a small cost for every operation.
WRITE_NOTHING_IN_PLACE = ("UNetModel", "OpenAISignatureMMDITWrapper", "PixArtMS")


class ModelDenoiser:
    """A ComfyUI MODEL whose roles share its weights. Use it as a context manager around the whole training.

    Inside the context inference mode is off, gradients are on (ComfyUI's nodes run in inference mode), and the whole
    model is loaded. After the context, also after an exception or an interrupt, all hooks are removed, and the model's
    outputs are bit-identical to those before.

    ``teacher`` is the MODEL without an adapter; ``student`` and ``critic`` are the MODEL with the adapter of this name.
    An adapter gets gradients while its role is on, so run the backward pass inside the :meth:`role` block too.

    Args:
        model: the MODEL.
        checkpointing: compute activations again in the backward pass: less memory, more time, the same gradients up to
                rounding.
            Default: False.

    Raises:
        ValueError: the model's sampling or architecture cannot be distilled.
    """

    def __init__(self, model: ModelPatcher, *, checkpointing: bool = False) -> None:
        if getattr(model, "is_dynamic", bool)():
            model = model.get_non_dynamic_delegate()  # newer ComfyUI moves weights in and out between calls
        self.patcher = model
        self.device: torch.device = model.load_device
        self._sampling = model.get_model_object("model_sampling")
        self._process = process_of(self._sampling, to_distil=True)
        self._adapters = ModelAdapters(model, self.device)
        self._checkpointing = checkpointing
        self._has_frames = has_frames(model)
        self._counts_tokens = TOKEN_COUNT in inspect.signature(self._network.forward).parameters
        self._options: dict[str, Any] | None = None  # ComfyUI's model options, inside the context
        self._stack = ExitStack()

    # -- the context -----------------------------------------------------------------------------------------------

    def __enter__(self) -> ModelDenoiser:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.callback(self._adapters.detach)
            self._load()
            options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
            comfy.sampler_helpers.prepare_model_patcher(self.patcher, {}, options)
            stack.callback(self.patcher.restore_hook_patches)
            stack.callback(self.patcher.cleanup)
            self.patcher.pre_run()
            self._adapters.attach()
            if self._checkpointing:
                stack.enter_context(checkpointed(self._network))
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

    def _load(self) -> None:
        others = self.patcher.get_nested_additional_models()
        comfy.model_management.load_models_gpu([self.patcher, *others], memory_required=1e20, force_full_load=True)
        if any(getattr(one.model, "model_lowvram", False) for one in (self.patcher, *others)):
            raise ValueError(
                "ComfyUI keeps weights of this model outside the GPU's memory and moves them in for each call, as it "
                "does with --novram. A backward pass needs them all at once. Start ComfyUI without --novram (--lowvram "
                "may stay); if the model does not fit then, load its weights in float8, or use Flash Distill Headless."
            )
        make_trainable_through(self.patcher.model)

    @contextmanager
    def other_models(self) -> Iterator[None]:
        """Let ComfyUI load other models inside the block, such as a VAE, even if this model must make room for them.

        The block runs in inference mode, as ComfyUI's nodes do. After it, the whole model is loaded again.
        """
        try:
            with torch.inference_mode():
                yield
        finally:
            self._load()

    # -- the protocol ----------------------------------------------------------------------------------------------

    @property
    def process(self) -> Process:
        """The model's noise process."""
        return self._process

    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output (B, C, h, w), float32, in the current role.

        Raises:
            InterruptProcessingException: ComfyUI's, if the user interrupts.
        """
        return self._run(z_t, t, conditioning, [])[0]

    def features(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Hidden states at several depths as maps (B, C_i, H_i, W_i), in the current role."""
        return self._run(z_t, t, conditioning, taps(self._network))[1:]

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Switch to ``role`` inside the block, and back to the previous role after it."""
        if role != "teacher" and not self._adapters.has(role):
            raise ValueError(f"There is no {role} adapter; call add_adapter({role!r}, ...) first.")
        previous, self._adapters.role = self._adapters.role, role
        try:
            yield
        finally:
            self._adapters.role = previous

    # -- ComfyUI's latents and conditionings -----------------------------------------------------------------------

    def latents(self, samples: Tensor) -> Tensor:
        """Scale a LATENT's samples (B, C, h, w) or (B, C, 1, h, w) for the network: (B, C, h, w), float32.

        Raises:
            ValueError: a sample has several frames.
        """
        if self._has_frames and samples.shape[2] != 1:
            raise ValueError(
                f"These latents have {samples.shape[2]} frames; expected 1, a picture. Choose one with Latent Cut."
            )
        scaled: Tensor = self.patcher.model.process_latent_in(samples)
        scaled = scaled.squeeze(2) if self._has_frames else scaled
        return scaled.to(self.device, torch.float32, copy=True)

    def comfy_latents(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) of the network as ComfyUI's VAE takes them, with a dimension of frames if any."""
        unscaled: Tensor = self.patcher.model.process_latent_out(latents.unsqueeze(2) if self._has_frames else latents)
        return unscaled

    def conditions(
        self, positive: list[Any], negative: list[Any], latent_shape: tuple[int, ...]
    ) -> tuple[Conditioning, Conditioning]:
        """Convert two CONDITIONINGs to batches; see :func:`~.conditions.read_conditionings`.

        Args:
            positive, negative: ComfyUI's conditionings.
            latent_shape: (C, h, w) of the latents to denoise.
        """
        both = {"positive": positive, "negative": negative}
        conditions, unconditional = read_conditionings(self.patcher.model, both, latent_shape, self.device)
        return conditions, unconditional

    # -- adapters --------------------------------------------------------------------------------------------------

    def add_adapter(self, role: Role, rank: int, alpha: float, targets: Sequence[str], seed: int = 0) -> None:
        """Give a role a new LoRA in float32. Its up half is 0, so it changes nothing before training.

        Args:
            role: ``student`` or ``critic``.
            rank, alpha: the update is scaled by ``alpha / rank``.
            targets: the endings of the adapted layers' paths, in diffusers' names; empty for every linear layer of the
                network's blocks.
            seed: of the down half. Default: 0.

        Raises:
            ValueError: no layer's path ends with a target.
        """
        self._entered()  # outside, in inference mode, parameters would get no gradients
        self._adapters.add(role, rank, alpha, targets, seed)

    def load_adapter(self, role: Role, modules: Mapping[str, LoraModule]) -> None:
        """Give a role the LoRA of a file, at the file's scale.

        Args:
            role: ``student`` or ``critic``.
            modules: of a :class:`~..flash_core.lora.LoraFile`; all must fit this model.

        Raises:
            ValueError: a module does not fit this model.
        """
        self._entered()
        self._adapters.load(role, modules.values())

    def has_adapter(self, role: Role) -> bool:
        """Return whether the role has an adapter."""
        return self._adapters.has(role)

    def adapter_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The parameters of a role's adapter by name."""
        return self._adapters.parameters(role)

    def adapter(self, role: Role) -> dict[str, LoraModule]:
        """A role's adapter by module path, for :func:`~..flash_core.lora.write_lora`."""
        return self._adapters.modules(role)

    @property
    def names_are_native(self) -> bool:
        """Whether the paths of adapters are ComfyUI's own: it knows no diffusers names for this family."""
        return self._adapters.native

    # -- the call --------------------------------------------------------------------------------------------------

    def _entered(self) -> dict[str, Any]:
        if self._options is None:
            raise RuntimeError("Use ModelDenoiser as a context manager: 'with ModelDenoiser(model) as denoiser: ...'.")
        return self._options

    @property
    def _network(self) -> nn.Module:
        network: nn.Module = self.patcher.model.diffusion_model
        return network

    def _run(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, places: list[Tap]) -> list[Tensor]:
        """Return the output of the whole batch, then the hidden states at ``places``."""
        groups, results = [], []
        for rows, part in by_token_count(conditioning):
            chosen = (z_t, t) if rows is None else (z_t[rows], t[rows])
            groups.append(rows)
            results.append(self._call(*chosen, part, places))
        if len(results) == 1:
            return results[0]
        order = torch.cat([rows for rows in groups if rows is not None]).argsort()
        return [torch.cat(parts)[order] for parts in zip(*results, strict=True)]

    def _call(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, places: list[Tap]) -> list[Tensor]:
        options = self._entered()
        comfy.model_management.throw_exception_if_processing_interrupted()
        model = self.patcher.model
        x, sigma = model_input(self._sampling, self._process, z_t, t)
        x = x.unsqueeze(2) if self._has_frames else x
        transformer_options = {
            **options.get("transformer_options", {}),
            "cond_or_uncond": [0],  # the whole batch is one prompt to ComfyUI
            "uuids": [],
            "sigmas": sigma,
            "optimized_attention_override": _differentiable_attention,
        }
        arguments = {**model_arguments(conditioning), "transformer_options": transformer_options}
        if self._counts_tokens and conditioning.cross_attention is not None:
            arguments[TOKEN_COUNT] = conditioning.cross_attention.shape[1]
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
                f"The network was called {len(outputs)} times for one prediction, and gave {len(states)} of "
                f"{len(places)} hidden states; expected one call and all hidden states. A patch of this MODEL calls "
                "the network or its blocks in its own way. Remove this patch before you distil."
            )
        output = outputs[0].squeeze(2) if self._has_frames else outputs[0]
        return [output.float(), *states]


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
    """Freeze a model, but let gradients pass through it.

    A backward pass cannot use weights that were loaded in inference mode, so each of them is replaced by a copy.
    """
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(copied(value), False) if value.is_inference() else value
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()
    model.requires_grad_(False)


def copied(value: Tensor) -> Tensor:
    """Return a weight's values in memory of their own; a quantised tensor's class and attributes stay.

    Loaders of quantised files (GGUF) have tensor classes whose ``clone`` gives the tensor itself back.
    """
    copy = value.detach().clone()
    if not copy.is_inference():
        return copy
    with torch._C.DisableTorchFunctionSubclass():
        copy = value.as_subclass(Tensor).clone().as_subclass(type(value))
    copy.__dict__.update(value.__dict__)
    return copy


def _differentiable_attention(_function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Run PyTorch's attention: some of ComfyUI's other attentions have no backward pass."""
    output: Tensor = comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
    return output


@contextmanager
def _training_mode() -> Iterator[None]:
    """Set newer ComfyUI's flag that turns off kernels without a backward pass."""
    if not hasattr(comfy.model_management, "in_training"):
        yield
        return
    previous, comfy.model_management.in_training = comfy.model_management.in_training, True
    try:
        yield
    finally:
        comfy.model_management.in_training = previous
