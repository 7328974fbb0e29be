"""A run's health: figures of its log, rules that watch them, and sentences with advice."""
