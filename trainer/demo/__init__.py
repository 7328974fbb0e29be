"""The embedded demo: its files (`assets.py`), its pictures, and in `making/` the commands that made them."""
