"""`flash-diffusion demo glyphs`: make the second embedded teacher, letters and digits in many typefaces."""
