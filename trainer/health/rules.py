"""The rules of a run's health: a figure of the log, when it is bad, and what to do then.

A student begins blurred and far from its teacher, and a healthy run brings it nearer. So most rules do not ask how far
away a figure is, but whether it has moved away from the best that this run has had.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .figures import CRITIC_TO_STUDENT, DISCRIMINATOR_GAP, PICTURE, SHARE

Direction = Literal["above", "below"]


@dataclass(frozen=True)
class Limit:
    """A figure on the wrong side of a fixed value.

    Attributes:
        back: the value at which the alarm ends; nearer to the good side, so that noise does not repeat the alarm.
    """

    value: float
    back: float
    side: Direction

    def begins(self, value: float, best: float) -> bool:
        """Return whether a smoothed value is bad."""
        return value > self.value if self.side == "above" else value < self.value

    def ends(self, value: float, best: float) -> bool:
        """Return whether a smoothed value is good again."""
        return value < self.back if self.side == "above" else value > self.back

    def nearer(self, value: float, best: float) -> bool:
        """Return whether a value is better than the best."""
        return value < best if self.side == "above" else value > best


@dataclass(frozen=True)
class Departure:
    """A ratio of student and teacher that moves away from 1, measured from the nearest that it has been.

    Attributes:
        times: the factor, above 1, between the present ratio's distance from 1 and the nearest one's.
        side: which way counts: ``below`` for a figure that may only be too small; None for both.
    """

    times: float
    side: Direction | None = None

    def begins(self, value: float, best: float) -> bool:
        """Return whether a smoothed value has moved away."""
        return self._distance(value) > self._distance(best) * self.times

    def ends(self, value: float, best: float) -> bool:
        """Return whether a smoothed value is half of the way back, as a factor."""
        return self._distance(value) < self._distance(best) * math.sqrt(self.times)

    def nearer(self, value: float, best: float) -> bool:
        """Return whether a value is nearer to 1 than the best."""
        return self._distance(value) < self._distance(best)

    def _distance(self, value: float) -> float:
        """Return by which factor a ratio differs from 1, at least 1."""
        value = max(value, 1e-6)
        factors = {"below": 1 / value, "above": value, None: max(value, 1 / value)}
        return max(1.0, factors[self.side])


@dataclass(frozen=True)
class Growth:
    """A positive figure that should fall, grown by a factor from the least that it has been."""

    times: float

    def begins(self, value: float, best: float) -> bool:
        """Return whether a smoothed value has grown."""
        return value > best * self.times

    def ends(self, value: float, best: float) -> bool:
        """Return whether a smoothed value is half of the way back, as a factor."""
        return value < best * math.sqrt(self.times)

    def nearer(self, value: float, best: float) -> bool:
        """Return whether a value is less than the least."""
        return value < best


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        figure: its name in the log.
        per_phase: forget the best where a phase begins: other start states make other figures.
        updates: the least number of updates in a window; None for figures of previews, which are few and paired.
        words: (value, the last good value, its update) -> what is bad.
        good: (value) -> what is good again.
        advice: where to turn: ``cause`` names the factor of the term that pulls most, other texts stand as they are.
    """

    figure: str
    test: Limit | Departure | Growth
    words: Callable[[float, float, int], str]
    good: Callable[[float], str]
    advice: str
    per_phase: bool = False
    updates: int | None = 20


def _moved(what: str, less: str, more: str) -> Callable[[float, float, int], str]:
    """Return the words for a ratio: ``the student's pictures lose contrast since update 1,200: 0.82 of ...``."""
    return lambda value, before, since: (
        f"the student's {what} {less if value < before else more} since update {since:,}: {value:.2f} of the "
        f"teacher's, {before:.2f} then"
    )


def _alike(what: str) -> Callable[[float, float, int], str]:
    return lambda value, before, since: (
        f"the student's {what} grow alike since update {since:,}: their differences are {value:.2f} of the teacher's, "
        f"{before:.2f} then"
    )


def _back(what: str) -> Callable[[float], str]:
    return lambda value: f"the student's {what} is {value:.2f} of the teacher's"


def _overpowering(term: str, name: str) -> Rule:
    """Return the rule for a term that leaves the others no say."""
    return Rule(
        f"{SHARE}{term}",
        Limit(0.95, 0.9, "above"),  # twenty times all other terms together; 0.6 in a healthy run with DMD on the demo
        lambda value, *_: f"{name} is {value:.1%} of the pull on the student, so that the other terms have no say",
        lambda value: f"{name} is {value:.1%} of the pull on the student",
        CAUSE,
    )


CAUSE = "cause"  # advice that depends on the term that pulls most
PAIRED = None  # a window of one preview

# Limits: 15 % less contrast, light or colour is what an eye notices side by side. Latents of a batch scatter more than
# pictures of fixed prompts, and differences between few samples most: in healthy runs of the demo by up to 8 %.
RULES = (
    Rule(
        "distillation",
        Growth(4.0),  # a high rate that falls later may double the loss at first
        lambda value, before, since: (
            f"the distillation loss has grown since update {since:,}: {value:.3g}, {before:.3g} then"
        ),
        lambda value: f"the distillation loss is {value:.3g}",
        CAUSE,
        per_phase=True,
    ),
    Rule(
        "gradient_student",
        Limit(30.0, 15.0, "above"),  # 0.03 to 10 in healthy runs of the demo's models, 50 to 10,000 in sick ones
        lambda value, *_: f"the student's gradient has the norm {value:.3g} before it is clipped",
        lambda value: f"the student's gradient has the norm {value:.3g} before it is clipped",
        CAUSE,
    ),
    Rule(
        "latent_error",
        Limit(math.sqrt(2), 1.2, "above"),  # of two pictures with the same statistics that have nothing in common
        lambda value, *_: (
            f"the student's latents have nothing in common with the teacher's: they differ by {value:.2f} times the "
            "teacher's contrast, unrelated pictures by 1.41"
        ),
        lambda value: f"the student's latents differ by {value:.2f} times the teacher's contrast",
        CAUSE,
    ),
    Rule(
        "latent_contrast",
        Departure(1.15),
        _moved("latents", "lose contrast", "gain contrast"),
        _back("latents' contrast"),
        CAUSE,
        per_phase=True,
    ),
    Rule(
        "latent_contrast",
        Limit(1.3, 1.2, "above"),  # an untrained student is blurred, so this is never the beginning of a run
        lambda value, *_: f"the student's latents have too much contrast: {value:.2f} of the teacher's",
        _back("latents' contrast"),
        CAUSE,
    ),
    Rule(
        "latent_diversity",
        Departure(1.35, "below"),
        _alike("latents of different samples"),
        _back("latents' diversity"),
        CAUSE,
        per_phase=True,
    ),
    Rule(
        f"{PICTURE}contrast",
        Departure(1.15),
        _moved("pictures", "lose contrast", "gain contrast"),
        _back("pictures' contrast"),
        CAUSE,
        updates=PAIRED,
    ),
    Rule(
        f"{PICTURE}luminance",
        Departure(1.15),
        _moved("pictures", "grow dark", "grow bright"),
        _back("pictures' luminance"),
        CAUSE,
        updates=PAIRED,
    ),
    Rule(
        f"{PICTURE}saturation",
        Departure(1.2),
        _moved("pictures", "lose colour", "gain colour"),
        _back("pictures' saturation"),
        CAUSE,
        updates=PAIRED,
    ),
    Rule(
        f"{PICTURE}sharpness",
        Departure(1.35),
        _moved("pictures", "blur", "are over-sharpened"),
        _back("pictures' sharpness"),
        CAUSE,
        updates=PAIRED,
    ),
    Rule(
        f"{PICTURE}diversity",
        Departure(1.25, "below"),
        _alike("pictures of different prompts"),
        _back("pictures' diversity"),
        CAUSE,
        updates=PAIRED,
    ),
    *(
        _overpowering(*term)
        for term in (
            ("adversarial", "the adversarial loss"),
            ("dmd", "DMD"),
            ("feature_matching", "feature matching"),
            ("intra_segment", "intra-segment guidance"),
        )
    ),
    Rule(
        CRITIC_TO_STUDENT,
        Limit(10.0, 5.0, "above"),  # 0.2 to 2 in healthy runs of the demo
        lambda value, *_: (
            f"the critic's gradient is {value:.1f} times the student's: the critic lags behind the student, and DMD "
            "has no true fake score"
        ),
        lambda value: f"the critic's gradient is {value:.1f} times the student's",
        "Raise method.critic.updates ({method.critic.updates}) or optimizer.critic_lr ({optimizer.critic_lr:g}), or "
        "lower optimizer.lr ({optimizer.lr:g})",
    ),
    Rule(
        DISCRIMINATOR_GAP,
        Limit(20.0, 10.0, "above"),  # the losses' own targets are 1 and 2; 1 to 5 in a healthy run on the demo
        lambda value, *_: (
            f"the discriminator's logits run away: D(real) - D(fake) is {value:.3g}, where its loss asks for 1 or 2, "
            "so its gradient is no guide for the student"
        ),
        lambda value: f"D(real) - D(fake) is {value:.3g}",
        "Lower optimizer.discriminator_lr ({optimizer.discriminator_lr:g}), or raise method.r1 ({method.r1:g})",
    ),
    Rule(
        "discriminator_accuracy",
        Limit(0.55, 0.6, "below"),  # at 400 pairs, .55 is two standard deviations of guesses above chance
        lambda value, *_: (
            f"the discriminator tells real from fake in {value:.0%} of the pairs (chance: 50 %), so the adversarial "
            "loss gives the student noise"
        ),
        lambda value: f"the discriminator tells real from fake in {value:.0%} of the pairs",
        "Give method.adversarial_timesteps lower levels, raise method.discriminator.warmup or "
        "optimizer.discriminator_lr ({optimizer.discriminator_lr:g}), or set the phases' adversarial to 0",
        updates=100,
    ),
)
