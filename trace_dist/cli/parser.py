"""The parser of the whole program. Commands that work on a run share one YAML file and its overrides."""

from __future__ import annotations

import sys
from argparse import PARSER, Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    get_loader,
    set_loader,
    set_parsing_settings,
)

from trace_dist.cli import arguments as known
from trace_dist.cli.arguments import Argument, Command
from trace_dist.cli.config_file import check_config_file
from trace_dist.cli.errors import report_error
from trace_dist.cli.wording import reworded, within
from trace_dist.config import RunConfig
from trace_dist.config.examples import example_config
from trace_dist.config.moved import in_new_place
from trace_dist.config.renamed import explain
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.simulation.setup import SimulationSetup
from trace_dist.serving.options import Listening, Sampling, Source
from trace_dist.studies.one_model_plan import OneModelConfig
from trace_dist.studies.plan import StudyConfig
from trace_dist.utils.yaml import check_yaml

PROGRAM = "trace-dist"
_RUN_FIELDS = [field.name for field in fields(RunConfig)]
_SECTIONS = [field.name for field in fields(RunConfig) if is_dataclass(field.default_factory)]
FIRST = ("run", "init", "learn", "generate")
"""Commands whose examples stand in the overview."""
PURPOSE = "Continual fine-tuning of large language models: probe a proxy, project its masks, train them in the shards."


def _checked(load: Callable[[str], Any]) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        check_yaml(text)
        return load(text)

    return checked


set_loader("trace_dist", _checked(get_loader("yaml")), exceptions=(yaml.YAMLError,))


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
    """Help whose examples are not wrapped; the commands of a parser stand below their title alone."""

    def _format_action(self, action: Action) -> str:
        if action.nargs == PARSER:
            return self._join_parts(
                [self._format_action(each) for each in self._iter_indented_subactions(action)]
            )
        return str(super()._format_action(action))


class Parser(ArgumentParser):
    """An argument parser whose errors are one line on standard error.

    The entries of lists have parsers of their own, which name the entry.
    """

    _entry: Mapping[str, Any] | None = None

    def __init__(self, command: Command | None = None, **options: Any) -> None:
        if command is not None:
            example = f"example:\n  {PROGRAM} {command.example}"
            options |= {"description": _sentence(command.purpose), "epilog": example}
        defaults: dict[str, Any] = {"parser_mode": "trace_dist", "formatter_class": HelpFormatter}
        super().__init__(**defaults | options)

    def parse_object(self, obj: Any, *args: Any, **options: Any) -> Any:
        entry = vars(obj) if isinstance(obj, Namespace) else obj
        self._entry = (
            dict(entry) if isinstance(entry, Mapping) and not self.prog.startswith(PROGRAM) else None
        )
        return super().parse_object(obj, *args, **options)

    def parse_path(self, path: Any, *args: Any, **options: Any) -> Any:
        check_config_file(Path(str(path)))
        return super().parse_path(path, *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Parsers of nested values carry the name of the script instead.
        program = self.prog if self.prog.startswith(PROGRAM) else PROGRAM
        told = reworded if self._entry is None else partial(within, self._given(self._entry))
        said = told(explain(message), self._options_of)
        report_error(said if said.endswith("--help") else f"{said}; see {program} --help")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        # The standard library's passes every error by, also that of a full output.
        if message:
            with suppress(BrokenPipeError):
                (file or sys.stderr).write(message)

    def _given(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """What an entry says beside the defaults, with which the parser has filled it."""
        usual = {action.dest: action.default for action in self._actions}
        return {key: _plain(value) for key, value in entry.items() if value != usual.get(key)}

    def _options_of(self, command: str) -> list[str]:
        """Names of the options of a command below this parser, or of its own."""
        parser: ArgumentParser = self
        for name in command.split():
            below = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
            parser = next((each[name] for each in below if name in each), parser)
        return [
            word[2:] for word in parser._option_string_actions if word.startswith("--") and word[-1] != "+"
        ]


def _plain(value: Any) -> Any:
    """A section in a section as keys and values."""
    return vars(value.init_args) if isinstance(value, Namespace) and "init_args" in value else value


Fill = Callable[[Parser, Command], None]
"""Gives a command its arguments."""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def build_parser(words: Sequence[str] | None = None) -> Parser:
    """The parser of the whole program.

    Args:
        words: the command line; the arguments of commands that it does not name are left out, so that the parser is
            made at once. None makes all.
    """
    # They explain options, and reading them takes time.
    set_parsing_settings(docstring_parse_attribute_docstrings=words is None or _shows_help(words))
    shown = known.RUN_COMMANDS | known.FILE_COMMANDS
    examples = "\n".join(f"  {PROGRAM} {shown[name].example}" for name in FIRST)
    parser = Parser(prog=PROGRAM, description=PURPOSE, epilog=f"examples:\n{examples}", version=_version())
    commands = _add_subcommands(parser, "command")
    for name, command in shown.items():
        child = _subcommand(parser, commands, name, command)
        if words is None or name in words:
            FILL.get(name, _fill_run)(child, command)
    return parser


def _shows_help(words: Iterable[str]) -> bool:
    """Whether a command line asks for help, or for a configuration, which can have it as comments."""
    return any(word == "-h" or "help" in word or "--print_config" in word for word in words)


def parse(words: Sequence[str]) -> Any:
    """The arguments of a command line, its configuration's sections as dataclasses.

    Raises:
        ValueError: a value makes no sense.
        SystemExit: the command line is wrong, or asks for help.
    """
    words = [*_with_examples(_with_bank(split_launch(words)[0]))]
    parser = build_parser(words)
    try:
        parsed = parser.parse_args(words)
        values = parsed[parsed.command]
        for name in _SECTIONS if parsed.command in known.RUN_COMMANDS else ():
            if not isinstance(values[name], Namespace):
                parser.error(f"{name}: must be a section of keys and values, not {values[name]!r}")
        return parser.instantiate(parsed)
    except OverflowError as error:
        raise ValueError(f"{error}; give a smaller number") from None
    except UnicodeDecodeError:
        # A section may be a file of its own; the configuration itself was looked at.
        rule = "a file that is given for a section of the configuration is not written in UTF-8"
        raise ValueError(f"{rule}; give keys and values, as --target.path MODEL") from None


def split_launch(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """A command line, and the command that ``launch`` starts, which is cut off; nothing is cut off another command's."""
    if list(words[:1]) != ["launch"]:
        return words, []
    at = next((at for at, word in enumerate(words) if word in known.RUN_COMMANDS), len(words))
    return words[:at], words[at:]


def _with_bank(words: Sequence[str]) -> Iterator[str]:
    """``--bank DIR`` is short for the bank of a run that is filled (``--bank.path DIR``), or that ``eval`` retrieves from."""
    command = words[0] if words else ""
    name = "--bank_folder" if command == "eval" else "--bank.path"
    for word in words:
        if command in known.RUN_COMMANDS and (word == "--bank" or word.startswith("--bank=")):
            word = word.replace("--bank", name, 1)
        yield word


def _with_examples(words: Iterable[str]) -> Iterator[str]:
    """``--config example:NAME`` is a configuration that comes with the package."""
    before = ""
    for word in words:
        if before == "--config":
            yield example_config(word)
        elif word.startswith("--config="):
            yield f"--config={example_config(word.removeprefix('--config='))}"
        else:
            yield word
        before = word


def run_config(values: Any) -> RunConfig:
    """The run configuration out of parsed and instantiated arguments."""
    cfg = RunConfig(**{name: values[name] for name in _RUN_FIELDS})
    trusted = [each.path for each in (cfg.target, cfg.proxy) if each is not None and each.trust_remote_code]
    if cfg.target.trust_remote_code and cfg.proxy is not None and cfg.proxy.prune is not None:
        # Its code is a copy of the target's.
        trusted.append(cfg.proxy.path)
    if trusted:
        # Loads torch, which the command line can do without.
        from trace_dist.models.trust import trust

        for path in trusted:
            trust(path)
    sources = values.get("config") or []
    return in_new_place(cfg, Path(str(sources[-1]))) if sources else cfg


def _version() -> str:
    from importlib.metadata import version

    return version("trace-dist")


def _add_subcommands(parser: Parser, dest: str) -> Any:
    """Where the commands below a parser go. Their names stand in a list below, not in the line of usage as well."""
    parser.usage = f"%(prog)s {dest.upper()} [--key VALUE ...]"
    return parser.add_subcommands(
        dest=dest, title=f"{dest}s", description=f"{parser.prog} {dest.upper()} --help says more of each."
    )


def _subcommand(parent: Parser, siblings: Any, name: str, command: Command) -> Parser:
    """A parser of a command below another one; its arguments are added later."""
    child = Parser(command)
    siblings.add_subcommand(name, child, help=command.purpose)
    # It would be called `trace-dist [options] name`.
    child.prog = f"{parent.prog} {name}"
    return child


def _fill_run(parser: Parser, command: Command) -> None:
    # Every key is an option: too many for a line of usage.
    parser.usage = "%(prog)s --config FILE [--key VALUE ...]"
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="YAML file of the run, or example:NAME for one that comes with the package",
    )
    parser.add_class_arguments(RunConfig, nested_key=None, fail_untyped=True)
    _add(parser, command.own)


def _add(parser: Parser, own: dict[str, Argument]) -> None:
    for name, (kind, default, text) in own.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def _fill_actions(actions: Mapping[str, tuple[Command, known.Options]]) -> Fill:
    """What gives a command its actions and their arguments."""

    def fill(parser: Parser, _: Command) -> None:
        sub = _add_subcommands(parser, "action")
        for name, (command, arguments) in actions.items():
            _add_options(_subcommand(parser, sub, name, command), arguments)

    return fill


def _fill_init(parser: Parser, _: Command) -> None:
    _add_options(parser, known.INIT_ARGUMENTS)


def _fill_launch(parser: Parser, _: Command) -> None:
    parser.usage = "%(prog)s [--dry_run true] COMMAND [--key VALUE ...]"
    _add_options(parser, known.LAUNCH_ARGUMENTS)


def _add_options(parser: Parser, arguments: known.Options) -> None:
    for argument, options in arguments.items():
        typed: dict[str, Any] = {"type": str} | options
        if choices := typed.pop("choices", None):
            # With `choices` beside `type`, help would show the name of a function.
            typed["type"] = Literal[tuple(choices)]
        if typed.get("nargs") == "+" and argument.startswith("--"):
            # Of an option that is given again and again every value counts.
            typed["action"] = "extend"
        parser.add_argument(argument, **typed)


def _fill_memory(parser: Parser, _: Command) -> None:
    sub = _add_subcommands(parser, "action")
    _fill_run(_subcommand(parser, sub, "measure", known.MEASURE), known.MEASURE)
    for name, command in known.MEMORY_ACTIONS.items():
        child = _subcommand(parser, sub, name, command)
        child.usage = "%(prog)s --model MODEL [--key VALUE ...]"
        skip = set(known.NOT_ASKED[name])
        child.add_class_arguments(MemorySetup, nested_key=None, fail_untyped=True, skip=skip)
        _add(child, command.own)


def _fill_simulate(parser: Parser, command: Command) -> None:
    parser.usage = "%(prog)s --model MODEL [--key VALUE ...]"
    parser.add_class_arguments(SimulationSetup, nested_key=None, fail_untyped=True)
    _add(parser, command.own)


def _fill_bench(parser: Parser, _: Command) -> None:
    sub = _add_subcommands(parser, "action")
    for name, command in known.BENCHMARKS.items():
        _add(_subcommand(parser, sub, name, command), command.own)


def _fill_study(parser: Parser, _: Command) -> None:
    sub = _add_subcommands(parser, "action")
    for name, command in known.STUDIES.items():
        child = _subcommand(parser, sub, name, command)
        _fill_run(child, command)
        child.add_class_arguments(STUDY_SECTIONS[name], "study", fail_untyped=True)


def _fill_from_bank(own: type | None, arguments: known.Options, rest: str = "") -> Fill:
    """What gives a command a bank and its base, its own section and its own arguments; ``rest`` ends its usage."""

    def fill(parser: Parser, _: Command) -> None:
        parser.usage = f"%(prog)s --bank DIR --base MODEL [--key VALUE ...]{rest}"
        _add_options(parser, arguments)
        for section in (Source, own) if own else (Source,):
            parser.add_class_arguments(section, nested_key=None, fail_untyped=True)

    return fill


STUDY_SECTIONS: dict[str, type] = {"small-to-large": StudyConfig, "one-model": OneModelConfig}
"""What stands in the section ``study`` of each study's configuration."""
FILL: dict[str, Fill] = {
    "generate": _fill_from_bank(Sampling, known.ASKED),
    "serve": _fill_from_bank(Listening, {}),
    "lm-eval": _fill_from_bank(None, known.EVALUATED, " -- --tasks TASK ... [--key VALUE ...]"),
    "launch": _fill_launch,
    "init": _fill_init,
    "mask": _fill_actions(known.MASK_ACTIONS),
    "bank": _fill_actions(known.BANK_ACTIONS),
    "memory": _fill_memory,
    "simulate": _fill_simulate,
    "bench": _fill_bench,
    "study": _fill_study,
}
"""What the arguments of a command are; those of the others are a run's configuration."""
