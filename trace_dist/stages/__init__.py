"""What each command does: one file per stage, with what it needs, what it leaves, and how it runs."""
