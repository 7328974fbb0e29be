"""The loss terms over a Denoiser: what each asks the network, and the scalar whose gradient the student takes.

The formulas alone are in ``losses.py``; ``distiller.py`` weighs the terms and sums their gradients.
"""
