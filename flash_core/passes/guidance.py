"""Where the teacher is guided: an unconditional pass that changes nothing is not asked for."""

from __future__ import annotations

from collections.abc import Sequence

from ..process import NUM_TIMESTEPS, Process
from ..settings import DistillerSettings

Scales = tuple[float, float]
NONE: Scales = (1.0, 1.0)


def is_guided(settings: DistillerSettings, process: Process, t: float, scales: Scales | None = None) -> bool:
    """Return whether the teacher is guided at the timestep ``t``.

    Args:
        scales: lowest and highest guidance scale, 1 is none; default: the settings'.
    """
    if (scales or settings.guidance) == NONE:
        return False
    return within(settings.guidance_interval, process.fraction(t))


def within(interval: tuple[int, int] | None, fraction: float) -> bool:
    """Return whether a share of the process's time, 1 is pure noise, lies in an interval of uniform times in 0..999.

    Args:
        interval: lowest and highest; None for all times.
    """
    return interval is None or interval[0] <= round(NUM_TIMESTEPS * fraction) - 1 <= interval[1]


def guided_rows(
    settings: DistillerSettings, process: Process, times: Sequence[float], scales: Scales | None = None
) -> list[int] | None:
    """Return the samples of a batch that are guided; None for all of them.

    Args:
        times: the B timesteps as numbers, which are drawn on the CPU: reading them from the device would wait for it.
        scales: as for :func:`is_guided`.
    """
    if (scales or settings.guidance) == NONE:
        return []
    if settings.guidance_interval is None:
        return None
    return [row for row, value in enumerate(times) if is_guided(settings, process, value, scales)]
