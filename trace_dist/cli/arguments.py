"""The commands: what each is for, an example, and its own arguments beside a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Argument = tuple[Any, Any, str]
"""Type, default and help of an argument."""
OUT: Argument = (str | None, None, "JSON file to write; printed when not given")
OUT_ALSO: Argument = (str | None, None, "JSON file to write beside the tables that are printed")


@dataclass(frozen=True)
class Command:
    """A command, or an action of one.

    Attributes:
        purpose: what it is for, one sentence.
        example: as a user types it, after ``trace-dist``.
        own: its arguments beside those of the configuration or of a memory setup.
    """

    purpose: str
    example: str
    own: dict[str, Argument] = field(default_factory=dict)


def _text(help_text: str) -> Argument:
    return str | None, None, help_text


DRY_RUN: Argument = (bool, False, "say what would be trained, how long and in how much memory, and stop")
CONFIG = "--config configs/quickstart.yaml"
RUN_COMMANDS = {
    "run": Command(
        "everything, from the base models to the report; a run that was cut continues where it stopped",
        f"run {CONFIG}",
        {"dry_run": DRY_RUN},
    ),
    "learn": Command(
        "learn new tasks into a bank that outlives its runs; the configuration names models and the new tasks alone",
        "learn --config task.yaml --bank runs/quickstart/bank",
        {
            "mask_file": _text(
                "mask of the target for the one new task; probed and projected when not given"
            ),
            "dry_run": DRY_RUN,
        },
    ),
    "consolidate": Command(
        "fold all tasks of a bank into one set of weights, which the bank itself teaches, without labels",
        "consolidate --config task.yaml --bank runs/quickstart/bank",
    ),
    "base": Command(
        "make the base models that the config describes (tiny, GGUF, pruned); those that are there are kept",
        f"base {CONFIG} --which proxy",
        {"which": _text("target or proxy; both when not given")},
    ),
    "probe": Command(
        "find each task's core parameters: warm-start the proxy on it, write its saliency map and mask",
        f"probe {CONFIG} --backend single --launch.launcher none --launch.num_ranks 1",
    ),
    "project": Command("turn the proxy's masks into masks of the large, sharded target", f"project {CONFIG}"),
    "train": Command(
        "train one task's mask on the sharded target and keep its delta",
        f"train {CONFIG} --task_name reverse",
        {
            "task_name": _text("name of the task to train; the first one when not given"),
            "mask_file": _text("mask file; the run's projected mask when not given"),
        },
    ),
    "continual": Command(
        "learn the tasks one after the other by the methods of the config, and score them after each",
        f"continual {CONFIG} --continual.methods [retrieved]",
    ),
    "eval": Command(
        "score the target on all tasks, as it is or with the deltas that a bank retrieves",
        f"eval {CONFIG} --bank_folder runs/quickstart/bank",
        {"bank_folder": _text("folder of a bank to retrieve deltas from; the plain target when not given")},
    ),
    "report": Command(
        "write results.json and report.html from what the other commands have left",
        f"report {CONFIG} --picture runs/quickstart/report.png",
        {"picture": _text("PNG file with the key panels to write as well")},
    ),
}
"""Commands that work on the run of a configuration."""
GOES_ON = ("run", "learn", "consolidate", "base", "probe", "project", "train", "continual", "launch", "study")
"""Commands that keep what is done: the same one, started again after it was cut, goes on."""

MODEL = "--model HuggingFaceTB/SmolLM2-135M"
MEASURE = Command(
    "measure the model states of masked and of full training, in bytes per parameter",
    f"memory measure {CONFIG}",
)
MEMORY_ACTIONS = {
    "estimate": Command(
        "predict the memory of masked training from a model's config alone",
        f"memory estimate {MODEL} --world_size 8 --granularity row",
        {"out": OUT},
    ),
    "profile": Command(
        "train random weights on the ranks it is started on; shows their memory beside its prediction",
        f"memory profile {MODEL} --sequence_length 128",
        {
            "steps": (int, 4, "optimizer steps"),
            "plot": _text("PNG file with memory over time to write"),
            "out": OUT,
        },
    ),
    "plan": Command(
        "list the ways of training that fit into given GPUs, the most faithful first",
        f"memory plan {MODEL} --gpu_gib 24 --gpus 8",
        {
            "gpu_gib": (float, 24.0, "memory of one GPU, in GiB"),
            "gpus": (int, 1, "number of GPUs"),
            "reserve_gib": (
                float,
                1.0,
                "GiB of that memory to leave free for the CUDA context, communication and fragmentation",
            ),
            "gpu": _text(
                "GPU as of `simulate`, to predict steps too, of full fine-tuning and LoRA as well; minutes"
            ),
            "peers": (
                bool,
                True,
                "list full fine-tuning and LoRA beside the plan; they are simulated, minutes for a large model",
            ),
            "link_gbps": (float, 400.0, "network of each GPU for that, in 1e9 bits per second"),
            "price": (float | None, None, "dollars per GPU and hour, to say how many tokens one dollar buys"),
            "out": OUT,
        },
    ),
}
NOT_ASKED = {
    "estimate": frozenset[str](),
    "profile": frozenset({"world_size", "device", "keep_best", "checkpoint_async"}),
    "plan": frozenset(
        {
            *("density", "state_dtype", "master", "offload", "micro_batch_size"),
            *("activation_checkpointing", "world_size", "device"),
        }
    ),
}
"""Fields of a memory setup that an action has no use for."""

SHAPE: Argument = (
    str,
    "SmolLM2-135M",
    "model whose sizes are taken; its weights are random. With tiny the command only shows that it works",
)
BENCHMARKS = {
    "kernels": Command(
        "time every kernel on this machine's GPU, or CPU beside torch's fused AdamW",
        "bench kernels",
        {"out": OUT},
    ),
    "optimizer": Command(
        "time the optimizer step beside DeepSpeedCPUAdam and torch's fused AdamW over all parameters",
        "bench optimizer --rounds 5",
        {
            "density": (float, 0.05, "masked share"),
            "rounds": (int, 15, "steps of each; the median counts"),
            "out": OUT,
        },
    ),
    "step": Command(
        "time whole training steps under ZeRO-3 beside full fine-tuning, LoRA and SHiRA; count what they send",
        "bench step --shape tiny --rounds 1 --steps 2",
        {
            "shape": SHAPE,
            "contestants": (
                list[str] | None,
                None,
                "who takes part, as [row, full, LoRA]; all when not given, but those for GPUs",
            ),
            "density": (float, 0.05, "masked share of the linear layers"),
            "micro_batch": (int, 4, "examples per rank and step"),
            "sequence": (int, 128, "tokens per example"),
            "attention": (
                str,
                "auto",
                "attention of all contestants: eager, sdpa (fused), or auto, which takes the faster one",
            ),
            "ranks": (int, 2, "ranks of each contestant, one thread each"),
            "rounds": (int, 3, "how often each contestant is started"),
            "steps": (int, 5, "steps timed per start"),
            "out": OUT,
        },
    ),
    "serve": Command(
        "time swaps of deltas beside checkpoints and LoRA adapters, mixed streams of tasks, and retrieval",
        "bench serve --shape tiny --rounds 1 --tokens 4",
        {
            "shape": SHAPE,
            "density": (float, 0.05, "masked share of the linear layers"),
            "sequence": (int, 128, "tokens per prompt"),
            "tokens": (int, 16, "tokens per answer"),
            "rounds": (int, 3, "of streams, and of five swaps each; the median counts"),
            "out": OUT,
        },
    ),
    "memory": Command(
        "compare predicted with measured memory on three models and one and two ranks",
        "bench memory --out memory.json",
        {"rounds": (int, 3, "measurements of each; the median counts"), "out": OUT},
    ),
    "simulate": Command(
        "compare what is simulated with what runs on the CPUs of one, two and three ranks: memory, bytes and time",
        "bench simulate --shape tiny --rounds 1 --steps 1",
        {
            "shape": SHAPE,
            "density": (float, 0.05, "masked share of the linear layers"),
            "micro_batch": (int, 2, "examples per rank and step"),
            "sequence": (int, 128, "tokens per example"),
            "rounds": (int, 2, "how often each method is started; the medians count"),
            "steps": (int, 5, "steps timed per start"),
            "out": OUT,
        },
    ),
    "checkpoint": Command(
        "time how long training stands still for a checkpoint that it waits for, and for one written beside it",
        "bench checkpoint --shape tiny --rounds 1 --steps 1",
        {
            "shape": SHAPE,
            "density": (float, 0.05, "masked share of the linear layers"),
            "ranks": (int, 2, "ranks of masked training, one thread each; full fine-tuning has one"),
            "rounds": (int, 3, "how often each is measured; the median counts"),
            "steps": (int, 3, "steps after each checkpoint"),
            "out": OUT,
        },
    ),
}
HOURS: Argument = (
    float | None,
    None,
    "time limit. No training begins that would end after it. With 0 the command only sums up. The same command continues later",
)
STUDIES = {
    "small-to-large": Command(
        "compare random, probed and projected masks, LoRA and full training, each at a learning rate of its own",
        "study small-to-large --config configs/study-small-to-large.yaml --hours 2",
        {
            "hours": HOURS,
            "only": (
                list[str] | None,
                None,
                "tasks to work on, as [sst2, mnli], while other processes work on others; each sums up what all know",
            ),
        },
    ),
    "one-model": Command(
        "compare ways to make one set of weights of several tasks, over orders of the tasks and seeds",
        "study one-model --config configs/study-one-model.yaml --hours 2",
        {"hours": HOURS},
    ),
}
MASK = "runs/quickstart/masks/reverse.safetensors"
BANK = "runs/quickstart/bank"
Options = dict[str, dict[str, Any]]
"""Argument -> options of ``add_argument``; a name without dashes stands alone on the command line."""
OTHER_MASK = "runs/quickstart/masks/spiral.safetensors"
_MASKS: Options = {"masks": {"nargs": "+", "help": "mask files, two or more"}}
_OUT_MASK: Options = {"--out": {"required": True, "help": "mask file to write"}}
MASK_ACTIONS: dict[str, tuple[Command, Options]] = {
    "show": (
        Command(
            "show granularity, density and origin of a mask, and its density per tensor",
            f"mask show {MASK} --picture reverse.png",
        ),
        {
            "file": {"help": "mask file"},
            "--picture": {
                "default": None,
                "help": "PNG or SVG file with its density by layer and role to write",
            },
        },
    ),
    "stats": (
        Command("count what a mask selects by role, by layer and by tensor", f"mask stats {MASK}"),
        {"file": {"help": "mask file"}},
    ),
    "diff": (
        Command("show by tensor what only one of two masks selects", f"mask diff {MASK} {OTHER_MASK}"),
        {"left": {"help": "mask file"}, "right": {"help": "mask file"}},
    ),
    "overlap": (
        Command(
            "show how much of each mask the others select too, in percent of its entries",
            f"mask overlap {MASK} {OTHER_MASK}",
        ),
        _MASKS,
    ),
    "union": (
        Command(
            "write what any of some masks of one model selects",
            f"mask union {MASK} {OTHER_MASK} --out either.safetensors",
        ),
        _MASKS | _OUT_MASK,
    ),
    "intersect": (
        Command(
            "write what all of some masks of one model select",
            f"mask intersect {MASK} {OTHER_MASK} --out both.safetensors",
        ),
        _MASKS | _OUT_MASK,
    ),
    "subtract": (
        Command(
            "write what the first of some masks of one model selects and none of the others",
            f"mask subtract {MASK} {OTHER_MASK} --out reverse-alone.safetensors",
        ),
        _MASKS | _OUT_MASK,
    ),
}
_FOLDER: Options = {"folder": {"help": "folder of the bank"}}
_TASK: Options = {"task": {"help": "name of the task"}}
BANK_ACTIONS: dict[str, tuple[Command, Options]] = {
    "show": (
        Command("list what a bank holds: tasks, sizes of their deltas, clusters", f"bank show {BANK}"),
        _FOLDER,
    ),
    "verify": (
        Command("read every file of a bank and say what is not as it was written", f"bank verify {BANK}"),
        _FOLDER,
    ),
    "add": (
        Command(
            "add a task that lies in a folder, as tasks/<name> of another bank",
            f"bank add {BANK} runs/other/bank/tasks/copy",
        ),
        _FOLDER
        | {
            "source": {"help": "folder with delta.safetensors and signature.safetensors"},
            "--name": {"default": None, "help": "its name in this bank; the one that it has when not given"},
        },
    ),
    "remove": (
        Command("take a task out of a bank and delete its files", f"bank remove {BANK} reverse"),
        _FOLDER | _TASK,
    ),
    "rename": (
        Command("give a task another name", f"bank rename {BANK} reverse backwards"),
        _FOLDER | _TASK | {"name": {"help": "its new name"}},
    ),
    "merge": (
        Command(
            "make a new bank of two banks of one base model", f"bank merge {BANK} runs/other/bank --out both"
        ),
        _FOLDER
        | {
            "other": {"help": "folder of the other bank"},
            "--out": {"required": True, "help": "folder of the new bank"},
        },
    ),
    "export": (
        Command(
            "write a task for another tool: a Hugging Face checkpoint, an adapter for PEFT, a patch for vLLM (docs/export.md)",
            f"bank export {BANK} --base runs/quickstart/models/target --task reverse --format peft-shira --out reverse-shira",
        ),
        _FOLDER
        | {
            "--base": {"required": True, "help": "the base model: folder or hub id"},
            "--trust_remote_code": {
                "type": bool,
                "default": False,
                "help": "true: run the Python code that the base's folder brings, if it does; only where you trust its authors",
            },
            "--task": {
                "nargs": "+",
                "default": [],
                "help": "task whose delta is exported; --composition says what several make together",
            },
            "--delta": {
                "nargs": "+",
                "default": [],
                "help": "file of a delta beside them, as <run_dir>/consolidated.safetensors: one set of weights",
            },
            "--composition": {
                "default": None,
                "help": "sum, which is usual, average, ties, dare, magnitude_max, or the path of a module of your own",
            },
            "--out": {"required": True, "help": "folder to write"},
            "--dtype": {
                "default": "auto",
                "choices": ["auto", "float32", "bfloat16"],
                "help": "of the weights; auto is that of the deltas",
            },
            "--format": {
                "default": "hf",
                "help": "hf (checkpoint), peft-shira (adapter), vllm-patch (sparse patch), or the path of a module of your own",
            },
        },
    ),
}
INIT_ARGUMENTS: Options = {
    "--model": {"required": True, "help": "the model to train: folder or hub id"},
    "--data": {
        "required": True,
        "nargs": "+",
        "help": "a file, folder or hub id per task (docs/data.md), in the order in which the tasks arrive",
    },
    "--prompt_field": {
        "default": None,
        "help": "column of the prompts, where data have it; known columns are found when not given",
    },
    "--answer_field": {"default": None, "help": "column of the answers, where data have it"},
    "--proxy": {
        "default": None,
        "help": "a small model of the same family; when not given one is cut out of the model",
    },
    "--run_dir": {
        "default": None,
        "help": "folder of the run; runs/<name of the configuration> when not given",
    },
    "--ranks": {"type": int, "default": 1, "help": "GPUs (or processes) on this machine"},
    "--out": {"default": "trace-dist.yaml", "help": "configuration to write; an existing file is kept"},
}
FROM_BANK = f"--bank {BANK} --base runs/quickstart/models/target"
ASKED: Options = {
    "--prompt": {"nargs": "+", "default": [], "help": "text to answer, or several"},
    "--input": {
        "default": None,
        "help": "file with one JSON object per line: `prompt` or `messages`, and `task` where it is known",
    },
    "--task": {
        "default": None,
        "help": "name of the task of all prompts that name none; retrieved when not given",
    },
    "--output": {
        "default": None,
        "help": "file of answers to write, one JSON object per line; a table is printed when not given",
    },
}
"""What ``generate`` is asked, beside the bank and how answers are written."""
EVALUATED: Options = {
    "--task": {
        "default": "auto",
        "help": "name of the task whose delta answers; base for none, auto to retrieve each prompt's",
    },
    "harness": {
        "nargs": "*",
        "help": "behind --, the harness's own options, as `lm-eval run --help` lists them",
    },
}
"""What ``lm-eval`` is told, beside the bank."""
LAUNCH_ARGUMENTS: Options = {
    "--dry_run": {
        "type": bool,
        "default": False,
        "help": "print what would be started where, ask every host whether it would work there, and stop",
    },
}
LAUNCHED = ("project", "train", "continual", "eval", "learn", "consolidate")
"""Commands that ``launch`` starts on all ranks."""
FILE_COMMANDS = {
    "launch": Command(
        "start a command on the ranks that its configuration asks for, on this machine or on several hosts",
        f"launch --dry_run true train {CONFIG} --task_name reverse",
    ),
    "generate": Command(
        "answer prompts with the deltas that a bank retrieves for them",
        f"generate {FROM_BANK} --prompt 'Spell this word backward: stone'",
    ),
    "serve": Command(
        "answer over HTTP what a bank has learned, by OpenAI's interface; a task that is added is served at once",
        f"serve {FROM_BANK} --port 8000",
    ),
    "lm-eval": Command(
        "evaluate a bank, one of its tasks or its base on the tasks of lm_eval",
        f"lm-eval {FROM_BANK} --task auto -- --tasks arc_easy hellaswag --limit 100",
    ),
    "init": Command(
        "write a commented starter configuration from a model and data files, and say what it would do",
        "init --model runs/quickstart/models/target --data example:vowels.jsonl example:copy.jsonl --out mine.yaml",
    ),
    "mask": Command("look at mask files, compare and combine them", f"mask show {MASK}"),
    "bank": Command("look into a bank of deltas, keep it in order, and export from it", f"bank show {BANK}"),
    "memory": Command("predict, measure and plan the memory of training", MEMORY_ACTIONS["plan"].example),
    "simulate": Command(
        "predict memory, traffic and time of a training on 1 to 4,096 GPUs that need not be there",
        f"simulate {MODEL} --nodes 2 --gpus_per_node 8 --gpu h100",
        {"out": OUT_ALSO},
    ),
    "bench": Command(
        "measure kernels, optimizer, training step, answers and memory beside their peers",
        BENCHMARKS["step"].example,
    ),
    "study": Command(
        "answer a question by many short trainings; a study that was cut goes on",
        STUDIES["small-to-large"].example,
    ),
}
"""Commands that work on files, or on the machine."""
