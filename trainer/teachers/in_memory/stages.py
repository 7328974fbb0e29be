"""Which of a teacher's parts are on the device: before training only those that the present stage asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

TEXT, PICTURES, NETWORK = "text", "pictures", "network"


class Stages:
    """Moves groups of a teacher's modules between the device and the computer's memory.

    Captions, pictures and training follow each other, and none asks the parts of another one. So the highest of the
    three decides how much memory a run needs, not their sum. The values of the weights never change.

    Args:
        device: where the parts of the present stage are.
        groups: ``text``, ``pictures`` and ``network`` -> the modules that are moved together.

    Attributes:
        enabled: False keeps all parts where they are.
    """

    def __init__(self, device: torch.device, groups: Mapping[str, Sequence[nn.Module]]) -> None:
        self.device = device
        self.groups: dict[str, tuple[nn.Module, ...]] = {name: tuple(group) for name, group in groups.items()}
        self.enabled = False
        self._here: set[str] = set()

    def begin(self) -> None:
        """Move all parts off the device; from now on :meth:`enter` moves what a stage asks."""
        self.enabled = True
        for name in self.groups:
            self._move(name, away=True)

    def enter(self, stage: str) -> None:
        """Move the parts of other stages off the device, then those of this stage onto the device.

        Args:
            stage: ``text``, ``pictures`` or ``network``.
        """
        if not self.enabled:
            return
        for name in sorted(self._here - {stage}):
            self._move(name, away=True)
        if stage not in self._here:
            self._move(stage, away=False)

    def end(self) -> None:
        """Move all parts onto the device, where they stay."""
        if self.enabled:
            for name in sorted(set(self.groups) - self._here):
                self._move(name, away=False)
        self.enabled = False

    def _move(self, name: str, *, away: bool) -> None:
        for module in self.groups.get(name, ()):
            self._place(module, away=away)
        (self._here.discard if away else self._here.add)(name)
        if away and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _place(self, module: nn.Module, *, away: bool) -> None:
        # Previews are drawn in inference mode, and weights that were moved in it could not be trained on.
        with torch.inference_mode(False):
            nn.Module.to(module, torch.device("cpu") if away else self.device)
