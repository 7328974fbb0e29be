/** A card: rows of label and value, as in "rank 64". */

import { panel, removePanel } from "./panel.js";

const NAME = "flash_card";
const CORE_TEXT = "$$node-text-preview"; // ComfyUI's own widget for text that a running node sends
const LINE = 17; // pixels
const PADDING = 14;
const CHARACTER = 6.4; // pixels, of the mean letter

/** Return how many lines a row takes in a node of this width. */
function lines(row, width) {
  const [label, value] = row;
  const room = Math.max(10, (width - 40) / CHARACTER - (label ? 13 : 0));
  return Math.max(1, Math.ceil(String(value).length / room));
}

/** Put text into a new element; never HTML, because a LoRA's file may have any text in its header. */
function cell(tag, text, style) {
  const element = document.createElement(tag);
  element.textContent = text;
  Object.assign(element.style, style);
  return element;
}

/**
 * Show rows [label, value] on a node. A row without label takes the whole width.
 *
 * Rows without any label repeat the text that ComfyUI shows while the node runs. They are shown only where that text is
 * missing: after a cached run in a page that was opened later.
 */
export function showCard(node, rows) {
  const repeats = rows.every(([label]) => !label);
  if (!rows.length || (repeats && node.widgets?.some((widget) => widget.name === CORE_TEXT))) {
    removePanel(node, NAME);
    return;
  }
  const height = PADDING + LINE * rows.reduce((sum, row) => sum + lines(row, node.size[0]), 0);
  const widget = panel(node, NAME, height);
  if (!widget) return;
  const table = document.createElement("div");
  Object.assign(table.style, { display: "grid", gridTemplateColumns: "5.6rem 1fr", columnGap: "6px" });
  for (const [label, value] of rows) {
    if (label) table.append(cell("div", label, { color: "var(--descrip-text, #999)" }));
    table.append(cell("div", value, label ? { overflowWrap: "anywhere" } : { gridColumn: "1 / -1" }));
  }
  widget.element.replaceChildren(table);
}
