"""Compute figures from features and pictures; load the networks that compute the features."""
