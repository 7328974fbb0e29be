"""Flash Evaluate: figures and pictures of a few-step model beside its teacher."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.v0_0_2 import io

from ...flash_core.grid import MAX_FEW_STEPS
from ...flash_core.lora import FlashMetadata
from ..distil.training.settings import usual_for
from ..sampling.compare import check_models, model_notes, parse_steps
from ..shared.inputs import check_unconditional, seed_input
from ..shared.model_facts import METADATA_KEY, check_vae, model_base
from ..shared.process import process_of
from ..shared.prompts import check_channels, check_prompts, encoded
from ..shared.schema import advanced, count, node_schema, show_text
from ..shared.sizes import latent_shape

LEAST = 8  # pictures of a run: of fewer there is no distance
PROMPTS = "a red apple\na smiling face\na brown dog\na green tree"
TRAINED_GUIDANCE = "guidance"  # in the metadata of a LoRA of ours: the teacher's guidance


class FlashEvaluate(io.ComfyNode):
    """Measure a few-step model against its teacher."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="training",
            node_id="FlashEvaluate",
            display_name="Flash Evaluate",
            search_aliases=["evaluate lora", "fid", "quality", "benchmark", "lora test", "metrics", "flash diffusion"],
            description="Measure how near a few-step model is to its teacher: distance, diversity, sharpness at 1, 2 "
            "and 4 steps, beside the undistilled model with as many passes; and a grid of pictures.",
            inputs=[
                io.Model.Input("model", tooltip="The teacher: the model without its Flash LoRA."),
                io.Model.Input(
                    "flash_model",
                    tooltip="The same model with its few-step LoRA, from Flash LoRA Loader or Flash Distill.",
                ),
                io.Vae.Input("vae", tooltip="The models' VAE, since pictures are compared, not latents."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default=PROMPTS,
                    tooltip="One prompt a line. Take prompts that the LoRA was not trained on, of the kind that you "
                    "draw; 16 or more.",
                ),
                io.Int.Input(
                    "per_prompt",
                    default=4,
                    min=2,
                    max=64,
                    tooltip="Pictures of each prompt in every run, drawn at once. Lower it if memory runs out.",
                ),
                io.String.Input(
                    "flash_steps",
                    default="1, 2, 4",
                    tooltip=f"Flash's step counts (1 to {MAX_FEW_STEPS}), separated by commas.",
                ),
                seed_input("Seeds the noise of the first prompt. Each further prompt takes the next seed."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts. Not needed with 'positive'."),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Encoded prompts in place of the text: join several with Conditioning (Combine).",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The teacher's negative prompt. Without it the empty text."
                ),
                advanced(
                    io.Int.Input,
                    "width",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    optional=True,
                    tooltip="Width of the pictures; 0 is the model's own.",
                ),
                advanced(
                    io.Int.Input,
                    "height",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    optional=True,
                    tooltip="Height of the pictures; 0 is the model's own.",
                ),
                advanced(
                    io.Int.Input,
                    "teacher_steps",
                    default=30,
                    min=2,
                    max=1000,
                    optional=True,
                    tooltip="The teacher's step count.",
                ),
                advanced(
                    io.Float.Input,
                    "teacher_guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    tooltip="The teacher's guidance (KSampler's cfg). 0: what the LoRA was trained with, else what is "
                    "usual for the model.",
                ),
                advanced(
                    io.Combo.Input,
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="dpmpp_2m",
                    optional=True,
                    tooltip="The teacher's sampler. Flash uses its own.",
                ),
                advanced(
                    io.Combo.Input,
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    optional=True,
                    tooltip="The teacher's noise schedule. Flash uses its trained timesteps.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="report", tooltip="One column for each run, one row for each of the first 4 prompts."
                ),
                io.String.Output(display_name="text", tooltip="The figures as a Markdown table, and what they say."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        flash_model: ModelPatcher,
        vae: VAE,
        prompts: str,
        per_prompt: int,
        flash_steps: str,
        seed: int,
        clip: CLIP | None = None,
        positive: list[Any] | None = None,
        negative: list[Any] | None = None,
        width: int = 0,
        height: int = 0,
        teacher_steps: int = 30,
        teacher_guidance: float = 0.0,
        sampler_name: str = "dpmpp_2m",
        scheduler: str = "simple",
    ) -> io.NodeOutput:
        """Draw all runs, measure them, and write the report."""
        from .drawing import Request, draw
        from .page import Report

        steps = tuple(parse_steps(flash_steps))
        check_models(model, flash_model, "Flash Evaluate", with_frames=True)
        check_vae(vae, model)
        names = [line.strip() for line in prompts.splitlines() if line.strip()]
        given = positive is not None
        positive, negative = encoded(prompts, clip, positive, negative)
        if given or len(names) != len(positive):
            names = [f"prompt {number + 1}" for number in range(len(positive))]
        for one in (model, flash_model):
            check_unconditional(one, negative)
        check_prompts(model, positive=positive, negative=negative)
        shape = latent_shape(model, width, height)
        check_channels(model, (per_prompt, *shape), positive=positive, negative=negative)
        pictures = len(positive) * per_prompt
        if pictures < LEAST:
            raise ValueError(
                f"{count(len(positive), 'prompt')} with {per_prompt} pictures each are {pictures} pictures a run; "
                f"expected {LEAST} or more, since a distance of fewer is chance. Write more prompts, or raise "
                "per_prompt."
            )
        request = Request(
            model=model,
            flash_model=flash_model,
            positive=positive,
            negative=negative,
            shape=shape,
            per_prompt=per_prompt,
            steps=steps,
            teacher_steps=teacher_steps,
            guidance=teacher_guidance or guidance_of(model, flash_model),
            sampler_name=sampler_name,
            scheduler=scheduler,
            seed=seed,
        )
        runs = draw(request, vae, lambda text: show_text(cls, text))
        report = Report(request, runs, names)
        show_text(cls, "\n".join(report.verdicts()))
        return io.NodeOutput(report.picture(), report.text(model_notes(model, flash_model)))


def guidance_of(model: ModelPatcher, flash_model: ModelPatcher) -> float:
    """Return the guidance that the LoRA was trained with; where it does not say, what is usual for the model."""
    metadata: FlashMetadata | None = flash_model.get_attachment(METADATA_KEY)
    trained = "" if metadata is None else metadata.training.get(TRAINED_GUIDANCE, "")
    if trained.replace(".", "", 1).isdecimal():
        return float(trained)
    flow = process_of(model.get_model_object("model_sampling")).kind == "flow"
    transformer = not hasattr(model.model.diffusion_model, "input_blocks")
    return usual_for(model_base(model), flow=flow, transformer=transformer).guidance
