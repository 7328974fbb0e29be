"""How a comparison with the teacher was measured, term by term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..blocks import sampling_words
from ..findings import kind_titles
from ..numbers import capital, counted, number

Report = Mapping[str, Any]
GAP = (
    "(undistilled - student) / (undistilled - floor): Fréchet distances of the student and of the undistilled teacher "
    "with as many passes and no guidance. 100 % of the gap closed = as good as the floor."
)


def facts(report: Report) -> tuple[tuple[str, str], ...]:
    many, reference, where = report["runs"][0], report["reference"], report["environment"]
    stored = (
        " The sets are stored as features; the teacher’s pictures above were made again and agree with them."
        if reference["stored"]
        else ""
    )
    return (
        *_input_facts(report),
        (
            "Reference",
            f"Two sets of the teacher’s pictures in {counted(many['steps'], 'step')} with guidance "
            f"{many['guidance']:g}, in uncond + w (cond - uncond): {reference['samples'] * reference['times']} and "
            f"{reference['samples']} pictures of the same prompts with independent noise. Every run starts from the "
            f"noise of the second set.{stored}",
        ),
        (
            "Fréchet distance, KID",
            "Between a run’s pictures and the first set, whose noise the run has never seen. The second set scores the "
            f"floor, {number(report['floor']['fd'])}: a perfect student scores the floor, not 0.",
        ),
        *([("Gap closed", GAP)] if report["gaps"] else []),
        *_kind_facts(report),
        (
            "Paired distance",
            "Mean distance between a picture and the second set’s picture of the same prompt and noise. Two teacher "
            f"pictures of one prompt lie {number(many['diversity'])} apart.",
        ),
        ("Prompt accuracy", _accuracy(report)),
        (
            "Diversity",
            "Mean distance between pictures of one prompt. A value far below the teacher’s would be a collapse.",
        ),
        (
            "Passes, time",
            "Forward passes of the network per picture; guidance needs two per step. Seconds include text encoder and "
            f"decoder, on {where['device']} with {counted(where['threads'], 'thread')}. The teacher is timed on the "
            "pictures above.",
        ),
    )


def _kind_facts(report: Report) -> tuple[tuple[str, str], ...]:
    """Return what the kinds of features, the intervals and the other figures mean; reports of 0.1 lack these."""
    if "kinds" not in report:
        return ()
    titles, seeds = kind_titles(report), report["settings"].get("seeds", 1)
    spread = (
        f"Figures of the student are means over {seeds} sets of pictures, each from its own noise; ± is the standard "
        "deviation over these sets. "
        if seeds > 1
        else ""
    )
    preference = report.get("preference")
    return (
        (
            "Kinds of features",
            f"{titles['features']}; {report['kinds']['states']} (frozen, no caption, little noise, averaged over "
            f"space); {report['kinds']['random']} (fixed random weights, arXiv 2002.09797), which no training has "
            "seen. The last two are reduced to at most 64 whitened directions, fitted to the reference.",
        ),
        (
            "Intervals",
            f"95 %. {spread}Fréchet distances, KID, precision and recall: delete-half jackknife, that is the spread "
            "over random halves of the prompts, put around the figure of all pictures; a bootstrap would lie too high. "
            "Other means: bootstrap over pictures or prompts. Shares: Wilson. “Beyond chance” stands where the "
            "interval of the difference on the same prompts has one sign.",
        ),
        (
            "Precision, recall",
            "Share of a run’s pictures that lie in the teacher’s manifold, and of the teacher’s pictures that lie in "
            "the run’s (3 nearest neighbours in the feature network, arXiv 1904.06991).",
        ),
        (
            "Sharpness, contrast",
            "Gradient energy, and standard deviation, of the luminance, over the teacher’s. 1 = the teacher’s; below "
            "1 = blurred or flat.",
        ),
        *([("Preference", f"Mean score of {preference}; higher = people prefer it.")] if preference else []),
    )


def _input_facts(report: Report) -> tuple[tuple[str, str], ...]:
    """Return where the captions and the features come from, and the samplers; reports of 0.1 lack these."""
    if "inputs" not in report:
        return ()
    inputs = report["inputs"]
    return (
        ("Captions", f"{capital(inputs['captions'])}."),
        (
            "Features",
            f"{capital(inputs['features'])}, {inputs['dimensions']} numbers a picture. Fréchet distances are usable "
            f"from {inputs['samples_needed']} pictures a run on.",
        ),
        ("Sampling", sampling_words(report["sampling"])),
    )


def _accuracy(report: Report) -> str:
    if report["runs"][0]["prompt_accuracy"] is None:
        return "Not measured: the feature network does not know what these prompts name."
    known = report.get("inputs", {}).get("known_prompts")
    samples = report["settings"]["samples"]
    some = f", of the {known} pictures of {samples} whose prompt it knows" if known not in (None, samples) else ""
    return f"Share of pictures that the feature network classifies as the thing in their prompt{some}."
