"""Small networks and denoisers with known behaviour, for tests of the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_diffusion.flash_core.denoiser import Conditioning, Role
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess

Network = Callable[[Tensor, Tensor], Tensor]


def random_network(seed: int, channels: int = 4) -> Network:
    """A fixed random nonlinear function of ``(z (B, C, H, W), t (B,))``, each sample on its own, bounded by 1."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5
    phase = torch.randn(channels, generator=generator)

    def network(z: Tensor, t: Tensor) -> Tensor:
        mixed = torch.einsum("dc,bchw->bdhw", mixing.to(z), z)
        wave = torch.sin(t.to(z)[:, None] / 150 + phase.to(z))[:, :, None, None]
        return torch.tanh(mixed + wave) + 0.1 * torch.sin(3 * z)

    return network


def processes() -> list[Process]:
    """One process of every kind."""
    return [
        VPProcess.from_betas(prediction="epsilon"),
        VPProcess.from_betas(prediction="v_prediction"),
        VPProcess.from_betas(prediction="sample"),
        VPProcess.from_betas(prediction="v_prediction", zero_terminal_snr=True),
        FlowProcess(),
        FlowProcess(shift=3.0),
    ]


def process_name(process: Process) -> str:
    """A readable test id."""
    if isinstance(process, FlowProcess):
        return f"flow-shift{process.shift:g}"
    assert isinstance(process, VPProcess)
    return f"vp-{process.prediction}" + ("-zsnr" if float(process.alphas_cumprod[-1]) == 0 else "")


@dataclass(frozen=True)
class Call:
    """One call of a denoiser: its arguments and its role."""

    kind: str
    role: Role
    z_t: Tensor
    t: Tensor
    conditioning: Conditioning


class ScriptedDenoiser:
    """A denoiser whose clean prediction in each role is a given function, and which writes down every call.

    Args:
        z0: for each role ``(z_t, t, conditioning) -> z0``.
        features: ``(z_t, t, conditioning) -> feature maps``.
    """

    def __init__(
        self,
        process: Process,
        z0: dict[Role, Callable[[Tensor, Tensor, Conditioning], Tensor]],
        features: Callable[[Tensor, Tensor, Conditioning], list[Tensor]] | None = None,
    ) -> None:
        self.process = process
        self.calls: list[Call] = []
        self._z0 = z0
        self._features = features or (lambda z_t, t, conditioning: [z_t])
        self._role: Role = "teacher"

    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self._record("predict", z_t, t, conditioning)
        return self.process.output_from_z0(z_t, self._z0[self._role](z_t, t, conditioning), t)

    def features(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        self._record("features", z_t, t, conditioning)
        return self._features(z_t, t, conditioning)

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        before, self._role = self._role, role
        try:
            yield
        finally:
            self._role = before

    def called(self, kind: str, role: Role | None = None) -> list[Call]:
        """The calls of one kind, of one role if given."""
        return [call for call in self.calls if call.kind == kind and role in (None, call.role)]

    def _record(self, kind: str, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> None:
        self.calls.append(Call(kind, self._role, z_t.detach().clone(), t.detach().clone(), conditioning))


class LowRank(nn.Module):
    """``gate * up(down(x))``: a LoRA branch that is switched by its gate, so that both states save the same tensors.

    That is the dangerous kind for gradient checkpointing: a recomputation in the wrong role raises no error.
    """

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__()
        self.gate = 0.0
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * self.up(self.down(x))


class Block(nn.Module):
    """A residual block with one adapter per trained role."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.adapters = nn.ModuleDict({"student": LowRank(width), "critic": LowRank(width)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x) + sum(adapter(x) for adapter in self.adapters.values()))
        return x + self.outer(hidden)


class AdapterDenoiser(nn.Module):
    """A real, tiny backbone: a frozen residual network on pixels, adapters per role, optional checkpointing.

    Args:
        checkpointing: recompute every block in the backward pass (``torch.utils.checkpoint``).
    """

    def __init__(self, process: Process, channels: int = 4, width: int = 8, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.process = process
        self.checkpointing = checkpointing
        self.entry = nn.Linear(channels + 3, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.exit = nn.Linear(width, channels)
        self.requires_grad_(False)
        for role in ("student", "critic"):
            for parameter in self.adapter(role):
                parameter.requires_grad_(True)
        self._role: Role = "teacher"

    @classmethod
    def seeded(
        cls, process: Process, seed: int = 0, *, checkpointing: bool = False, dtype: torch.dtype = torch.float32
    ) -> AdapterDenoiser:
        """The same weights for the same seed; adapters are random, not zero, so that every role differs."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(process, checkpointing=checkpointing).to(dtype)

    def adapter(self, role: str) -> list[nn.Parameter]:
        """The trained parameters of one role."""
        return [parameter for name, parameter in self.named_parameters() if f"adapters.{role}." in name]

    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        x = self._run(z_t, t, conditioning)[-1]
        return self.exit(x).movedim(-1, 1)

    def features(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        return [x.movedim(-1, 1) for x in self._run(z_t, t, conditioning)[:-1]]

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        before = self._role
        self._switch(role)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, role: Role) -> None:
        self._role = role
        for block in self.blocks:
            for name, adapter in block.adapters.items():
                adapter.gate = float(name == role)

    def _run(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        z_t = z_t.movedim(1, -1)
        fraction = t.to(z_t) / 1000
        token = torch.zeros_like(fraction) if conditioning.vector is None else conditioning.vector[:, 0].to(z_t)
        facts = torch.stack([torch.sin(math.pi * fraction), torch.cos(math.pi * fraction), token], 1)
        facts = facts[:, None, None, :].expand(*z_t.shape[:-1], -1)
        x = self.entry(torch.cat([z_t, facts], -1))
        states = []
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
            states.append(x)
        return states


def tokens(batch: int, value: float = 1.0) -> Conditioning:
    """A batch of equal one-number conditions."""
    return Conditioning(vector=torch.full((batch, 1), value))
