"""`flash-diffusion demo ...`: make the demo's pictures, teacher and adapters. Only the command line imports it."""
