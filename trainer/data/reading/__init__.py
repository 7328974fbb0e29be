"""Read pictures with captions from folders, shards, lists of prompts and the demo: one source for each kind."""
