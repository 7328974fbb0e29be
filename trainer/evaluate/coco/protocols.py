"""The public protocols that few-step models are compared by: which captions, which pictures, which sizes.

Everything that changes a figure and is not the model's is a field of :class:`CocoProtocol`, goes into the report, and is
said in words in ``docs/evaluation.md``, with what is known of the papers' own choices and what is not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CocoProtocol:
    """Zero-shot evaluation on COCO.

    Attributes:
        name: what ``--protocol`` calls it.
        annotations: the captions, inside the COCO folder.
        pictures: the folder of the pictures, inside the COCO folder. All that ``annotations`` lists are the reference.
        samples: how many captions are drawn from, one of each picture.
        size: width and height in pixels at which all pictures, COCO's and the model's, are compared.
        caption_prefix: what stands before the caption for CLIP.
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
