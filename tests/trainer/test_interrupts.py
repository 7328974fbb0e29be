"""Ctrl-C and SIGTERM: the run stops at a safe point, keeps its work and says how to go on."""

from __future__ import annotations

import signal

import pytest
from accelerate import Accelerator

from flash_diffusion.trainer.interrupts import Interrupted, StopRequest


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_first_signal_is_a_request_and_a_second_ctrl_c_stops_now(name: str, code: int) -> None:
    stop, notices = StopRequest(), []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop.listening(lambda: notices.append(stop.signal)):
        stop.check(Accelerator())
        signal.raise_signal(signal.Signals[name])
        assert stop.asked
        signal.raise_signal(signal.SIGTERM)  # schedulers repeat it
        assert not stop.now
        with pytest.raises(Interrupted) as interrupted:
            stop.check(Accelerator())
        assert interrupted.value.exit_code == code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.now
    assert notices == [signal.Signals[name]]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
