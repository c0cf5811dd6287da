"""What a task may be called."""

from __future__ import annotations

import pytest

from trace_dist.utils.names import check_distinct, check_new_name, check_task_name


@pytest.mark.parametrize("name", ["copy", "a b: ü", "database", "base2", "-x", "x.y", "a" * 150, "数学"])
def test_names(name: str) -> None:
    check_task_name(name)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *((name, "non-empty text") for name in ("", None, 3, ["a"])),
        *((name, "must not hold '/'") for name in ("a/b", "/a", "..", "../x", "a\\b", ".hidden", " a", "a ")),
        *((name, "control characters") for name in ("a\nb", "a\0", "\u202e", "\ud800")),
        *((name, "at most 150 bytes") for name in ("a" * 151, "ü" * 76)),
        *((name, "reserved") for name in ("base", "Base", "BASE", "\uff42ase")),
    ],
)
def test_refusals(name: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as caught:
        check_task_name(name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("tasks.name=")


def test_a_name_that_asks_for_whatever_is_retrieved() -> None:
    """Banks of earlier releases may hold it."""
    check_task_name("auto")
    check_new_name("Auto")
    for name, rule in (("auto", "stands for the task that each prompt retrieves"), ("base", "reserved")):
        with pytest.raises(ValueError, match=rf"^task='{name}': .*{rule}.*; rename the task$"):
            check_new_name(name, "task")


def test_names_that_some_file_systems_do_not_tell_apart() -> None:
    check_distinct(["copy", "copy2", "cafe", "caf\u00e9"])
    for one, other in (("copy", "Copy"), ("caf\u00e9", "cafe\u0301"), ("stra\u00dfe", "STRASSE"), ("a", "a")):
        with pytest.raises(ValueError, match=f"tasks.name='{other}': .* from '{one}'; rename one"):
            check_distinct([one, "else", other])
