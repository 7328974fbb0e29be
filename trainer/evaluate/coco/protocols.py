"""The public protocols that few-step models are compared by: captions, pictures, sizes.

Every setting that changes a figure and does not belong to the model is a field of :class:`CocoProtocol` and stands in
the report. ``docs/evaluation.md`` describes the protocols, and which choices of the papers are known.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CocoProtocol:
    """Zero-shot evaluation on COCO.

    Attributes:
        name: value of ``--protocol``.
        annotations: file with the captions, inside the COCO folder.
        pictures: folder of the pictures, inside the COCO folder. All pictures in ``annotations`` are the reference.
        samples: number of captions, one per picture.
        size: width and height in pixels at which all pictures, COCO's and the model's, are compared.
        caption_prefix: text before each caption, for CLIP.
    """

    name: str
    annotations: str
    pictures: str
    samples: int
    size: int
    caption_prefix: str = ""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # FID-5k beside InstaFlow's and progressive distillation's (arXiv 2309.06380, section 5): all of val2017.
        CocoProtocol("coco2017-5k", "annotations/captions_val2017.json", "val2017", samples=5_000, size=512),
        # FID-30k as GigaGAN's evaluation script has it (arXiv 2303.05511), which DMD took over (arXiv 2311.18828).
        CocoProtocol(
            "coco2014-30k",
            "annotations/captions_val2014.json",
            "val2014",
            samples=30_000,
            size=256,
            caption_prefix="A photo depicts ",
        ),
    )
}
