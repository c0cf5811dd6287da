"""What ``make audit`` says of its tools' reports, and when it fails. The tools need the index, so they do not run here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit.py"


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_known_vulnerability_fails(audit: ModuleType) -> None:
    vuln = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": [], "description": "d"}
    report = {
        "dependencies": [
            {"name": "a", "version": "1.0", "vulns": [vuln]},
            {"name": "b", "version": "1.0", "vulns": []},
            {"name": "c", "skip_reason": "Dependency not found"},
        ]
    }
    text, failed = audit.judge_vulnerabilities(report)
    assert failed
    assert text.splitlines() == [
        "vulnerabilities: 1 known in 2 of 3 packages; NOT looked up, as the index does not know these versions: c",
        "  a 1.0: PYSEC-1, mended in 2.0",
    ]


def test_an_index_that_knows_nothing_is_said(audit: ModuleType) -> None:
    report = {"dependencies": [{"name": f"p{n}", "skip_reason": "x"} for n in range(10)]}
    text, failed = audit.judge_vulnerabilities(report)
    assert not failed
    assert text.startswith("vulnerabilities: 0 known in 0 of 10 packages; NOT looked up")
    assert text.endswith("p7 and 2 more")


def test_an_index_that_does_not_answer_is_said(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where pip-audit is not installed: it leaves no report."""
    monkeypatch.setattr(audit.sys, "executable", "/bin/false")
    text, failed = audit.vulnerabilities(tmp_path, [])
    assert not failed
    assert text.startswith("vulnerabilities: NOT looked up, pip-audit could not: ")
    assert (tmp_path / "versions.txt").read_text().count("==") > 20


@pytest.mark.parametrize(
    ("licence", "refused"),
    [
        ("MIT License", False),
        ("Apache-2.0 AND MIT", False),
        ("GNU Lesser General Public License v2 or later (LGPLv2+)", False),
        ("GPL-3.0-only OR Apache-2.0", False),
        ("GPLv2; MIT License", False),
        ("GNU General Public License v3 (GPLv3)", True),
        ("AGPL-3.0-or-later", True),
        ("MIT AND GPL-2.0-only", True),
    ],
)
def test_licences(audit: ModuleType, licence: str, refused: bool) -> None:
    text, failed = audit.judge_licences(
        [{"Name": "a", "License": licence}, {"Name": "b", "License": "UNKNOWN"}]
    )
    assert failed is refused
    assert ("a: " in text) is refused
    assert "they name none: b" in text
