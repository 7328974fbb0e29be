"""Figures of sets of pictures, from features that need no trained network: distances, diversity, looks, chance."""
