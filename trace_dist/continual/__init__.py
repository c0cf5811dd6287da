"""Sequences of tasks: runner, metrics, baselines."""
