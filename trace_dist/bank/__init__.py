"""Deltas, and the retrieval of the right one."""
