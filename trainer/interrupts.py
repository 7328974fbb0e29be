"""Stop a long command at its next safe point: Ctrl-C and SIGTERM set a flag, and loops ask for the flag.

A loop asks ``stop.asked`` after each of its steps and ends early. Then ``stop.check(accelerator)`` raises
:class:`Interrupted` in all processes together, or in none. So no process waits for another one that has left.

    for batch in batches:
        if stop.asked:
            break
        encode(batch)
    stop.check(accelerator)  # before anything is marked as complete
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")  # by name: a system may lack one; Windows alone has SIGBREAK


class Interrupted(Exception):
    """The command was asked to stop, and stopped at a safe point.

    Attributes:
        exit_code: 128 + the number of the signal, as shells count: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """Remembers that the command was asked to stop. Without :meth:`listening` nobody asks.

    Attributes:
        signal: the number of the first signal, 0 before it.
        now: True after a second Ctrl-C, which also raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.now = False

    @property
    def asked(self) -> bool:
        """True once this process was asked to stop. Costs nothing, so a loop can ask in each step, in any thread."""
        return self.signal != 0

    @contextmanager
    def listening(self, notice: Callable[[], object]) -> Iterator[None]:
        """Take Ctrl-C, SIGTERM and Ctrl-Break as requests inside the ``with`` block. For the main thread only.

        The first signal is a request. A second Ctrl-C raises KeyboardInterrupt at once; a second SIGTERM changes
        nothing, because schedulers repeat the signal.

        Args:
            notice: called at the first signal, to tell the user what happens now.
        """

        def receive(number: int, _frame: FrameType | None) -> None:
            if not self.asked:
                self.signal = number
                notice()
            elif number == signal.SIGINT:
                self.now = True
                raise KeyboardInterrupt

        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = [(number, signal.signal(number, receive)) for number in numbers]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Return True in every process if any process was asked to stop. All processes must call it together."""
        if accelerator.num_processes == 1:
            return self.asked
        import torch

        requests = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
        self.signal = self.signal or int(requests.max())
        return self.asked

    def check(self, accelerator: Accelerator) -> None:
        """Raise Interrupted in every process if any process was asked to stop. All processes must call it together.

        Raises:
            Interrupted: with the exit code of the signal.
        """
        if self.agreed(accelerator):
            raise Interrupted(self.signal)
