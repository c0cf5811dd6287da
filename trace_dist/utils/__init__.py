"""Small helpers below every other layer: ranks, files, logging, seeds."""
