"""What a user does in ComfyUI's page with this extension, as functions that raise where it does not work.

The tests of the page call some of them, ``page_sweep.py`` all. Each waits for an event and not for a time, because a
busy machine takes minutes for what takes seconds elsewhere. A problem is an ``AssertionError`` or playwright's
``TimeoutError``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import blueprints
import comfy_page
from comfy_page import WAIT
from playwright.sync_api import ConsoleMessage, Page

OVERLAP = 2  # units of the graph that nodes may share: borders are rounded
PACK = "flash-diffusion"  # the extension's folder, by which the page lists its templates
# The page asks these, which a test machine cannot reach.
ELSEWHERE = ("https://api.comfy.org/", "https://huggingface.co/")
# Before a help page the page asks for the same in its language (docs/FlashSampler/en.md), of every extension.
HELP_IN_LANGUAGE = re.compile(r"/docs/\w+/[\w-]+\.md")


@contextmanager
def collect_errors(page: Page) -> Iterator[list[str]]:
    """Give a list that gets each error of the page within the block."""
    seen: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error":
            seen.append(f"{message.text} ({message.location.get('url', '')})")

    def raised(error: object) -> None:
        seen.append(str(error))

    page.on("console", note)
    page.on("pageerror", raised)
    yield seen
    page.remove_listener("console", note)
    page.remove_listener("pageerror", raised)


def is_ours(message: str) -> bool:
    """Return True if an error concerns this extension.

    The page also reports missing files of its own, and that it cannot ask the registry or the models' pages.
    """
    elsewhere = any(address in message for address in ELSEWHERE) or HELP_IN_LANGUAGE.search(message)
    return "flash" in message.lower() and not elsewhere


def open_template(page: Page, name: str, nodes: int) -> None:
    """Open a template from the page's dialog, and wait until its nodes are there."""
    page.evaluate("window.app.graph.clear()")
    page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(PACK, exact=True).first.click(timeout=WAIT)
    card = page.get_by_text(name, exact=True).first
    card.scroll_into_view_if_needed(timeout=WAIT)
    card.click(timeout=WAIT)
    page.wait_for_function("count => window.app.graph.nodes.length === count", arg=nodes, timeout=WAIT)


def queue(page: Page) -> None:
    """Queue the open workflow; raise an AssertionError with the server's words if it refuses the workflow."""
    page.evaluate("window.app.queuePrompt(0)")
    refused = page.evaluate("JSON.stringify(window.app.lastNodeErrors ?? {})")
    assert refused == "{}", refused


def run(page: Page, kind: str = "SaveImage") -> None:
    """Queue the open workflow and wait until its nodes of this kind show a picture."""
    page.evaluate("window.flashDone = new Set(); window.flashFailed = null")
    page.evaluate(
        """() => {
            const api = window.comfyAPI.api.api;
            if (window.flashListens) return;
            window.flashListens = true;
            api.addEventListener('executed', ({ detail }) => {
                if (detail.output?.images?.length) window.flashDone.add(String(detail.node));
            });
            api.addEventListener('execution_error', ({ detail }) => { window.flashFailed = detail.exception_message });
        }"""
    )
    queue(page)
    page.wait_for_function(
        """kind => window.flashFailed || window.app.graph.nodes.filter(node => node.type === kind).every(
            node => window.flashDone.has(String(node.id)))""",
        arg=kind,
        timeout=4 * WAIT,
    )
    failed = page.evaluate("window.flashFailed")
    assert failed is None, failed


def wait_for_picture(page: Page) -> None:
    """Wait until a Save Image node shows its picture, in whichever renderer."""
    page.wait_for_function(
        """() => window.app.graph.nodes.some(
                node => node.type === 'SaveImage' && node.imgs?.some(one => one.naturalWidth))
            || [...document.querySelectorAll('img')].some(
                one => one.naturalWidth >= 64 && /\\/view\\?/.test(one.src) && /type=output/.test(one.src))""",
        timeout=WAIT,
    )


def panel_text(page: Page, name: str) -> str:
    """Return the text of our panel of this name (``flash_card``, ``flash_losses``), once there is one."""
    panel = page.locator(f".flash-diffusion-panel[data-panel={name}]").first
    panel.wait_for(state="attached", timeout=4 * WAIT)
    return panel.inner_text()


def new_workflow(page: Page) -> None:
    """Open an empty workflow, whose nodes show no pictures of the last one."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("window.app.graph.nodes.length === 0", timeout=WAIT)


def drop_blueprint(page: Page, title: str) -> None:
    """Put a blueprint into the graph by the page's search for nodes."""
    before = page.evaluate("window.app.graph.nodes.length")
    page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for_selector("input:focus", timeout=WAIT)
    page.keyboard.type(title)
    page.get_by_text(title, exact=True).first.wait_for(timeout=WAIT)
    page.wait_for_timeout(comfy_page.SETTLE)  # the list is there before its first entry is the chosen one
    page.keyboard.press("Enter")
    page.wait_for_timeout(comfy_page.SETTLE)
    page.mouse.click(500, 500)  # newer pages hold the node at the pointer until a click
    page.wait_for_function("count => window.app.graph.nodes.length > count", arg=before, timeout=WAIT)
    page.keyboard.press("Escape")


def assert_blueprint_has_its_template_values(page: Page, title: str) -> None:
    """Check that a dropped blueprint would queue the values of the template that it was made from, node for node."""
    blueprint = blueprints.TABLE[title]
    twin = json.loads((blueprints.QUEUED / f"{blueprint.template}.json").read_text(encoding="utf-8"))
    queued = page.evaluate("window.app.graphToPrompt().then(prompt => prompt.output)")

    def values(node: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}

    found = {int(key.rpartition(":")[2]): values(node) for key, node in queued.items() if ":" in key}
    expected = {node: values(twin[str(node)]) for node in blueprint.nodes}
    different = {node: (found.get(node), expected[node]) for node in expected if found.get(node) != expected[node]}
    assert not different, f"{title}: (queued, template) of each node that differs: {different}"


def connect_blueprint(page: Page, title: str, task: str = "text-to-image", lora: str | None = None) -> None:
    """Connect a blueprint with the demo's models and a Save Image node; feed pictures and masks to what takes some.

    Args:
        task: of Flash Demo Models.
        lora: to choose in the blueprint. Default: its own.
    """
    page.evaluate(
        """([title, task, lora]) => {
            const graph = window.app.graph;
            const blueprint = graph.nodes.find(node => node.title === title);
            const [left, top] = blueprint.pos;
            let row = 0;
            const add = (kind, values) => {
                const node = window.LiteGraph.createNode(kind);
                const right = left + blueprint.size[0] + 80;
                node.pos = kind === 'SaveImage' ? [right, top] : [left - 340, top + 180 * row++];
                graph.add(node);
                for (const [name, value] of Object.entries(values)) {
                    node.widgets.find(widget => widget.name === name).value = value;
                }
                return node;
            };
            if (lora) blueprint.widgets.find(widget => widget.name === 'lora_name').value = lora;
            const models = add('FlashDemoModels', { task });
            const link = (from, slot, name) => from.connect(slot, blueprint, blueprint.inputs.findIndex(
                input => input.name === name));
            ['model', 'clip', 'vae'].forEach((name, slot) => link(models, slot, name));
            for (const input of blueprint.inputs) {
                if (input.widget) continue;
                if (input.type === 'IMAGE') {
                    link(add('EmptyImage', { width: 128, height: 128, color: 0xc08040 }), 0, input.name);
                }
                if (input.type === 'MASK') link(add('SolidMask', { value: 1, width: 128, height: 128 }), 0, input.name);
            }
            const save = add('SaveImage', { filename_prefix: 'blueprint' });
            blueprint.connect(blueprint.outputs.findIndex(output => output.type === 'IMAGE'), save, 0);
        }""",
        [title, task, lora],
    )


def set_values(page: Page, kind: str, values: dict[str, Any]) -> None:
    """Set widgets of all nodes of a kind, also of those in blueprints."""
    page.evaluate(
        """([kind, values]) => {
            const { nodes } = window.app.graph;
            const all = [...nodes, ...nodes.flatMap(node => node.subgraph?.nodes ?? [])];
            all.filter(node => node.type === kind).forEach(node => {
                for (const [name, value] of Object.entries(values)) {
                    node.widgets.find(widget => widget.name === name).value = value;
                }
            });
        }""",
        [kind, values],
    )


def node_boxes(page: Page) -> dict[str, list[float]]:
    """Return (left, top, right, bottom) of each node with its title, in the graph's units, by its id."""
    return page.evaluate(
        """() => Object.fromEntries(window.app.graph.nodes.map(node => {
            const { ds, canvas } = window.app.canvas;
            const drawn = document.querySelector(`[data-node-id='${node.id}']`)?.getBoundingClientRect();
            if (!drawn?.height) {
                const [[x, y], [width, height]] = [node.pos, node.size];
                return [node.id, [x, y - window.LiteGraph.NODE_TITLE_HEIGHT, x + width, y + height]];
            }
            const edge = canvas.getBoundingClientRect();
            const across = x => (x - edge.x) / ds.scale - ds.offset[0];
            const down = y => (y - edge.y) / ds.scale - ds.offset[1];
            return [node.id, [across(drawn.left), down(drawn.top), across(drawn.right), down(drawn.bottom)]];
        }))"""
    )


def assert_no_overlap(page: Page) -> None:
    """Check that no node of the open graph covers another: a run makes nodes higher, by pictures, texts and cards."""
    boxes = node_boxes(page)
    titles = page.evaluate("Object.fromEntries(window.app.graph.nodes.map(node => [node.id, node.title]))")
    covered = [
        f"{titles[upper]} ({upper}) covers {titles[lower]} ({lower}) by {min(a[3], b[3]) - max(a[1], b[1]):.0f}"
        for (upper, a), (lower, b) in combinations(sorted(boxes.items(), key=lambda item: item[1][1]), 2)
        if min(a[2], b[2]) - max(a[0], b[0]) > OVERLAP and min(a[3], b[3]) - max(a[1], b[1]) > OVERLAP
    ]
    assert not covered, "; ".join(covered)


def open_help_with_picture(page: Page, kind: str) -> None:
    """Put a node of this kind into an empty workflow, open its help page, and wait for the example picture."""
    new_workflow(page)
    page.evaluate(
        """kind => {
            const { app, LiteGraph } = window;
            const node = LiteGraph.createNode(kind);
            app.graph.add(node);
            app.canvas.ds.scale = 0.6;
            app.canvas.ds.offset = [500, 400]; // in sight with its tool bar, also beside the open help
            app.canvas.selectNode?.(node) ?? app.canvas.select(node);
            app.canvas.setDirty(true, true);
        }""",
        kind,
    )
    page.get_by_test_id("info-button").first.click(timeout=WAIT)
    page.wait_for_function(
        "kind => [...document.querySelectorAll(`img[src*='${kind}.webp']`)].some(picture => picture.naturalWidth)",
        arg=kind,
        timeout=WAIT,
    )


def hover_widget(page: Page, kind: str, name: str) -> None:
    """Move the pointer onto the label of a node's widget, in whichever renderer."""
    node, label, x, y = page.evaluate(
        """([kind, name]) => {
            const { canvas, graph } = window.app;
            const node = graph.nodes.find(node => node.type === kind);
            const widget = node.widgets.find(widget => widget.name === name);
            const box = canvas.canvas.getBoundingClientRect();
            const place = (at, offset, edge) => (at + offset) * canvas.ds.scale + edge;
            return [
                String(node.id), widget.label ?? widget.name,
                place(node.pos[0] + 50, canvas.ds.offset[0], box.x),
                place(node.pos[1] + (widget.last_y ?? widget.y) + 10, canvas.ds.offset[1], box.y),
            ];
        }""",
        [kind, name],
    )
    drawn_in_html = page.locator(f"[data-node-id='{node}']").get_by_text(label, exact=True)
    if drawn_in_html.count():
        drawn_in_html.first.hover()
    else:
        page.mouse.move(x, y)
        page.mouse.move(x + 2, y + 1)  # the tooltip comes when the pointer rests


def open_menu(page: Page, *path: str) -> list[str]:
    """Open the page's library of nodes and a branch of its tree; return the names of all entries that are shown."""
    page.evaluate("window.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library')")
    for name in path:
        entry = page.get_by_role("treeitem").get_by_text(name, exact=True).first
        entry.scroll_into_view_if_needed()
        entry.dispatch_event("click")  # a pointer would wait for ever where another part of the page covers the entry
        page.wait_for_timeout(comfy_page.SETTLE)
    return [text.split("\n")[0] for text in page.get_by_role("treeitem").all_inner_texts()]


def offers_language(page: Page, locale: str) -> bool:
    """Return whether the page can be set to a language."""
    offered = page.evaluate("window.app.ui.settings.settingsLookup['Comfy.Locale'].options")
    return any((one["value"] if isinstance(one, dict) else one) == locale for one in offered)


def has_app_mode(page: Page) -> bool:
    """Return whether this page has an app mode."""
    # The command to switch came first, in 0.3.75's page; app mode's own settings came with what it shows.
    return bool(page.evaluate("'Comfy.AppBuilder.VueNodeSwitchDismissed' in window.app.ui.settings.settingsLookup"))


def run_in_app_mode(page: Page, inputs: int) -> None:
    """Enter app mode, count the shown inputs, run, and wait for the picture. Leave app mode."""
    # A first visit is welcomed by a dialog that covers the page.
    page.add_locator_handler(page.get_by_role("button", name="Skip", exact=True), lambda skip: skip.click())
    page.evaluate("window.app.extensionManager.command.execute('Comfy.ToggleLinear')")
    widgets = page.get_by_test_id("app-mode-widget-item")
    page.wait_for_function(
        "count => document.querySelectorAll('[data-testid=app-mode-widget-item]').length === count",
        arg=inputs,
        timeout=WAIT,
    )
    assert widgets.count() == inputs
    page.evaluate(
        """() => {
            window.flashEnded = false;
            window.comfyAPI.api.api.addEventListener('execution_success', () => { window.flashEnded = true; });
        }"""
    )
    page.get_by_test_id("linear-run-button-icon").first.click(timeout=WAIT)
    page.wait_for_function("window.flashEnded", timeout=4 * WAIT)
    page.get_by_test_id("linear-image-output").first.wait_for(timeout=4 * WAIT)


def leave_app_mode(page: Page) -> None:
    """Go back to the graph."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.ToggleLinear')")
    page.get_by_test_id("app-mode-widget-item").first.wait_for(state="detached", timeout=WAIT)


def interrupt_and_resume(page: Page, settings: dict[str, Any]) -> None:
    """Distil with Flash Distill: see the preview change, interrupt, queue again, and see the updates go on.

    Args:
        settings: values of Flash Distill; with ``updates`` and ``preview_every``, and a seed that no run had before.
    """
    page.evaluate(
        """() => {
            const api = window.comfyAPI.api.api;
            window.flashPreviews = [];
            window.flashUpdates = [];
            window.flashInterrupted = false;
            const keep = async blob => {
                const bytes = new Uint8Array(await crypto.subtle.digest('SHA-1', await blob.arrayBuffer()));
                window.flashPreviews.push(Array.from(bytes).join());
            };
            api.addEventListener('b_preview', ({ detail }) => keep(detail));
            api.addEventListener('flash_diffusion.losses', ({ detail }) => window.flashUpdates.push(detail.done));
            api.addEventListener('execution_interrupted', () => { window.flashInterrupted = true; });
        }"""
    )
    set_values(page, "FlashDistill", settings)
    queue(page)
    page.wait_for_function("new Set(window.flashPreviews).size >= 2", timeout=4 * WAIT)
    assert "loss" in panel_text(page, "flash_losses")
    page.evaluate("window.comfyAPI.api.api.interrupt(null)")
    page.wait_for_function("window.flashInterrupted", timeout=4 * WAIT)
    before = page.evaluate("Math.max(...window.flashUpdates)")
    assert before < settings["updates"], "it ended before it was interrupted; raise updates"
    page.evaluate("window.flashUpdates = []")
    run(page)
    updates = page.evaluate("window.flashUpdates")
    assert updates, "no losses were seen after the interrupt"
    assert min(updates) > before, f"interrupted after update {before}, but it went on with update {min(updates)}"
    assert max(updates) == settings["updates"]
    wait_for_picture(page)
