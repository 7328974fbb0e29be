"""How a teacher lies in memory and runs there: where, in how many bits, in which order, compiled, or in tiles."""
