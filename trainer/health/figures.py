"""The figures that the rules watch, made from the sums of a line of the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PULL = "pull_"  # + term: the norm of its weighted gradient at the student's outputs
SHARE = "share_"  # + term: its part of all terms' norms
RATIOS = {
    "latent_error": ("student_error", "teacher_contrast"),
    "latent_contrast": ("student_contrast", "teacher_contrast"),
    "latent_diversity": ("student_diversity", "teacher_diversity"),
}
PICTURE = "picture_"  # + property: of a preview's pictures, the student's divided by the teacher's
CRITIC_TO_STUDENT = "critic_to_student"
DISCRIMINATOR_GAP = "discriminator_gap"
WARNINGS, OVER = "warnings", "over"  # keys of a line of the log: sentences on the run's health
CAPTIONS = {
    "latent_error": "difference of student and teacher, divided by the teacher's contrast",
    "latent_contrast": "student divided by teacher, latents from the same starts",
    "latent_diversity": "student divided by teacher, differences between samples from pure noise",
    "discriminator_real": "D(real), mean logit",
    "discriminator_fake": "D(fake), mean logit",
    DISCRIMINATOR_GAP: "D(real) - D(fake), mean logits",
    CRITIC_TO_STUDENT: "norm of the critic's gradient, divided by the student's",
}
TINY = 1e-8  # a divisor up to here is a sum of nothing, such as no sample at pure noise


def health_figures(terms: Mapping[str, float]) -> dict[str, float]:
    """Return the terms of a line, with ratios in the place of the sums that only ratios need.

    ``latent_error`` is the difference of student and teacher, divided by the teacher's contrast. ``latent_contrast``
    and ``latent_diversity`` are the student's divided by the teacher's, at the same starts. ``critic_to_student`` is
    the ratio of the gradient norms, ``discriminator_gap`` D(real) - D(fake). ``share_TERM`` says how much of the pull
    on the student's outputs is a term's, in 0..1, where several terms pull.
    """
    sums = {name for pair in RATIOS.values() for name in pair}
    pulls = {name.removeprefix(PULL): value for name, value in terms.items() if name.startswith(PULL)}
    figures = {name: value for name, value in terms.items() if name not in sums and not name.startswith(PULL)}
    pairs = {**RATIOS, CRITIC_TO_STUDENT: ("gradient_critic", "gradient_student")}
    for name, (above, below) in pairs.items():
        if above in terms and terms.get(below, 0.0) > TINY:
            figures[name] = terms[above] / terms[below]
    if "discriminator_real" in terms:
        figures[DISCRIMINATOR_GAP] = terms["discriminator_real"] - terms["discriminator_fake"]
    whole = sum(pulls.values())
    if len(pulls) > 1 and whole > TINY:
        figures |= {f"{SHARE}{term}": value / whole for term, value in pulls.items()}
    return figures


def caption_of(figure: str) -> str:
    """Return what a figure of the log is, in a few words; empty for a loss."""
    if figure.startswith(PICTURE):
        return "student divided by teacher, pictures of the previews"
    if figure.startswith(SHARE):
        return "part of the pull of all terms on the student's outputs"
    return CAPTIONS.get(figure, "")


def is_preview(entry: Mapping[str, Any]) -> bool:
    """Return whether a line of the log tells of a preview, and not of updates."""
    return any(name.startswith(PICTURE) for name in entry)
