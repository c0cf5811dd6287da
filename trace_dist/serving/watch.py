"""A bank that others change while it is served."""

from __future__ import annotations

from trace_dist.bank.bank import DeltaBank
from trace_dist.utils.together import on_main


class Watched:
    """A bank, and whether its index has been replaced since it was read; to look costs one call of the file system.

    Args:
        bank: read already.
    """

    def __init__(self, bank: DeltaBank) -> None:
        self.bank = bank
        # None, since it may have been replaced while the base was loaded: it is read anew the first time.
        self._seen: tuple[int, int, int] | None = None

    def refresh(self) -> bool:
        """See the bank as it is now; whether anything was changed. Collective.

        Raises:
            ValueError: the index cannot be read; what was seen before is still there.
        """
        # Looked at first: what is changed while the index is read is seen the next time.
        state = on_main(self._state)
        if state == self._seen:
            return False
        before = self.bank.index
        self.bank.reload()
        self._seen = state
        return self.bank.index != before

    def _state(self) -> tuple[int, int, int]:
        """Is another one whenever the index is replaced."""
        path = self.bank.files.index
        try:
            status = path.stat()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); restore it") from None
        return status.st_ino, status.st_mtime_ns, status.st_size
