"""Arguments of every command. Commands that work on a run share one YAML file and its overrides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from trace_dist.cli.errors import report_error
from trace_dist.config import RunConfig
from trace_dist.profiling.memory_setup import MemorySetup

set_parsing_settings(docstring_parse_attribute_docstrings=True)

PROGRAM = "trace-dist"
RUN_COMMANDS = {
    "run": "everything: base models, probe, project, the continual modes, memory, report",
    "base": "make the base models that the config describes (tiny, GGUF, pruned)",
    "probe": "warm-start the proxy on every task; write saliency maps and masks of the proxy",
    "project": "project the proxy's masks onto the sharded target",
    "train": "train one task's mask on the sharded target and keep its delta",
    "continual": "run the sequence of tasks in the modes of the config",
    "eval": "score the target, as it is or with the bank's deltas",
    "report": "write results.json and report.html from what the other commands have left",
}

OWN_ARGUMENTS = {
    "base": {"which": "target or proxy; both when not given"},
    "train": {
        "task_name": "name of the task to train; the first one when not given",
        "mask_file": "mask file; the run's projected mask when not given",
    },
    "report": {"picture": "PNG file with the key panels to write as well"},
    "eval": {"bank_folder": "folder of a bank to retrieve deltas from; the plain target when not given"},
}
"""Arguments of a command beside the run's configuration."""


class Parser(ArgumentParser):
    """An argument parser whose errors are one line on standard error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Parsers of nested values carry the name of the script instead.
        program = self.prog.replace("[options] ", "") if self.prog.startswith(PROGRAM) else PROGRAM
        report_error(f"{message}; see {program} --help")
        raise SystemExit(2)


def _run_parser(description: str) -> Parser:
    parser = Parser(description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of the run")
    parser.add_class_arguments(RunConfig, nested_key=None, fail_untyped=True)
    return parser


def _fill_mask(parser: Parser) -> None:
    sub: Any = parser.add_subcommands(dest="action")
    show = Parser(description="granularity, density and origin of a mask; density per tensor")
    show.add_argument("file", type=str, help="mask file")
    sub.add_subcommand("show", show, help="what a mask holds")
    combine = Parser(description="union, intersection or difference of two masks of one model")
    combine.add_argument("operation", choices=["union", "intersection", "difference"])
    combine.add_argument("left", type=str, help="mask file")
    combine.add_argument("right", type=str, help="mask file")
    combine.add_argument("--out", type=str, required=True, help="mask file to write")
    sub.add_subcommand("combine", combine, help="set operations")


BANK_ACTIONS: dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]]]] = {
    "show": ("list what a bank holds: tasks, delta sizes, clusters", {}),
    "verify": ("read every file of a bank and say what is not as it was written", {}),
    "add": (
        "add a task that lies in a folder, as tasks/<name> of another bank",
        {"source": ("folder with delta.safetensors and signature.safetensors", {})},
    ),
    "remove": ("take a task out of a bank and delete its files", {"task": ("name of the task", {})}),
    "rename": (
        "give a task another name",
        {"task": ("name of the task", {}), "name": ("its new name", {})},
    ),
    "merge": (
        "make a new bank of two banks of one base model",
        {
            "other": ("folder of the other bank", {}),
            "--out": ("folder of the new bank", {"required": True}),
        },
    ),
    "export": (
        "write base + delta for another tool, as an ordinary Hugging Face checkpoint for example",
        {
            "--base": ("the base model: folder or hub id", {"required": True}),
            "--task": (
                "task whose delta is applied; the changes of several add up",
                {"required": True, "nargs": "+"},
            ),
            "--out": ("folder to write", {"required": True}),
            "--dtype": ("of the weights", {"default": "float32", "choices": ["float32", "bfloat16"]}),
            "--exporter": ("hf, or the path of a module of your own", {"default": "hf"}),
        },
    ),
}


def _fill_bank(parser: Parser) -> None:
    sub: Any = parser.add_subcommands(dest="action")
    for name, (description, arguments) in BANK_ACTIONS.items():
        child = Parser(description=description)
        child.add_argument("folder", type=str, help="folder of the bank")
        for argument, (text, options) in arguments.items():
            child.add_argument(argument, type=str, help=text, **options)
        sub.add_subcommand(name, child, help=description)


@dataclass(frozen=True)
class MemoryAction:
    """An action of ``memory`` that takes a setup: its own arguments, and those of a setup that it has no use for."""

    description: str
    own: dict[str, tuple[Any, Any, str]]
    skipped: frozenset[str] = frozenset()


MEMORY_ARGUMENTS = {
    "estimate": MemoryAction("predict the memory of masked training from a model's config alone", {}),
    "profile": MemoryAction(
        "train random weights on the ranks it is started on; memory beside its prediction",
        {
            "steps": (int, 4, "optimizer steps"),
            "plot": (str | None, None, "PNG file with memory over time to write"),
        },
        frozenset({"world_size", "device"}),
    ),
    "plan": MemoryAction(
        "list the ways of training that fit into given GPUs",
        {
            "gpu_gib": (float, 24.0, "memory of one GPU, in GiB"),
            "gpus": (int, 1, "number of GPUs"),
            "reserve_gib": (float, 1.0, "of that, for the CUDA context, communication and fragmentation"),
        },
        frozenset(
            {
                *("density", "state_dtype", "master", "offload", "micro_batch_size"),
                *("activation_checkpointing", "world_size", "device"),
            }
        ),
    ),
}


def _fill_memory(parser: Parser) -> None:
    sub: Any = parser.add_subcommands(dest="action")
    description = "measure the model states of masked and of full training, in bytes per parameter"
    sub.add_subcommand("measure", _run_parser(description), help=description)
    for name, action in MEMORY_ARGUMENTS.items():
        child = Parser(description=action.description)
        child.add_class_arguments(MemorySetup, nested_key=None, fail_untyped=True, skip=set(action.skipped))
        for argument, (kind, default, text) in action.own.items():
            child.add_argument(f"--{argument}", type=kind, default=default, help=text)
        child.add_argument("--out", type=str | None, default=None, help="JSON file to write")
        sub.add_subcommand(name, child, help=action.description)


BENCHMARKS: dict[str, tuple[str, dict[str, tuple[Any, Any, str]]]] = {
    "kernels": ("time every kernel on this machine's GPU, or CPU beside torch's fused AdamW", {}),
    "optimizer": (
        "time the optimizer step beside DeepSpeedCPUAdam and torch's fused AdamW over all parameters",
        {
            "density": (float, 0.05, "masked share"),
            "rounds": (int, 15, "steps of each; the median counts"),
        },
    ),
    "step": (
        "time whole training steps under ZeRO-3 beside full fine-tuning, LoRA and SHiRA; count what they send",
        {
            "shape": (
                str,
                "SmolLM2-135M",
                "of the model, whose weights are random; or tiny, to see that all runs",
            ),
            "contestants": (
                list[str] | None,
                None,
                "who takes part, as [row, full, LoRA]; all when not given",
            ),
            "density": (float, 0.05, "masked share of the linear layers"),
            "micro_batch": (int, 4, "examples per rank and step"),
            "sequence": (int, 128, "tokens per example"),
            "attention": (str, "auto", "of all contestants: eager, sdpa (fused), or auto, what is faster"),
            "ranks": (int, 2, "ranks of each contestant, one thread each"),
            "rounds": (int, 3, "how often each contestant is started"),
            "steps": (int, 5, "steps timed per start"),
        },
    ),
    "memory": ("compare predicted with measured memory on three models and one and two ranks", {}),
}


def _fill_bench(parser: Parser) -> None:
    sub: Any = parser.add_subcommands(dest="action")
    for name, (description, arguments) in BENCHMARKS.items():
        child = Parser(description=description)
        for argument, (kind, default, text) in arguments.items():
            child.add_argument(f"--{argument}", type=kind, default=default, help=text)
        child.add_argument("--out", type=str | None, default=None, help="JSON file to write")
        sub.add_subcommand(name, child, help=description)


FILE_COMMANDS = {
    "mask": ("look at mask files and combine them", _fill_mask),
    "bank": ("look into a delta bank, keep it in order, and export from it", _fill_bank),
    "memory": ("predict, measure and plan the memory of training", _fill_memory),
    "bench": ("measure kernels, optimizer, training step and memory beside their peers", _fill_bench),
}


def build_parser() -> Parser:
    """The parser of the whole program."""
    parser = Parser(prog=PROGRAM, description=__doc__, version=_version())
    commands: Any = parser.add_subcommands(dest="command")
    for name, description in RUN_COMMANDS.items():
        sub = _run_parser(description)
        for argument, text in OWN_ARGUMENTS.get(name, {}).items():
            sub.add_argument(f"--{argument}", type=str | None, default=None, help=text)
        commands.add_subcommand(name, sub, help=description)
    for name, (description, fill) in FILE_COMMANDS.items():
        sub = Parser(description=description)
        commands.add_subcommand(name, sub, help=description)
        fill(sub)
    return parser


def _version() -> str:
    from importlib.metadata import version

    return version("trace-dist")


def run_config(values: Any) -> RunConfig:
    """The run configuration out of parsed and instantiated arguments."""
    return RunConfig(**{name: values[name] for name in RunConfig.__dataclass_fields__})
