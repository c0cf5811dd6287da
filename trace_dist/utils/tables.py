"""Tables on standard output."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

MOST_COLUMNS = 2000
"""Width of a table whose words are longer than any terminal's lines."""

LINE = 200
"""Up to which width each row of a table is one line where the output is no terminal, as programs read it."""


class _Output(Console):
    """A console that leaves it to the program what happens where nobody reads on; rich's own ends it with an exit code of 1."""

    def on_broken_pipe(self) -> None:
        # Called while the error is handled.
        raise


def print_table(table: RenderableType, *, least_width: int = 0, markup: bool = True) -> None:
    """Print a table. No word of it is cut: where it is no terminal it gets the room that it needs. Words are broken where a
    terminal has no room for them.

    Args:
        table: what is printed.
        least_width: in characters, where the output is narrower or no terminal.
        markup: whether text in brackets is rich's markup.

    Raises:
        BrokenPipeError: whoever reads the output has seen enough.
    """
    console = Console(markup=markup)
    width = max(least_width, console.width)
    if isinstance(table, Table):
        for column in table.columns:
            column.overflow = "fold"
        needed = _measure(console, table)
        if not console.is_terminal:
            width = max(width, needed.minimum, min(needed.maximum, LINE))
        if needed.minimum <= width:
            _share_out(console, table, width - needed.minimum)
    _Output(width=width, markup=markup).print(table)


def _measure(console: Console, what: RenderableType) -> Measurement:
    return Measurement.get(console, console.options.update(max_width=MOST_COLUMNS), what)


def _share_out(console: Console, table: Table, room: int) -> None:
    """Give each column its longest word, and the room that is left to those that need it: rich takes from the widest column
    first, and would break a name where a heading of several words could be folded."""
    sizes = []
    for column in table.columns:
        cells = [_measure(console, cell) for cell in (column.header, *column.cells)]
        sizes.append((max(cell.minimum for cell in cells), max(cell.maximum for cell in cells), column))
    sizes.sort(key=lambda size: size[1] - size[0])
    for number, (least, most, column) in enumerate(sizes):
        more = min(most - least, room // (len(sizes) - number))
        column.width = least + more
        room -= more
