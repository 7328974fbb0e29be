"""The loss terms over a Denoiser: what each asks the network, and the states of the student that they may start from.

The formulas alone are in ``losses.py``; ``distiller.py`` weighs the terms and sums their gradients.
"""
