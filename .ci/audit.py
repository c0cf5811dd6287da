"""What the environment is made of: known vulnerabilities, licences, and a CycloneDX list of all packages.

    python .ci/audit.py build/audit [--ignore-vuln ID ...]

Ends with 1 where a package has a known vulnerability, or a licence that does not go with Apache-2.0. Where the package index does
not answer, or knows nothing of a version, that is said, and the rest is done.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

OWN = "trace-dist"
REFUSED = re.compile(r"\b(AGPL|GPL|SSPL|Affero|GNU General Public)", re.IGNORECASE)
"""Of a licence that must not be among those of what the package needs; the LGPL's are not, nor a choice that leaves another."""
SHOWN = 8


def main(out: Path, options: list[str]) -> int:
    """Write the three files and say what they hold; the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    found = [vulnerabilities(out, options), licences(out)]
    listed(out)
    for text, _ in found:
        print(text)
    print(f"all files are in {out}")
    return int(any(failed for _, failed in found))


def vulnerabilities(out: Path, options: list[str]) -> tuple[str, bool]:
    """What pip-audit finds of the installed versions, without local parts such as ``+cpu``, which no index has."""
    versions = {dist.name: dist.version.partition("+")[0] for dist in distributions() if dist.name != OWN}
    wanted, report = out / "versions.txt", out / "vulnerabilities.json"
    wanted.write_text("".join(f"{name}=={version}\n" for name, version in sorted(versions.items())))
    report.unlink(missing_ok=True)
    done = tool(
        "pip_audit", "-r", wanted, "--no-deps", "--disable-pip", "--progress-spinner", "off",
        "-f", "json", "-o", report, *options,
    )  # fmt: skip
    if not report.is_file():
        return f"vulnerabilities: NOT looked up, pip-audit could not: {last_line(done.stderr)}", False
    return judge_vulnerabilities(json.loads(report.read_text()))


def judge_vulnerabilities(report: dict[str, Any]) -> tuple[str, bool]:
    """What to say of pip-audit's report, and whether something was found."""
    packages = report["dependencies"]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"{package['name']} {package['version']}: {each['id']}, mended in {', '.join(each['fix_versions']) or 'no version'}"
        for package in packages
        for each in package.get("vulns", ())
    ]
    text = (
        f"vulnerabilities: {len(found)} known in {len(packages) - len(unknown)} of {len(packages)} packages"
    )
    if unknown:
        text += f"; NOT looked up, as the index does not know these versions: {some(unknown)}"
    return "\n  ".join([text, *found]), bool(found)


def licences(out: Path) -> tuple[str, bool]:
    """What pip-licenses lists, and whether something of it must not be there."""
    done = tool("piplicenses", "--from", "mixed", "--format", "json", "--with-urls", "--ignore-packages", OWN)
    done.check_returncode()
    (out / "licences.json").write_text(done.stdout)
    return judge_licences(json.loads(done.stdout))


def judge_licences(packages: list[dict[str, str]]) -> tuple[str, bool]:
    """What to say of pip-licenses' list, and whether something of it must not be there."""
    unknown = [package["Name"] for package in packages if package["License"].upper() == "UNKNOWN"]
    refused = [
        f"{package['Name']}: {package['License']}" for package in packages if is_refused(package["License"])
    ]
    text = f"licences: of {len(packages)} packages, {len(refused)} do not go with Apache-2.0"
    if unknown:
        text += f"; look at these yourself, they name none: {some(unknown)}"
    return "\n  ".join([text, *refused]), bool(refused)


def is_refused(licence: str) -> bool:
    """Whether each way of taking a package is refused: ``A OR B`` and ``A; B`` leave a choice."""
    ways = re.split(r"\bOR\b|;", licence.replace("LGPL", "Lesser"))
    return all(REFUSED.search(way) and "Lesser" not in way for way in ways)


def listed(out: Path) -> None:
    """The CycloneDX list of all packages."""
    done = tool(
        "cyclonedx_py", "environment", "--pyproject", "pyproject.toml", "--of", "JSON", "-o", out / "cyclonedx.json",
        sys.executable,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"cyclonedx-py: {last_line(done.stderr)}")


def tool(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


def some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
