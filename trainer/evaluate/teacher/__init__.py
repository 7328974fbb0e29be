"""The parts of a comparison with the teacher: the captions, the reference sets, the targets."""
