/** The losses of a distillation as a small chart, on a logarithmic axis because losses fall by powers of ten. */

import { panel } from "./panel.js";

const NAME = "flash_losses";
const HEIGHT = 112; // pixels of the panel
const WIDTH = 240; // units of the drawing, which is stretched to the node's width
const DEPTH = 64;
const SVG = "http://www.w3.org/2000/svg";

/** Return the points of a polyline in a box of WIDTH x DEPTH, or "" for losses that cannot be drawn. */
export function polyline(losses) {
  const drawn = losses.filter((loss) => Number.isFinite(loss) && loss > 0).map(Math.log10);
  if (drawn.length < 2) return "";
  const low = Math.min(...drawn);
  const range = Math.max(...drawn) - low || 1;
  return drawn
    .map((loss, index) => {
      const x = (index / (drawn.length - 1)) * WIDTH;
      const y = DEPTH - ((loss - low) / range) * DEPTH;
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    })
    .join(" ");
}

function line(text) {
  const element = document.createElement("div");
  element.textContent = text;
  element.style.color = "var(--descrip-text, #999)";
  return element;
}

/** Show losses on a node; with the number of updates while it runs. */
export function showChart(node, losses, done, total) {
  const points = polyline(losses);
  if (!points) return;
  const widget = panel(node, NAME, HEIGHT);
  if (!widget) return;
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", `0 -2 ${WIDTH} ${DEPTH + 4}`);
  drawing.setAttribute("preserveAspectRatio", "none");
  Object.assign(drawing.style, { display: "block", width: "100%", height: `${DEPTH}px` });
  const curve = document.createElementNS(SVG, "polyline");
  curve.setAttribute("points", points);
  curve.setAttribute("fill", "none");
  curve.setAttribute("stroke", "var(--p-primary-color, #5ba3f5)");
  curve.setAttribute("stroke-width", "1.5");
  curve.setAttribute("vector-effect", "non-scaling-stroke");
  drawing.append(curve);
  const [first, last] = [losses[0], losses[losses.length - 1]].map((loss) => loss.toPrecision(3));
  const parts = [line(`loss ${first} → ${last}, logarithmic`), drawing];
  if (total) parts.push(line(`update ${done} of ${total}`));
  widget.element.replaceChildren(...parts);
  widget.element.dataset.done = String(done ?? "");
}
