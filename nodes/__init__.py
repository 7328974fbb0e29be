"""The ComfyUI nodes: thin V3 shells over flash_core, one file per family as a user finds it in the menu."""
