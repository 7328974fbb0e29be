"""Flash Evaluate: a few-step model against its teacher, in figures and pictures, inside the graph."""
