"""What stands in for a run's networks: published sizes, and modules whose tensors have no values."""
