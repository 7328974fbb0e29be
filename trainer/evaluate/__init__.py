"""`flash-diffusion evaluate`: make pictures, measure them, compare them."""
