"""The faults that a job must bear, and what must come of each."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from faults.jobs import Job, Setting, Started

Outcome = Literal["goes on", "recovers", "refused", "skips", "goes back"]
"""What comes of a fault.

goes on: the job ends well by itself, with the bits of an undisturbed one.
recovers: the job ends, and the same command, started again, goes on from the newest checkpoint to the same bits.
refused: the job ends with exit code 2 and one line that says why; without the fault the same command goes on to the same bits.
skips: the job ends well; the steps that were bad are left out and named.
goes back: the job ends well after a return to a checkpoint.
"""
Meanwhile = Callable[[Job, Started], object]
NF4 = ("--target.dtype=bfloat16", "--target.quantize=nf4", "--continual.methods=[retrieved]")


@dataclass(frozen=True)
class Case:
    """A fault and what must come of it.

    Attributes:
        name: what happens, in words.
        faults: ``TRACE_DIST_FAULTS``.
        outcome: what must come of it.
        says: a pattern of what explains it, printed at the first start, or at the second where it shows ``later``.
        setting: how the job is started.
        later: whether it shows when the job is started again, after a kill.
        lost: steps that may have to be done again, at most. Steps take milliseconds, and there is a checkpoint every 3: the
            newest may still be on its way to the disk.
        seconds: within which all processes must be gone, or the job have come to its end, after the fault.
        same: whether the result has the bits of an undisturbed training when the command has been started again.
    """

    name: str
    faults: str
    outcome: Outcome
    says: str = ""
    setting: Setting = field(default_factory=Setting)
    later: bool = False
    lost: int = 5
    seconds: float = 30.0
    same: bool = True


def at_step(step: int, act: Callable[[Job, Started], object]) -> Callable[[], Meanwhile]:
    """Acts once, when a step has been written down."""

    def make() -> Meanwhile:
        done = list[bool]()

        def meanwhile(job: Job, process: Started) -> None:
            if not done and job.last_step() >= step:
                done.append(True)
                job.note("from outside", job.last_step())
                act(job, process)

        return meanwhile

    return make


def signal_all(job: Job, process: Started, number: int) -> None:
    for pid in job.processes(process):
        os.kill(pid, number)


def suspend(job: Job, process: Started) -> None:
    """Stop all of it, and let it go on after some turns of the heartbeat."""
    signal_all(job, process, signal.SIGSTOP)
    job.after(12.0, lambda: signal_all(job, process, signal.SIGCONT))


def kill_launcher(job: Job, process: Started) -> None:
    """The supervisor and the launcher, by a signal that nobody can pass on; not the ranks."""
    pids = job.processes(process)
    for pid in [pid for pid in pids if not job.is_rank(pid)]:
        os.kill(pid, signal.SIGKILL)


SAME = "lost contact: rank 1 on .* has ended without a word; it was in train: train/copy step"
LOST_0 = "lost contact: rank 0 on .* has ended without a word"
TORCHRUN, ACCELERATE = Setting("torchrun"), Setting("accelerate")
DEEPSPEED = Setting("deepspeed", backend="zero3")
BEFORE_IT = "the checkpoint before it is used"
KILL_LATE = "sleep@step=10,for=2s; sleep@step=11,phase=data,for=1s; kill@rank=0,step=11,phase=backward; "
"""By then the checkpoint of step 9 bears its name."""
CASES: tuple[Case, ...] = (
    # ---- a rank ends
    Case("a rank is killed in its forward pass", "kill@rank=1,step=7,phase=forward", "recovers", SAME),
    Case(
        "a rank is killed in its backward pass",
        "kill@rank=1,step=8,phase=backward",
        "recovers",
        "rank 1 on",
    ),
    Case("a rank is killed before its update", "kill@rank=1,step=9,phase=update", "recovers", "rank 1 on"),
    Case("rank 0 is killed", "kill@rank=0,step=8,phase=backward", "recovers", LOST_0),
    Case(
        "rank 0 is killed when a checkpoint begins", "kill@rank=0,step=6,phase=checkpoint", "recovers", LOST_0
    ),
    Case(
        "a rank is killed while it writes its part of a checkpoint",
        "kill@rank=1,file=rank-00001,step=6",
        "recovers",
        "rank 1 on",
    ),
    Case(
        "rank 0 is killed before it announces a checkpoint",
        "kill@rank=0,file=manifest,step=6",
        "recovers",
        LOST_0,
    ),
    Case(
        "rank 0 is killed while it writes the result",
        "kill@rank=0,file=.copy.safetensors",
        "recovers",
        LOST_0,
        lost=0,
    ),
    Case("every rank is killed at once", "kill@rank=0,step=8; kill@rank=1,step=8", "recovers"),
    Case("a rank gets SIGTERM", "term@rank=1,step=7", "recovers", SAME),
    Case("a rank dies by a memory fault", "segv@rank=1,step=7", "recovers", SAME),
    Case("a rank ends by itself, with exit code 0", "exit@rank=1,step=7,code=0", "recovers", "rank 1"),
    Case("an error of the program in one rank", "raise@rank=1,step=7", "recovers", "an injected error"),
    Case(
        "a rank is asked to stop", "usr1@rank=1,step=7", "recovers", r"step 7 of 12 is done and kept", lost=0
    ),
    # ---- a rank does nothing
    Case(
        "a rank stops for good",
        "stop@rank=1,step=7",
        "recovers",
        "rank 1 on .* has given no sign of life for 10 s",
        TORCHRUN,
    ),
    Case(
        "rank 0 stops for good",
        "stop@rank=0,step=7",
        "recovers",
        "rank 0 on .* has given no sign of life for 10 s",
        TORCHRUN,
    ),
    Case("a rank stops for 5 s", "stop@rank=1,step=7,for=5s", "goes on"),
    Case("a rank works alone for 6 s", "sleep@rank=1,step=7,for=6s", "goes on"),
    Case("the clock of rank 0 goes back by a day", "clock@rank=0,step=4,jump=-1d", "goes on"),
    Case("the clock of a rank goes forward by a day", "clock@rank=1,step=4,jump=1d", "goes on"),
    # ---- collectives
    Case("an exchange of gradients begins 5 s late", "delay@rank=1,step=7,all_to_all=5s", "goes on"),
    Case("a message at the end of backward begins 5 s late", "delay@rank=0,step=7,any=5s", "goes on"),
    Case(
        "an exchange of gradients fails",
        "lose@rank=1,step=7,all_to_all=0s",
        "recovers",
        "an injected loss",
    ),
    Case("a sum over the ranks fails", "lose@rank=0,step=7,sum=0s", "recovers", "an injected loss"),
    # ---- numbers
    Case(
        "a rank's gradient is NaN",
        "nan@rank=1,step=5",
        "skips",
        "gradient norm is nan on rank 1 at step 5, which is skipped",
    ),
    Case(
        "a rank's loss is NaN",
        "nan@rank=0,step=5,in=loss",
        "skips",
        "loss is nan on rank 0 at step 5, which is skipped",
    ),
    Case(
        "a rank's gradient is infinite",
        "inf@rank=1,step=5",
        "skips",
        "gradient norm is .* on rank 1 at step 5, which is skipped",
    ),
    Case(
        "four NaN in a row",
        "nan@step=4; nan@step=5; nan@step=6; nan@step=7",
        "refused",
        "after 3 bad steps before it",
        same=False,
    ),
    Case(
        "the loss jumps",
        "spike@step=10,by=50",
        "goes back",
        "jumps to .* back to the checkpoint of step 9",
        Setting(options=("--train.spike_factor=3",)),
    ),
    # ---- disks
    Case(
        "no space for a rank's part of a checkpoint",
        "enospc@rank=1,file=rank-00001",
        "refused",
        "No space left on device",
    ),
    Case("no space for a manifest", "enospc@file=manifest", "refused", "No space left on device"),
    Case(
        "no space for the result",
        "enospc@file=.copy.safetensors",
        "refused",
        "No space left on device",
        lost=0,
    ),
    Case("the disk quota is used up", "edquot@file=manifest", "refused", "quota"),
    Case("an input/output error", "eio@rank=1,file=rank-00001", "refused", "Input/output error"),
    Case("the file system becomes read-only", "erofs@file=manifest", "refused", "Read-only file system"),
    Case(
        "the run folder may not be written any more", "eacces@file=manifest", "refused", "Permission denied"
    ),
    Case("a write takes 5 s", "slow@file=manifest,for=5s", "goes on"),
    # ---- files
    Case(
        "a bit of the newest manifest is flipped",
        KILL_LATE + "corrupt@file=manifest",
        "recovers",
        BEFORE_IT,
        later=True,
    ),
    Case(
        "the newest manifest is empty",
        KILL_LATE + "empty@file=manifest",
        "recovers",
        BEFORE_IT,
        later=True,
    ),
    Case(
        "a bit of a rank's part of it is flipped",
        KILL_LATE + "corrupt@file=rank-00001",
        "recovers",
        BEFORE_IT,
        later=True,
    ),
    Case(
        "a rank's part of it ends in its middle",
        KILL_LATE + "truncate@file=rank-00000",
        "recovers",
        BEFORE_IT,
        later=True,
    ),
    Case(
        "a rank's part of it is gone",
        KILL_LATE + "remove@file=rank-00001",
        "recovers",
        BEFORE_IT,
        later=True,
    ),
    Case(
        "a bit of the mask is flipped",
        "corrupt@file=given",
        "refused",
        "given.safetensors",
        lost=0,
    ),
    # ---- from outside
    Case("the whole job is suspended for 12 s", "", "goes on"),
    Case("the whole job is killed", "", "recovers"),
    # ---- backends
    Case(
        "a rank is killed under ZeRO-3",
        "kill@rank=1,step=8",
        "recovers",
        "rank 1 on",
        Setting(backend="zero3"),
    ),
    Case(
        "a rank's gradient is NaN under ZeRO-3",
        "nan@rank=1,step=5",
        "skips",
        "nan on rank 1",
        Setting(backend="zero3"),
    ),
    Case(
        "a rank is killed on a 4-bit base",
        "kill@rank=1,step=8",
        "recovers",
        "rank 1 on",
        Setting(options=NF4),
    ),
    Case(
        "a rank's gradient is NaN on a 4-bit base",
        "nan@rank=1,step=5",
        "skips",
        "nan on rank 1",
        Setting(options=NF4),
    ),
    Case(
        "a rank is killed on a 4-bit base under ZeRO-3",
        "kill@rank=1,step=8",
        "recovers",
        "rank 1 on",
        Setting(backend="zero3", options=NF4),
    ),
    # ---- launchers
    Case("a rank is killed under torchrun", "kill@rank=1,step=8", "recovers", "rank 1 on", TORCHRUN),
    Case("a rank is killed under deepspeed", "kill@rank=1,step=8", "recovers", "rank 1 on", DEEPSPEED),
    Case("a rank is killed under accelerate", "kill@rank=1,step=8", "recovers", "rank 1 on", ACCELERATE),
    Case("the launcher is killed: torchrun", "", "recovers", setting=TORCHRUN),
    Case("the launcher is killed: deepspeed", "", "recovers", setting=DEEPSPEED),
    Case("the launcher is killed: accelerate", "", "recovers", setting=ACCELERATE),
    Case(
        "the system kills a rank for want of memory",
        "memory@rank=1,step=7,mib=4000",
        "recovers",
        "rank 1 on",
        Setting("torchrun", around=("cgroup",)),
    ),
)
OUTSIDE: dict[str, Callable[[], Meanwhile]] = {
    "the whole job is suspended for 12 s": at_step(5, suspend),
    "the whole job is killed": at_step(5, lambda job, process: signal_all(job, process, signal.SIGKILL)),
    **{
        f"the launcher is killed: {name}": at_step(5, kill_launcher)
        for name in ("torchrun", "deepspeed", "accelerate")
    },
}
"""Faults from outside, by the names of their cases; each start has one of its own."""
