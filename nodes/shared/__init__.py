"""Parts that several nodes use: schemas, inputs, checks, and facts of a MODEL."""
