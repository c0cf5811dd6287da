"""The program as a whole: quick to answer, help with examples that work, quiet when nobody reads on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from bank.samples import drawn
from cli.program import environment

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.cli import arguments as known
from trace_dist.cli.main import main
from trace_dist.cli.parser import FIRST, parse

ROOT = Path(__file__).parents[2]
ACTIONS = {
    **{("mask", name): command for name, (command, _) in known.MASK_ACTIONS.items()},
    **{("bank", name): command for name, (command, _) in known.BANK_ACTIONS.items()},
    **{("memory", name): command for name, command in known.MEMORY_ACTIONS.items()},
    ("memory", "measure"): known.MEASURE,
    **{("bench", name): command for name, command in known.BENCHMARKS.items()},
    **{("study", name): command for name, command in known.STUDIES.items()},
}
COMMANDS = {
    (name,): command for name, command in (known.RUN_COMMANDS | known.FILE_COMMANDS).items()
} | ACTIONS


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def with_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that has the configurations of the examples."""
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "task.yaml").symlink_to(ROOT / "configs/quickstart.yaml")
    monkeypatch.chdir(folder)


def test_the_overview_names_every_command_and_what_it_is_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_files(tmp_path, monkeypatch)
    shown = helped(capsys)
    text = " ".join(shown.split())
    for name, command in (known.RUN_COMMANDS | known.FILE_COMMANDS).items():
        assert f" {name} {command.purpose}" in text
    # Names stand in the list alone, which begins with the first of them.
    assert shown.splitlines()[0] == "usage: trace-dist COMMAND [--key VALUE ...]"
    assert re.search(r"^commands:\n  .*\n\n    run  ", shown, re.MULTILINE)
    examples = re.findall(r"^  trace-dist (\w+ --.*)$", shown.split("examples:\n")[1], re.MULTILINE)
    assert [parse(shlex.split(example)).command for example in examples] == list(FIRST)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_says_what_for_and_gives_an_example(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    text, command = helped(capsys, *words), COMMANDS[words]
    assert command.purpose[1:] in " ".join(text.split())
    # No name of an object of Python's.
    assert not re.search(r"<(function|class|locals)|0x[0-9a-f]{6}|lambda", text)
    assert text.rstrip().endswith(f"example:\n  trace-dist {command.example}")
    assert command.example.split()[: len(words)] == list(words) or words[0] in (
        "memory",
        "bench",
        "study",
        "mask",
        "bank",
    )


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_what_for_stands_at_the_top(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Not below a usage of a hundred options."""
    command = COMMANDS[words]
    top = " ".join(" ".join(helped(capsys, *words).splitlines()[:14]).split())
    assert command.purpose[1:] in top


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_examples_are_command_lines_that_the_program_takes(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_files(tmp_path, monkeypatch)
    parsed = parse(COMMANDS[words].example.split())
    assert parsed.command == words[0]


def test_of_an_option_that_is_given_again_every_value_counts() -> None:
    models = ["--base", "model", "--out", "folder"]
    exported = parse(["bank", "export", "bank", *models, "--task", "one", "two", "--task=three"]).bank.export
    assert (exported.task, exported.delta) == (["one", "two", "three"], [])
    begun = parse(["init", "--model", "model", "--data", "a.csv", "--data", "b.csv"]).init
    assert begun.data == ["a.csv", "b.csv"]
    source = ["generate", "--bank", "bank", "--base", "model"]
    assert parse([*source, "--prompt", "a", "--prompt", "b"]).generate.prompt == ["a", "b"]
    assert parse(source).generate.prompt == []


def test_help_loads_no_torch() -> None:
    """So that it answers within a second."""
    script = (
        "import sys; from trace_dist.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    script += "slow = {'torch', 'transformers', 'datasets', 'deepspeed', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    script += "print('slow:', *sorted(slow))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1].split() == ["slow:"], done.stderr


def test_a_command_loads_what_it_needs() -> None:
    """A bank or a mask needs no data and no architectures; a run's start needs no adapters and no compiler."""
    script = """
import sys
from trace_dist.cli import bank_commands, mask_commands
print('slow:', *sorted({'datasets', 'transformers.modeling_utils', 'torch._dynamo'} & set(sys.modules)))
from trace_dist.cli.parser import parse, run_config
from trace_dist.stages.start import check_parts
check_parts(run_config(parse(['run', '--config', sys.argv[1]])['run']))
print('slow:', *sorted({'peft', 'bitsandbytes', 'deepspeed', 'torch._inductor.compile_fx'} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script, str(ROOT / "configs/quickstart.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == ["slow:", "slow:"], done.stderr


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("bank", "show", "BANK")], ids=str)
def test_whoever_reads_only_the_beginning_breaks_no_pipe(words: tuple[str, ...], tmp_path: Path) -> None:
    """As `| head` does; here nobody reads at all."""
    if "BANK" in words:
        bank = DeltaBank.create(tmp_path / "bank", "aaaa", layer=1)
        bank.add(drawn(BASE, 0), None)
        words = ("bank", "show", str(tmp_path / "bank"))
    process = subprocess.Popen(
        [sys.executable, "-m", "trace_dist", *words],
        env=environment(tmp_path / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=100)
    assert said == ""
    # argparse prints help and minds no pipe.
    assert process.returncode == (0 if "--help" in words else 128 + signal.SIGPIPE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learn", "--config", "task.yaml"], "interrupted; start the same command again to go on"),
        (["bank", "verify", "bank"], "interrupted"),
    ],
)
def test_ctrl_c_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It was a traceback, most of it of what was at work by chance."""
    with patch("trace_dist.cli.main._run", side_effect=KeyboardInterrupt):
        assert main(words) == 130
    assert capsys.readouterr().err == f"{said}\n"


def test_ctrl_c_ends_the_ranks_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What its launchers say is dropped."""
    path = tmp_path / "config.yaml"
    path.write_text("target: {path: m}\ntasks: [{name: a, path: a.jsonl}]\nrun_dir: r\n")
    with (
        patch.dict(os.environ),
        patch("trace_dist.cli.launch_command.supervise", return_value=128 + signal.SIGINT),
    ):
        assert main(["launch", "train", "--config", str(path)]) == 130
    assert capsys.readouterr().err == "interrupted; start the same command again to go on\n"


def test_ctrl_c_ends_the_process_by_the_signal() -> None:
    """A shell goes on with the next round of its loop otherwise."""
    script = (
        "import atexit, sys; from unittest.mock import patch; from trace_dist.cli.main import main\n"
        "atexit.register(print, 'tidied', flush=True); sys.argv[1:] = ['bank', 'verify', 'bank']\n"
        "with patch('trace_dist.cli.main._run', side_effect=KeyboardInterrupt): main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "tidied\n", "interrupted\n")


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_the_program_is_read(ignored: bool) -> None:
    """It ends without a traceback; started by nohup, it goes on."""
    script = (
        "import os, runpy, signal, sys\n"
        f"if {ignored}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "class Pressed:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'trace_dist.cli.parser': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Pressed); sys.argv[1:] = ['--version']\n"
        "runpy.run_module('trace_dist', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0 if ignored else -signal.SIGINT, "")
    assert ("trace-dist" in done.stdout) == ignored


def test_an_output_without_the_characters_ends_no_command() -> None:
    """The table of a run that was done ended it with an error: ASCII has no dash."""
    script = (
        "from unittest.mock import patch; from trace_dist.cli.main import main\n"
        "with patch('trace_dist.cli.main._run', side_effect=lambda _: print('2\\u20133') or 0):\n"
        "    raise SystemExit(main(['report']))\n"
    )
    ascii_alone = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=ascii_alone, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"2\\u20133\n"), done.stderr
