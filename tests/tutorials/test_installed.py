"""What a newcomer does: install the package from its wheel, then follow the first three tutorials in an empty folder.

The wheel is built from a copy of the checkout and installed into an environment of its own. That sees the packages that the
tests have, but not the checkout: their editable install is a hook that only their own environment runs.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import site
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from cli.program import environment
from launching import free_port
from tutorials.pages import NAMED_MODEL, ROOT, blocks, commands, words

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE

pytestmark = pytest.mark.launcher

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "trace_dist", "kernels", "configs")
FOLLOWED = ("your-own-model", "second-task", "serve-it")
MODEL = "runs/words/models/target"
"""Takes the place of the model that the pages name; the example's run makes it."""
FEWER = ["--probe.steps", "2", "--probe.fisher_batches", "1", "--projection.options", "{steps: 2}"]
FEWER += ["--bank.num_prompts", "40"]
SMALL = {
    "example:words": [
        *("--target.tiny.steps", "2", "--proxy.tiny.steps", "2", "--train.steps", "2"),
        *FEWER,
    ],
    "mine.yaml": FEWER,
    "prices.yaml": FEWER,
}
"""What the tests add to commands with these configurations, so that they take seconds."""
FEW_STEPS = "from pathlib import Path; p = Path('mine.yaml'); p.write_text(p.read_text().replace('steps: 50', 'steps: 2'))"
"""What the tests do to the configuration that ``init`` has written, for the same end."""


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and a folder to work in."""

    wheel: Path
    bin: Path
    work: Path

    @property
    def environment(self) -> dict[str, str]:
        """As a newcomer's; also tokenised data and generated files stay in the folder."""
        return environment(self.work / "cache")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    source, work = folder / "source", folder / "work"
    source.mkdir()
    work.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    build = [*pip, "wheel", *quiet, "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    clean: dict[str, Any] = {"cwd": work, "env": environment(work)}
    subprocess.run(build, check=True, **clean)
    (wheel,) = folder.glob("*.whl")
    home = folder / "environment"
    venv.create(home)
    # Paths in such a file are searched, but the .pth files that lie there, the editable install's among them, do nothing.
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    alone = subprocess.run([home / "bin/python", "-c", "import trace_dist"], capture_output=True, **clean)
    assert b"ModuleNotFoundError" in alone.stderr
    python = str(home / "bin" / "python")
    subprocess.run([*pip, "--python", python, "install", *quiet, str(wheel)], check=True, **clean)
    return Installed(wheel, home / "bin", work)


def test_the_wheel_holds_every_file_of_the_packages(installed: Installed) -> None:
    """Kernels and their C++, templates and styles of the report, examples, py.typed; and nothing else."""
    roots = [ROOT / "trace_dist", ROOT / "kernels" / "trace_kernels"]
    wanted = {
        path.relative_to(root.parent).as_posix(): path.read_bytes()
        for root in roots
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    archive = zipfile.ZipFile(installed.wheel)
    names = archive.namelist()
    packed = {name: archive.read(name) for name in names if ".dist-info/" not in name}
    assert packed.keys() == wanted.keys()
    assert packed == wanted
    for name in ("trace_dist/py.typed", "trace_kernels/py.typed", "trace_kernels/cpu_kernels.cpp"):
        assert name in wanted
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_metadata_are_those_of_the_project(installed: Installed) -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name,) = [n for n in zipfile.ZipFile(installed.wheel).namelist() if n.endswith("/METADATA")]
    text = zipfile.ZipFile(installed.wheel).read(name).decode()
    for line in (
        f"Version: {project['version']}",
        "License-Expression: Apache-2.0",
        f"Requires-Python: {project['requires-python']}",
        "Description-Content-Type: text/markdown",
        *(f"Project-URL: {label}, {url}" for label, url in project["urls"].items()),
        *(f"Provides-Extra: {extra}" for extra in project["optional-dependencies"]),
    ):
        assert line in text.splitlines(), line
    said = subprocess.run(
        [installed.bin / "trace-dist", "--version"],
        capture_output=True,
        text=True,
        cwd=installed.work,
        env=installed.environment,
    )
    assert said.stdout.strip() == f"trace-dist {project['version']}"


def steps(page: str) -> Iterator[str | list[str]]:
    """What a page says, in order: Python, and the words of its commands with what makes them small."""
    for block in blocks(page):
        if block.language == "python":
            yield block.text
        for command in commands(block, {"MODEL": MODEL}) if block.language == "bash" else ():
            if found := words(command):
                yield [
                    *found,
                    *next((SMALL[name] for name in found if name in SMALL and found[0] != "init"), []),
                ]


@pytest.fixture(scope="module")
def followed(installed: Installed) -> dict[str, Any]:
    """What the commands of the first two pages have printed, and where the package was imported from."""
    (configuration,) = [text for language, text in blocks("second-task") if language == "yaml"]
    small = configuration.replace(NAMED_MODEL, MODEL).replace("steps: 50", "steps: 2")
    (installed.work / "prices.yaml").write_text(small)
    todo = [step for page in FOLLOWED[:2] for step in steps(page)]
    todo.insert(1 + next(at for at, step in enumerate(todo) if step[0] == "init"), FEW_STEPS)
    (installed.work / "steps.json").write_text(json.dumps(todo))
    script = Path(__file__).with_name("follow.py")
    done = subprocess.run(
        [installed.bin / "python", "-P", script, "steps.json", "said.json"],
        cwd=installed.work,
        env=installed.environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found: dict[str, Any] = json.loads((installed.work / "said.json").read_text())
    names = [step if isinstance(step, str) else " ".join(step) for step in todo]
    found["said"] = list(zip(names, found["said"], strict=True))  # some commands are given twice
    return found


def said(followed: dict[str, Any], start: str, number: int = 0) -> str:
    """What the command that begins so has printed."""
    return str([text for command, text in followed["said"] if command.startswith(start)][number])


def test_the_example_runs_from_the_installed_package(followed: dict[str, Any], installed: Installed) -> None:
    packages = installed.bin.parent / "lib"
    assert all(Path(home).is_relative_to(packages) for home in followed["homes"])
    shown = said(followed, "run --config example:words")
    assert "report: runs/words/report.html" in shown
    assert (installed.work / "runs/words/report.html").stat().st_size > 0
    assert DeltaBank(installed.work / "runs/words/bank").tasks == [BASE, "vowels", "backwards"]


def test_your_own_model(followed: dict[str, Any], installed: Installed) -> None:
    mine = installed.work / "runs" / "mine"
    assert "time: about" in said(followed, "init")
    written = (installed.work / "mine.yaml").read_text()
    assert "metric: choice" in written
    assert written.count("steps: 2") == 2
    assert (mine / "report.html").stat().st_size > 0
    results = json.loads((mine / "results.json").read_text())
    assert list(results["modes"]) == ["retrieved"]
    answers = said(followed, "generate --bank runs/mine/bank")
    assert "dates" in answers
    assert "tickets" in answers


def test_a_second_task(followed: dict[str, Any], installed: Installed) -> None:
    bank = DeltaBank(installed.work / "runs/mine/bank")
    assert bank.tasks == ["tickets", "dates", "prices"]
    assert "time: about" in said(followed, "learn")
    assert "prices" in said(followed, "bank show", 1)
    assert "prices" in said(followed, "generate --bank runs/mine/bank", 1)
    assert (installed.work / "runs/prices/model.safetensors").is_file()


@pytest.mark.usefixtures("followed")
def test_serve_it(installed: Installed, capsys: pytest.CaptureFixture[str]) -> None:
    """The page's server, as the installed program, asked by the page's own curl and Python."""
    page, port = blocks("serve-it"), str(free_port())
    lines = [
        line.replace("8000", port)
        for block in page
        if block.language == "bash"
        for line in commands(block, {"MODEL": MODEL})
    ]
    install, serve, *asked = lines
    assert install == 'pip install "trace-dist[serve]"'
    assert "serve" in (distribution("trace-dist").metadata.get_all("Provides-Extra") or [])
    log = installed.work / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [installed.bin / "trace-dist", *words(serve)],
            stderr=file,
            cwd=installed.work,
            env=installed.environment,
        )
    try:
        wait_for(log, rf"on http://127.0.0.1:{port}/v1", server)
        models, chat, health, metrics = (
            subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout
            for line in asked
        )
        names = [each["id"] for each in json.loads(models)["data"]]
        assert {"auto", BASE, "tickets", "dates", "prices"} == set(names)
        assert json.loads(chat)["choices"][0]["trace_dist"]["task"] == "dates"
        assert json.loads(health)["status"] == "ok"
        assert "trace_dist" in metrics
        (code,) = [text for language, text in page if language == "python"]
        exec(compile(code.replace("8000", port), "serve-it.md", "exec"), {})
        tasks = [line.split()[-2] for line in capsys.readouterr().out.splitlines()]
        assert tasks == ["prices", "tickets"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    """Until a log says so; fails where its process ends before."""
    while True:
        ended = process.poll() is not None
        if re.search(text, log.read_text()):
            return
        assert not ended, log.read_text()
        time.sleep(0.1)
