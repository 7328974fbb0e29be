"""Find the parts of a model, check them before anything heavy is read, and load them as a diffusers pipeline."""
