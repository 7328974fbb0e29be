"""Training samples: read from shards, folders or the demo, put in order, encoded and kept in memory."""
