"""Write the contact sheet: one HTML page with samples as training sees them, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ...files import write_whole
from ...pictures import picture_uri
from .findings import Finding, Findings
from .inspection import THUMBNAIL, Shown

SHOWN_CASES = 5  # of each finding
QUALITY = 80  # of the WebP thumbnails
STYLE = f"""
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8884; }}
.error {{ color: #c62828; }} .warning {{ color: #b26a00; }}
.sheet {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({THUMBNAIL}px, 1fr)); gap: 1.2rem; }}
figure {{ margin: 0; }} figure > img {{ width: 100%; display: block; outline: 1px solid #8884; }}
.beside {{ display: flex; gap: 4px; margin-top: 4px; }} .beside img {{ width: {THUMBNAIL // 3}px; }}
.missing {{ aspect-ratio: 1; display: grid; place-items: center; border: 1px dashed #888; }}
figcaption {{ font-size: 12px; overflow-wrap: anywhere; }} figcaption small {{ opacity: .7; }}
"""


def write_sheet(path: Path, findings: Findings, shown: Sequence[Shown], resolution: int) -> None:
    """Write the page, whole or not at all."""
    rows = "".join(map(_row, (*findings.of("error"), *findings.of("warning"))))
    table = f"<table><tr><th></th><th>cases</th><th>what</th><th>what to do</th></tr>{rows}</table>" if rows else ""
    facts = "".join(f"<tr><th>{name}</th><td>{escape(str(value))}</td></tr>" for name, value in findings.facts.items())
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(findings.title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(findings.title)}</h1>
<p>{findings.samples} samples can be used. {"" if rows else "Nothing is wrong."}</p>
{table}
<table>{facts}</table>
<h2>What training sees at {resolution} px</h2>
<p>{len(shown)} samples: first those with findings, then others, chosen at random.</p>
<div class="sheet">{"".join(map(_figure, shown))}</div>
</body></html>
"""
    write_whole(path, lambda partial: partial.write_text(page, encoding="utf-8"))


def _row(finding: Finding) -> str:
    cases = "<br>".join(map(escape, finding.cases[:SHOWN_CASES]))
    return (
        f"<tr><td class={finding.severity}>{finding.severity}</td><td>{finding.count}</td>"
        f"<td>{escape(finding.title)}<br><small>{cases}</small></td><td>{escape(finding.advice)}</td></tr>"
    )


def _figure(shown: Shown) -> str:
    lost = "can't be used" if shown.remarks else "no picture"
    image = f'<div class="missing">{lost}</div>'
    if shown.picture is not None:
        image = f'<img src="{picture_uri(shown.picture, THUMBNAIL, QUALITY)}" alt="{escape(shown.caption)}">'
    beside = "".join(
        f'<img src="{picture_uri(picture, THUMBNAIL // 3, QUALITY)}" alt="{name}" title="{name}">'
        for name, picture in shown.beside.items()
    )
    row = f'<div class="beside">{beside}</div>' if beside else ""
    remarks = "".join(f'<div class="warning">{escape(remark)}</div>' for remark in shown.remarks)
    size = "{} x {}".format(*shown.size) if any(shown.size) else ""
    words = f"{escape(shown.caption)}{remarks}<br><small>{escape(shown.name)} {size}</small>"
    return f"<figure>{image}{row}<figcaption>{words}</figcaption></figure>"
