"""Encode the samples that the cache lacks, with the teacher's own encoders; all processes together, each its share."""
