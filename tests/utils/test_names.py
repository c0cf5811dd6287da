from __future__ import annotations

import pytest

from trace_dist.utils.names import MAX_BYTES, check_names


def test_names_that_can_be_files_of_their_own() -> None:
    check_names(
        "tasks.name",
        ["copy", "a.b", "Zwei drei", "stra\u00dfe", "\u4efb\u52a1", "x" * MAX_BYTES],
        reserved=["base"],
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([""], "must not be empty"),
        ([" "], "must not be empty"),
        (["a/b"], "must not hold /"),
        (["..\\a"], "must not hold /"),
        ([".."], "must not begin with a dot"),
        ([".hidden"], "must not begin with a dot"),
        (["a "], "must not begin or end with a blank"),
        (["a\nb"], "control character"),
        (["a\0"], "control character"),
        (["\ud83d"], "half of a character"),
        (["\u4efb" * 34], "at most 100 bytes long, it has 102"),
        (["base"], "is reserved"),
        (["Base"], "is reserved"),
        (["copy", "Copy"], "names the same file as 'copy'"),
        (["caf\u00e9", "cafe\u0301"], "names the same file"),
        (["stra\u00dfe", "STRASSE"], "names the same file"),
    ],
)
def test_names_that_cannot(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"tasks\.name=.*{message}.*; rename it") as error:
        check_names("tasks.name", names, reserved=["base"])
    assert "\n" not in str(error.value)
