"""Encoded samples on disk: each picture, caption and condition is encoded once, for all runs that share the cache."""
