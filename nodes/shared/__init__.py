"""What all nodes share: schemas, inputs, and what a MODEL is."""
