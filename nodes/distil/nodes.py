"""Flash Distill: make a few-step LoRA of the graph's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.v0_0_2 import io

from ..lora.loaded import LOADED_KEY, check_single_flash
from ..lora.patches import apply_lora
from ..shared.inputs import MAX_SEED, fixed_latent
from ..shared.lists import joined
from ..shared.model_facts import METADATA_KEY, check_makes_pictures, check_vae, model_base
from ..shared.page import chart, send_losses
from ..shared.process import process_of
from ..shared.prompts import check_channels, check_prompts, encoded
from ..shared.schema import advanced, count, node_schema, show_text
from ..shared.sizes import latent_shape
from .lora_output import FlashLora
from .training.settings import PRESET_NAMES, PresetName, choose_settings, usual_for

RUNS = "flash_distill"  # the folder of all runs in ComfyUI's output folder
OUT_OF_MEMORY = (
    "Out of memory with {} at once. Turn 'checkpointing' on, set 'at_once' to 1, lower 'width' and 'height', or close "
    "other programs. What is learnt so far is kept: queue again with 'checkpointing' on and it goes on.\n\n({})"
)
PROMPTS = "a red apple\na smiling face\na brown dog"


class FlashDistill(io.ComfyNode):
    """Distil a MODEL into a few-step LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="training",
            node_id="FlashDistill",
            display_name="Flash Distill",
            search_aliases=[
                "train lora",
                "distill",
                "distillation",
                "few-step",
                "make turbo",
                "lcm",
                "speed up model",
                "flash diffusion",
            ],
            description="Train a few-step LoRA for the model that you connect, with everything that is patched into "
            "it. Interrupt at any time: queue again to go on.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The teacher: any picture model, with its LoRAs, merges and patches. It stays unchanged.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default=PROMPTS,
                    tooltip="One prompt a line. The LoRA is best at what it has seen: write 20 to 200 lines of the "
                    "kind that you want to draw.",
                ),
                io.String.Input(
                    "name", default="my_flash", tooltip="Names the run's folder in output/flash_distill, and the LoRA."
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESET_NAMES),
                    default=PRESET_NAMES[1],
                    tooltip="How much work. quick try: 140 updates, to see that it works. standard: 300. thorough: "
                    "2000 larger ones. The node shows the time left.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Width of the pictures to train on; 0 is the model's own. Smaller is quicker.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Height of the pictures; 0 is the model's own.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The teacher's guidance (KSampler's cfg), which becomes part of the LoRA. 0: what is usual "
                    "for the model.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    # The page would change the seed after each run, but the same inputs must go on with a stopped run.
                    control_after_generate=False,
                    tooltip="Seeds the LoRA's first weights and all noise. The same inputs give the same LoRA; "
                    "another seed begins anew.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts. Not needed with 'positive'."),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Draws previews and report in full size. Without it they are coarse."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Encoded prompts in place of the text: several joined with Conditioning (Combine), or the "
                    "list of a dataset node.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The teacher's negative prompt. Without it the empty text.",
                ),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="Encoded pictures to learn from: one for each prompt, in the order of the prompts, or any "
                    "number for one prompt. Without it the teacher draws them, which is usually better.",
                ),
                advanced(
                    io.Int.Input,
                    "rank",
                    default=0,
                    min=0,
                    max=256,
                    optional=True,
                    tooltip="The LoRA's rank, 8 to 64. 0: by the model's size.",
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
                    tooltip="AdamW's learning rate. 0: by the model's size. Lower it if training diverges.",
                ),
                advanced(
                    io.Int.Input,
                    "updates",
                    default=0,
                    min=0,
                    max=100000,
                    optional=True,
                    tooltip="Number of training updates. 0: by the preset.",
                ),
                advanced(
                    io.Int.Input,
                    "trajectories",
                    default=0,
                    min=0,
                    max=100000,
                    optional=True,
                    tooltip="How many pictures the teacher draws to learn from. 0: by the preset. Not used with "
                    "'latents'.",
                ),
                advanced(
                    io.Int.Input,
                    "samples",
                    default=0,
                    min=0,
                    max=512,
                    optional=True,
                    tooltip="Samples in one update. 0: by the preset.",
                ),
                advanced(
                    io.Int.Input,
                    "at_once",
                    default=0,
                    min=0,
                    max=512,
                    optional=True,
                    tooltip="Samples that the model takes at once: lower it if memory runs out. 0: by the model's "
                    "size.",
                ),
                advanced(
                    io.Int.Input,
                    "teacher_steps",
                    default=0,
                    min=0,
                    max=128,
                    step=4,
                    optional=True,
                    tooltip="Steps of the teacher, a multiple of 4. 0: what is usual for the model.",
                ),
                advanced(
                    io.Boolean.Input,
                    "adversarial",
                    default=False,
                    optional=True,
                    tooltip="On: the last 30 % of the updates sharpen single steps with a discriminator in the place "
                    "of the matching of distributions. Needs more memory and time, and a few thousand updates to help.",
                ),
                advanced(
                    io.Int.Input,
                    "preview_every",
                    default=25,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="Updates between two previews; 0: none. It does not change the result.",
                ),
                advanced(
                    io.Boolean.Input,
                    "checkpointing",
                    default=False,
                    optional=True,
                    tooltip="On: the backward pass computes activations again, block by block. Needs much less memory, "
                    "and about a third more time. The result differs by rounding only.",
                ),
                advanced(
                    io.Boolean.Input,
                    "critic",
                    default=False,
                    optional=True,
                    tooltip="On: in the last 30 % of the updates, which match the distribution of single steps with "
                    "the teacher's, a second LoRA, the critic, learns what the student draws. Off: the student is its "
                    "own critic. For experiments: on needs more memory and time.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with the new LoRA, ready for Flash Sampler at 1 to 8 steps.",
                ),
                io.LoraModel.Output(
                    display_name="lora", tooltip="The LoRA. Connect Flash Save LoRA to keep it in models/loras."
                ),
                io.Image.Output(
                    display_name="report", tooltip="Teacher and student from the same new noise, and the losses."
                ),
                io.String.Output(
                    display_name="text", tooltip="What was done, the figures before and after, and the time."
                ),
                io.LossMap.Output(display_name="loss_map", tooltip="The losses, for Plot Loss Graph."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            is_input_list=True,
        )

    @classmethod
    def execute(cls, **inputs: list[Any]) -> io.NodeOutput:
        """Join the lists of the inputs, and :meth:`train` once."""
        return cls.train(**joined(inputs))

    @classmethod
    def train(
        cls,
        model: ModelPatcher,
        prompts: str,
        name: str,
        preset: PresetName,
        width: int,
        height: int,
        guidance: float,
        seed: int,
        rank: int = 0,
        learning_rate: float = 0.0,
        updates: int = 0,
        trajectories: int = 0,
        samples: int = 0,
        at_once: int = 0,
        teacher_steps: int = 0,
        adversarial: bool = False,
        preview_every: int = 25,
        checkpointing: bool = False,
        critic: bool = False,
        clip: CLIP | None = None,
        vae: VAE | None = None,
        positive: list[Any] | None = None,
        negative: list[Any] | None = None,
        latents: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        """Train, or go on with a run of the same inputs; see :func:`~.run.distil`."""
        from .run import Request, distil  # loads the method: not needed at ComfyUI's start

        check_makes_pictures(model, "Flash Distill", with_frames=True)
        check_single_flash(model, model.get_attachment(LOADED_KEY) or (), ["the one that Flash Distill would make"])
        if vae is not None:
            check_vae(vae, model)
        flow = process_of(model.get_model_object("model_sampling"), to_distil=True).kind == "flow"
        positive, negative = encoded(prompts, clip, positive, negative)
        check_prompts(model, positive=positive, negative=negative)
        given = None if latents is None else fixed_latent(model, latents)
        shape = latent_shape(model, width, height) if given is None else (given.shape[1], *given.shape[-2:])
        check_channels(model, (1, *shape), positive=positive, negative=negative)
        network = model.model.diffusion_model
        usual = usual_for(model_base(model), flow=flow, transformer=not hasattr(network, "input_blocks"))
        settings = choose_settings(
            preset,
            float(sum(value.numel() for value in network.parameters())),
            usual,
            flow=flow,
            replays=given is None,
            seed=seed,
            adversarial=adversarial,
            critic=critic,
            guidance=guidance,
            rank=rank,
            learning_rate=learning_rate,
            updates=updates,
            trajectories=trajectories,
            samples=samples,
            at_once=at_once,
            teacher_steps=teacher_steps,
        )
        output = Path(folder_paths.get_output_directory()) / RUNS
        request = Request(
            model, positive, negative, given, shape, vae, settings, name, output, preview_every, checkpointing
        )
        said = ""
        try:
            result = distil(
                request,
                lambda text: show_text(cls, text),
                lambda losses, total: send_losses(cls, losses, total),
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = OUT_OF_MEMORY.format(count(settings.at_once, "sample"), str(error).splitlines()[0])
        if said:
            # Here the failed update's tensors are gone. ComfyUI unloads all models at this class of error.
            show_text(cls, said)
            raise torch.cuda.OutOfMemoryError(said)
        show_text(cls, result.text)
        patched, _ = apply_lora(result.file, model, 1.0)
        patched.set_attachments(METADATA_KEY, result.file.metadata)
        lora = FlashLora.of_file(result.path, name)
        losses = {"loss": result.losses}
        return io.NodeOutput(patched, lora, result.picture, result.text, losses, ui=chart(result.losses))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch found no memory: CUDA has an error class for it, Apple's GPUs and CPUs only words."""
    words = str(error).lower()
    return (
        isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in words or "can't allocate memory" in words
    )
