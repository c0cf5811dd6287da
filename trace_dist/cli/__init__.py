"""Command line: ``trace-dist <command> --config run.yaml [--section.key value ...]``."""

from trace_dist.cli.main import main

__all__ = ["main"]
