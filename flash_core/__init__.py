"""The method, in pure PyTorch: no diffusers, no peft, no accelerate, no ComfyUI.

Source: Chadebec, Tasar, Benaroche, Aubin, *Flash Diffusion* (arXiv 2406.02347). Latents are float32 throughout this
package; a backbone casts to its own dtype inside its :class:`~.denoiser.Denoiser`.
"""
