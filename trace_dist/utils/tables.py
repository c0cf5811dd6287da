"""Tables on standard output."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

MOST_COLUMNS = 2000
"""Width of a table whose words are longer than any terminal's lines."""


class _Output(Console):
    """A console that leaves it to the program what happens where nobody reads on; rich's own ends it with an exit code of 1."""

    def on_broken_pipe(self) -> None:
        # Called while the error is handled.
        raise


def print_table(table: RenderableType, *, least_width: int = 0, markup: bool = True) -> None:
    """Print a table. No word of it is cut: where it is no terminal it gets the room that it needs, else words are broken.

    Args:
        table: what is printed.
        least_width: in characters, where the output is narrower or no terminal.
        markup: whether text in brackets is rich's markup.

    Raises:
        BrokenPipeError: whoever reads the output has seen enough.
    """
    console = Console()
    width = max(least_width, console.width)
    if isinstance(table, Table):
        for column in table.columns:
            column.overflow = "fold"
        if not console.is_terminal:
            needed = Measurement.get(console, console.options.update(max_width=MOST_COLUMNS), table).minimum
            width = max(width, needed)
    _Output(width=width, markup=markup).print(table)
