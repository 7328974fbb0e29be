"""Recipes: YAML configurations shipped with the package; see ``flash-diffusion distill --help``."""
