"""What is asked of ``trace-dist generate`` and ``serve``; apart from the work, so that parsing arguments imports no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trace_dist.config.checks import Section, check
from trace_dist.config.model import Dtype, Quantize
from trace_dist.config.run import Backend
from trace_dist.parts import COMPOSITIONS
from trace_dist.utils.names import AUTO

NO_BLEND = "none"
COLDEST = 1e-4
"""Temperatures below are 0."""


def check_task(task: str, known: Sequence[str]) -> None:
    """Raise ValueError unless a task is one of these, or ``auto``."""
    shown = ", ".join((AUTO, *known[:20])) + (", ..." if len(known) > 20 else "")
    rule = "the bank does not hold it"
    check(task == AUTO or task in known, "task", task, rule, f"choose among {shown}")


@dataclass(frozen=True)
class Source(Section):
    """A bank and its base model, and how prompts find their tasks."""

    section: ClassVar[str] = ""

    bank: str
    """Folder of the bank."""
    base: str
    """The bank's base model: folder or hub id."""
    dtype: Dtype | Literal["auto"] = "auto"
    """Data type of the weights; auto is that of the bank's deltas."""
    quantize: Quantize | Literal["auto"] = "auto"
    """`nf4` loads the base in 4 bits; `auto` does where the bank says that its tasks were learned so, which those of earlier
    releases do not."""
    backend: Backend = "single"
    """`single` holds the base whole in one process; `zero3` and `fsdp2` spread it over the ranks of a launched job, which answer
    together."""
    trust_remote_code: bool = False
    """Run the Python code that the base's folder brings, if it does; only for models whose authors you trust."""
    representation: Literal["auto", "base", "adapted"] = "auto"
    """`adapted` lets each task's own weights judge a prompt, where all tasks were learned with `bank.representation: adapted`;
    `base` looks at the base's representation alone. `auto` is as the tasks were learned: adapted where all of them were so."""
    candidates: int = 3
    """Tasks whose weights a prompt is tried with, for representation adapted."""
    reject: float | None = None
    """Share of a task's own prompts that may be taken for those of no known task, in (0, 1), as 0.01; the base answers what is
    rejected. Without it nothing is rejected."""
    blend: str = "none"
    """`none`: the delta of the likeliest task answers. Or how the deltas of the tasks that a prompt may be of, three at most,
    become one set of weights for it, each times its task's probability: `sum`, `average`, `ties`, `dare`, `magnitude_max`, or the
    path of a module of your own. A prompt whose task is certain is answered as with `none`; others read deltas each time."""
    batch_size: int = 16
    """Prompts that are answered at the same time, at most."""
    cache_gib: float = 4.0
    """Host memory for deltas that were used, in GiB, values and where they lie; the least recently used one goes first."""

    def check(self) -> None:
        self.at_least(1, "batch_size", "candidates")
        self.at_least(0, "cache_gib")
        if self.blend != NO_BLEND:
            COMPOSITIONS.check(self.blend)
        cure = "use for example 0.01, or leave it out"
        check(
            self.reject is None or 0 < self.reject < 1, "reject", self.reject, "must lie in (0, 1)", cure
        )  # fmt: skip

    def check_alone(self, command: str) -> None:
        """Raise ValueError where a command that runs in one process is asked for a base that is spread over several."""
        rule = f"{command} runs in one process, with backend=single"
        check(
            self.backend == "single", "backend", self.backend, rule, "leave it out; `generate` runs on ranks"
        )


@dataclass(frozen=True)
class Sampling(Section):
    """How an answer is written. The base's own generation defaults are not used."""

    section: ClassVar[str] = ""

    max_new_tokens: int | None = None
    """Tokens of an answer, at most; when not set 256, or as many as the model has positions for behind the prompt."""
    temperature: float = 0.0
    """0 takes the likeliest token at each step, as tasks are scored, and so does what is below 1e-4; 1 draws from the model's
    distribution."""
    top_p: float = 1.0
    """Where tokens are drawn: from the likeliest ones that have this share of the probability together, in (0, 1]."""
    top_k: int = 0
    """Where tokens are drawn: from this many of the likeliest; 0 is all."""
    seed: int | None = None
    """Of the draws; equal seeds give equal answers to equal batches."""
    stop: list[str] = field(default_factory=list)
    """Texts before which an answer ends."""

    def check(self) -> None:
        self.at_least(1, "max_new_tokens")
        self.at_least(0, "temperature", "top_k", "seed")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]", "use 1 for all tokens")
        most = 2**63 - 1
        check(self.seed is None or self.seed <= most, "seed", self.seed, f"may be {most} at most", "lower it")
        check("" not in self.stop, "stop", self.stop, "must not hold an empty text", "leave it out")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; logits divided by less than ``COLDEST`` may be infinite."""
        return self.temperature >= COLDEST

    @property
    def way(self) -> tuple[float, ...]:
        """What answers that are written together must have in common."""
        return (self.temperature, self.top_p, self.top_k) if self.draws else ()


@dataclass(frozen=True)
class Listening(Section):
    """Where a server listens, and what it takes on."""

    section: ClassVar[str] = ""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    max_wait_ms: float = 5.0
    """How long a request waits for others of its task, to be answered in one batch."""
    max_waiting: int = 256
    """Prompts that wait or are being answered, at most; further ones are refused with status 429."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt, at most; all that the model has positions for when not set."""
    max_tokens: int = 1024
    """Tokens of an answer, at most, and where a request names no number."""
    max_n: int = 8
    """Answers to one prompt, at most."""
    max_body_kib: int = 1024
    """Size of a request, at most, in KiB."""

    def check(self) -> None:
        self.at_least(0, "port", "max_wait_ms")
        self.at_least(1, "max_waiting", "max_prompt_tokens", "max_tokens", "max_n", "max_body_kib")
        check(self.port < 2**16, "port", self.port, "must be below 65536", "lower it")
