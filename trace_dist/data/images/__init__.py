"""Sets of images that come with a package, named ``images:<name>`` where a task names a path.

[Note: a set of images] A file holds ``splits() -> {"train", "test"}``, datasets with the columns ``image`` and ``label``.
"""
