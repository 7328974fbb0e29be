"""How a teacher's weights lie in memory: where, in how many bits, in which order."""
