/**
 * Flash Diffusion on ComfyUI's page: a card on nodes that know facts of a LoRA or of a sampling, and the losses of a
 * distillation as a chart while it runs.
 *
 * The server sends the facts (nodes/shared/page.py). Everything here is optional: if the page lacks a function that is
 * used, nothing is shown and nothing else changes. That is why the page is reached by `window.comfyAPI` and not by an
 * import, which would fail as a whole.
 */

import { showCard } from "./page/card.js";
import { showChart } from "./page/chart.js";

const LOSSES_EVENT = "flash_diffusion.losses"; // also tells the page that this message has a receiver
const OURS = /^Flash[A-Z]/;

/** Return the node of an execution id such as "7", or "12:7" for a node in a subgraph. */
function nodeOf(app, identity) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(identity).split(":")) {
    node = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part);
    graph = node?.subgraph;
  }
  return node;
}

/** Show what a finished or cached node has told. */
function show(node, output) {
  if (Array.isArray(output?.flash_card)) showCard(node, output.flash_card);
  if (Array.isArray(output?.flash_losses)) showChart(node, output.flash_losses);
}

/** Call `work`; a page that works otherwise than expected gets no card, and no error. */
function quietly(work) {
  try {
    work();
  } catch (error) {
    console.debug("Flash Diffusion shows nothing on this node:", error);
  }
}

const app = window.comfyAPI?.app?.app;
const api = window.comfyAPI?.api?.api;

if (app?.registerExtension && api?.addEventListener) {
  app.registerExtension({
    name: "FlashDiffusion.Page",
    beforeRegisterNodeDef(nodeType, nodeData) {
      if (!OURS.test(nodeData?.name ?? "")) return;
      const original = nodeType.prototype.onExecuted;
      nodeType.prototype.onExecuted = function (output, ...others) {
        const result = original?.call(this, output, ...others);
        quietly(() => show(this, output));
        return result;
      };
    },
  });
  api.addEventListener(LOSSES_EVENT, ({ detail }) =>
    quietly(() => {
      const node = nodeOf(app, detail.node);
      // A page may show another workflow than the one that runs, whose nodes have the same ids.
      if (OURS.test(node?.comfyClass ?? node?.type ?? "")) showChart(node, detail.losses, detail.done, detail.total);
    }),
  );
}
