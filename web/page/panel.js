/** A panel of our own at the bottom of a node: one HTML element, which takes no part in a saved workflow or a prompt. */

const STYLE = {
  boxSizing: "border-box",
  width: "100%",
  height: "100%",
  overflow: "hidden auto",
  padding: "6px 8px",
  borderRadius: "6px",
  background: "var(--comfy-input-bg, #222)",
  color: "var(--input-text, #ddd)",
  font: "12px/1.35 sans-serif",
};

/** Return the node's panel of this name, if it has one. */
export function findPanel(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

/**
 * Return the panel of this name, made if it is missing, or undefined if the page has no such widgets.
 *
 * `height` is in pixels; the node grows to hold the panel and never shrinks.
 */
export function panel(node, name, height) {
  let widget = findPanel(node, name);
  if (!widget) {
    if (typeof node.addDOMWidget !== "function") return undefined;
    const element = document.createElement("div");
    element.className = "flash-diffusion-panel";
    element.dataset.panel = name;
    Object.assign(element.style, STYLE);
    widget = node.addDOMWidget(name, "flash_panel", element, {
      serialize: false, // keeps it out of the prompt
      hideOnZoom: true,
      getMinHeight: () => widget?.flashHeight ?? height,
      getMaxHeight: () => widget?.flashHeight ?? height,
      getValue: () => undefined,
      setValue: () => undefined,
    });
    widget.serialize = false; // keeps it out of the saved workflow
  }
  widget.flashHeight = height;
  widget.element.style.minHeight = `${height}px`;
  const [, least] = node.computeSize();
  if (node.size[1] < least) node.setSize([node.size[0], least]);
  node.setDirtyCanvas?.(true, true);
  return widget;
}

/** Take a panel off its node. */
export function removePanel(node, name) {
  const widget = findPanel(node, name);
  if (!widget) return;
  widget.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(widget), 1);
  node.setDirtyCanvas?.(true, true);
}
