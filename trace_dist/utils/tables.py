"""Tables on standard output."""

from __future__ import annotations

from rich.console import Console, RenderableType


class _Output(Console):
    """A console that leaves it to the program what happens where nobody reads on; rich's own ends it with an exit code of 1."""

    def on_broken_pipe(self) -> None:
        # Called while the error is handled.
        raise


def print_table(table: RenderableType, *, least_width: int = 0, markup: bool = True) -> None:
    """Print a table.

    Args:
        table: what is printed.
        least_width: in characters, where the output is narrower or no terminal.
        markup: whether text in brackets is rich's markup.

    Raises:
        BrokenPipeError: whoever reads the output has seen enough.
    """
    width = max(least_width, Console().width)
    _Output(width=width, markup=markup).print(table)
