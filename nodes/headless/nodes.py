"""Flash Distill Headless: make a few-step LoRA of a model file in a process of the trainer, and follow that process."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, Literal, get_args

import folder_paths
from comfy_api.v0_0_2 import io

from ..distil.nodes import RUNS as IN_GRAPH
from ..distil.training.settings import PRESET_NAMES
from ..shared.inputs import NONE
from ..shared.page import chart, send_losses
from ..shared.schema import advanced, node_schema, show_text
from .models import AUTO, DEMO, diffusers_folders, model_names

TRAINER_PRESETS = ("best", "tdm", "paper")
PRESETS = (*PRESET_NAMES, *TRAINER_PRESETS)
MOST_SEED = 2**31 - 1  # of a recipe
PROMPTS = "a red apple\na smiling face\na brown dog"

Action = Literal["run and wait", "run in the background", "stop"]
WAIT, BACKGROUND, STOP = ACTIONS = get_args(Action)


def datasets() -> list[str]:
    """Return the folders in ComfyUI's input folder."""
    root = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))


def find_dataset(name: str) -> Path | None:
    """Return a folder of pictures in ComfyUI's input folder, None for no folder.

    Raises:
        ValueError: there is no such folder, or a link leads out of ComfyUI's input folder.
    """
    if name == NONE:
        return None
    if name not in datasets():
        raise ValueError(
            f"There is no folder {name!r} in ComfyUI's input folder; expected one from the list, or {NONE}."
        )
    root = Path(folder_paths.get_input_directory())
    if not (root / name).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"The folder {name!r} leads out of {root} through a link. Copy the pictures into it.")
    return root / name


class FlashDistillHeadless(io.ComfyNode):
    """Distil a model file in a process of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="training",
            node_id="FlashDistillHeadless",
            display_name="Flash Distill Headless",
            search_aliases=["train lora", "distill", "headless", "background training", "trainer", "few-step", "queue"],
            description="Train a few-step LoRA of a model file in a process with its own memory, which goes on when "
            "ComfyUI ends. For a MODEL of the graph, with its merges and patches, use Flash Distill.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=model_names(),
                    default=DEMO,
                    tooltip="The teacher: a checkpoint (SD 1.5, SD 2, SDXL, SD3), or a folder of models/diffusers.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default=PROMPTS,
                    tooltip="One prompt a line. The LoRA is best at what it has seen: write 20 to 200 lines. With a "
                    "dataset the LoRA learns its captions, and the previews draw the first six lines of this text.",
                ),
                io.String.Input(
                    "name",
                    default="my_flash",
                    tooltip="Names the run's folder and the LoRA in models/loras; sub-folders are allowed: "
                    "mine/my_flash.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=PRESETS[1],
                    tooltip="How much work. quick try: 100 updates. standard: 300. thorough: 2000. best, tdm and paper "
                    "are the trainer's own recipes: hours to days of a GPU.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Width and height of the pictures to train on; 0 is the model's own. Smaller is quicker.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The teacher's guidance (KSampler's cfg), which becomes part of the LoRA. 0: by the preset "
                    "and the model's family.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MOST_SEED,
                    # The page would change the seed after each run, but the same inputs must go on with a stopped run.
                    control_after_generate=False,
                    tooltip="Seeds the LoRA's first weights and all noise. The same inputs go on with the same run; "
                    "another seed begins anew.",
                ),
                io.Combo.Input(
                    "action",
                    options=list(ACTIONS),
                    default=WAIT,
                    tooltip="run and wait: follow the run here; Interrupt stops it with a checkpoint. run in the "
                    "background: return at once; queue again to see how far it is. stop: stop this run.",
                ),
                io.Combo.Input(
                    "dataset",
                    options=[NONE, *datasets()],
                    default=NONE,
                    optional=True,
                    tooltip="A folder of ComfyUI's input folder: pictures, each with its caption in a .txt file of its "
                    "name.",
                ),
                io.Boolean.Input(
                    "unload_models",
                    default=True,
                    optional=True,
                    tooltip="On: free ComfyUI's memory before a run is queued. Needed where both share one GPU.",
                ),
                advanced(
                    io.Combo.Input,
                    "config",
                    options=[AUTO, *diffusers_folders()],
                    default=AUTO,
                    optional=True,
                    tooltip="Only for a checkpoint: a folder of models/diffusers with the configuration of its family. "
                    "auto: the configuration, and the parts that the file lacks, from the Hugging Face Hub.",
                ),
                advanced(
                    io.Int.Input,
                    "rank",
                    default=0,
                    min=0,
                    max=256,
                    optional=True,
                    tooltip="The LoRA's rank, 8 to 64. 0: by the preset and the model's size.",
                ),
                advanced(
                    io.Float.Input,
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=0.1,
                    step=0.000001,
                    round=0.0000001,
                    optional=True,
                    tooltip="AdamW's learning rate. 0: by the preset and the model's size. Lower it if "
                    "training diverges.",
                ),
                advanced(
                    io.Int.Input,
                    "updates",
                    default=0,
                    min=0,
                    max=100000,
                    optional=True,
                    tooltip="Number of training updates. 0: by the preset. Only for quick try, standard, thorough.",
                ),
                advanced(
                    io.Int.Input,
                    "trajectories",
                    default=0,
                    min=0,
                    max=100000,
                    optional=True,
                    tooltip="How many pictures the teacher draws to learn from. 0: by the preset. Only for quick try, "
                    "standard, thorough.",
                ),
                advanced(
                    io.Int.Input,
                    "at_once",
                    default=0,
                    min=0,
                    max=512,
                    optional=True,
                    tooltip="Samples that the model takes at once: lower it if memory runs out. 0: by the preset and "
                    "the model's size.",
                ),
                advanced(
                    io.Int.Input,
                    "preview_every",
                    default=25,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="Updates between two previews; 0: one at the end.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="The finished LoRA, which is also in models/loras."),
                io.Image.Output(display_name="preview", tooltip="The last preview: teacher and student."),
                io.String.Output(display_name="text", tooltip="The state of the run, and of the runs in the queue."),
                io.LossMap.Output(display_name="loss_map", tooltip="The losses, for Plot Loss Graph."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> str:
        """Return another value each time, so that the node is asked again how far its run is."""
        return uuid.uuid4().hex

    @classmethod
    def execute(
        cls,
        model: str,
        prompts: str,
        name: str,
        preset: str,
        resolution: int,
        guidance: float,
        seed: int,
        action: Action,
        dataset: str = NONE,
        unload_models: bool = True,
        config: str = AUTO,
        rank: int = 0,
        learning_rate: float = 0.0,
        updates: int = 0,
        trajectories: int = 0,
        at_once: int = 0,
        preview_every: int = 25,
    ) -> io.NodeOutput:
        """Queue the run, follow it, or stop it; see :mod:`.run`."""
        from ..distil.lora_output import lora_path
        from .models import find_config, find_teacher
        from .recipe import Request
        from .run import HeadlessRun
        from .starting import runs_folder

        request = Request(
            find_teacher(model),
            find_config(config),
            tuple(line.strip() for line in prompts.splitlines() if line.strip()),
            find_dataset(dataset),
            preset,
            resolution,
            guidance,
            rank,
            learning_rate,
            updates,
            trajectories,
            at_once,
            seed,
            preview_every,
            lora_path(name).as_posix(),
        )
        request.check()
        run = HeadlessRun(
            request, runs_folder(), lambda text: show_text(cls, text), lambda losses: send_losses(cls, losses)
        )
        if action == STOP:
            run.stop()
        elif not run.is_finished():
            run.begin(unload_models)
            if action == WAIT:
                run.follow()
        outputs: tuple[Any, ...] = run.outputs()
        return io.NodeOutput(*outputs, ui=chart(run.losses()))


class FlashDistillRuns(io.ComfyNode):
    """List the runs of Flash Distill Headless."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="training",
            node_id="FlashDistillRuns",
            display_name="Flash Distill Runs",
            search_aliases=["training queue", "list runs", "headless", "distill", "progress", "free disk", "prune"],
            description="List the runs of Flash Distill Headless and of Flash Distill, with their states and sizes on "
            "disk. Runs that are not needed any more can be removed.",
            inputs=[
                advanced(
                    io.String.Input,
                    "remove",
                    default="",
                    optional=True,
                    tooltip="The name of a run's folder, as in the list: the folder is deleted. Its LoRA in "
                    "models/loras stays. Empty: nothing is deleted.",
                )
            ],
            outputs=[
                io.String.Output(
                    display_name="text", tooltip="A line for each run: its folder's name, its state and its size."
                )
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> str:
        """Return another value each time, so that the list is read again."""
        return uuid.uuid4().hex

    @classmethod
    def execute(cls, remove: str = "") -> io.NodeOutput:
        """Remove a run if asked to, and show the list on the node."""
        from . import following
        from .starting import queue_lives, runs_folder

        runs = runs_folder()
        folders = (runs, runs.parent / IN_GRAPH, queue_lives(runs))
        removed = f"{following.remove(remove.strip(), *folders)}\n\n" if remove.strip() else ""
        text = removed + following.table(*folders)
        show_text(cls, text)
        return io.NodeOutput(text)
