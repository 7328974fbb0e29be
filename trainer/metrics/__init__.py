"""Figures computed on features and pictures, and the networks that give the features."""
