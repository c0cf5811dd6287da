"""Streams of tasks: the driver, the methods, their scores."""
