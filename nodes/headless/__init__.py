"""Distil in a process of the trainer that ComfyUI starts, follows and stops."""
