"""Find shards by their path, brace pattern or URL, and read those that are on a web server or in an object store."""
