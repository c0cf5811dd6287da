"""Exit codes of commands, as schedulers understand them."""

FAILED = 2
"""An error of the user's: the same command fails again."""
LOST = 75
"""The same command, started again, goes on: a rank was lost, or it was asked to stop. EX_TEMPFAIL of sysexits.h."""
