"""``trace-dist simulate``: one rank of many trains without values, and a stated model says how long that would take.

    trace-dist simulate --model config.json --nodes 4 --gpus_per_node 8 --gpu h100

What runs are the contestants of ``bench step``, on a rank of ``profiling.simulation``. Memory, launches and bytes on the wire are
counted there; time is predicted (``simulation.replay``).

[Note: repeated blocks] Decoder blocks are alike, and the program does for each what it did for the one before. So two models
are simulated, of k and of k + 1 blocks, and everything that is counted or predicted is continued in a straight line. k is so
large that blocks at both ends, of which DeepSpeed keeps 5e8 elements gathered between forward and backward, are not the same.
Of an 8B model, 3 and 4 blocks give the bytes that gathers and reductions send with 8 and 9, those of all-to-all within 2 %, the
memory within 0.2 % and the time within 2 %.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, MutableMapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trace_dist.benchmarks.contestants import KNOWN, Contestant, Race, build
from trace_dist.data.slices import slice_length
from trace_dist.models.architecture import empty_model
from trace_dist.models.blocks import decoder_blocks
from trace_dist.profiling.estimate import load_config
from trace_dist.profiling.simulation.events import Program
from trace_dist.profiling.simulation.gpus import load_gpu
from trace_dist.profiling.simulation.rank import simulated_rank
from trace_dist.profiling.simulation.replay import Cluster, replay
from trace_dist.profiling.simulation.setup import SimulationSetup
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
WARM_UP = 2
"""Steps before the one that is recorded: the first makes states and lets DeepSpeed learn the order of modules."""
LOOKS_AHEAD = 6e8
"""Elements that k blocks have at least ([Note: repeated blocks])."""
HOST_STATES = ("master", "exp_avg", "exp_avg_sq", "staging")
"""What an optimizer may keep in host memory."""
Found = dict[str, Any]


@dataclass(frozen=True)
class ModelRace(Race):
    """A race of a model of one's own.

    Attributes:
        model_config: of transformers.
        num_blocks: decoder blocks; those of the config where it is 0.
        recomputes: whether activations are recomputed in the backward pass.
    """

    model_config: Any = None
    num_blocks: int = 0
    recomputes: bool = False

    def config(self) -> Any:
        config = super().config() if self.model_config is None else self.model_config
        return with_blocks(config, self.num_blocks) if self.num_blocks else config

    def model(self) -> PreTrainedModel:
        module = super().model()
        if self.recomputes:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module


def with_blocks(config: Any, number: int) -> Any:
    """A copy of a transformers config with another number of decoder blocks."""
    config = deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = number
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * number)[:number]
    return config


Key = tuple[str, int, int]
"""Method, decoder blocks, ranks."""


def simulate(setup: SimulationSetup, recorded: MutableMapping[Key, Program] | None = None) -> Found:
    """Simulate some methods on one cluster.

    Args:
        setup: what and where.
        recorded: steps that were recorded of the same model, batch and density; those that are recorded now are added. Another
            GPU asks for no others.

    Returns:
        ``setup``, ``gpu`` and ``methods``: name -> memory, launches, bytes and predicted times, and their ratios to ``full``.

    Raises:
        ValueError: a value makes no sense, or the model has no readable config.
    """
    for name in setup.methods:
        if name not in KNOWN:
            raise ValueError(f"methods: {name!r} is unknown; use some of {', '.join(KNOWN)}")
    gpu = load_gpu(setup.gpu)
    config = load_config(setup.model)
    cluster = Cluster(gpu, setup.nodes, setup.gpus_per_node, setup.link_gbps)
    counts = _blocks(setup, config)
    methods, recorded = {}, {} if recorded is None else recorded
    for name in setup.methods:
        begin = time.perf_counter()
        for count in counts:
            key = (name, count, setup.world_size)
            if key not in recorded:
                recorded[key] = _recorded(setup, config, name, count)
        few, *more = [described(recorded[name, count, setup.world_size], cluster) for count in counts]
        last = more[0] if more else few
        methods[name] = continued(few, last, _num_blocks(setup, config) - counts[-1])
        _derive(methods[name], setup)
        logger.info("%s: simulated in %.0f s", name, time.perf_counter() - begin)
    full = methods.get("full")
    for found in methods.values():
        if full is not None:
            found["step_ratio"] = found["step_s"]["expected"] / full["step_s"]["expected"]
    return {"setup": asdict(setup), "gpu": asdict(gpu), "simulated_blocks": counts, "methods": methods}


def _num_blocks(setup: SimulationSetup, config: Any) -> int:
    number = config.get_text_config().num_hidden_layers
    if setup.blocks > number:
        raise ValueError(f"blocks={setup.blocks}: the model has {number} decoder blocks; use at most as many")
    return int(number)


def _blocks(setup: SimulationSetup, config: Any) -> list[int]:
    """How many decoder blocks the models have that are simulated: one number, or k and k + 1."""
    number = _num_blocks(setup, config)
    if setup.blocks:
        return [setup.blocks, setup.blocks + 1] if setup.blocks < number else [number]
    one = empty_model(
        with_blocks(config, 1), config.dtype or nn.Linear(1, 1).weight.dtype, f"model={setup.model!r}"
    )
    size = sum(each.numel() for block in decoder_blocks(one).values() for each in block.parameters())
    fewest = max(2, ceil(LOOKS_AHEAD / size)) if size else number
    return [fewest, fewest + 1] if fewest + 1 < number else [number]


def _recorded(setup: SimulationSetup, config: Any, name: str, blocks: int) -> Program:
    race = ModelRace(
        *("tiny", setup.density, setup.micro_batch_size, setup.sequence_length, "sdpa"),
        sequence_parallel=setup.sequence_parallel,
        model_config=config,
        num_blocks=blocks,
        recomputes=setup.activation_checkpointing,
    )
    num_tokens = race.micro_batch * slice_length(race.sequence, race.sequence_parallel)
    return record(lambda: build(name, race), setup.world_size, num_tokens)


def record(make: Callable[[], Contestant], world: int, num_tokens: int, synchronous: bool = False) -> Program:
    """The third step of a contestant on the first of ``world`` ranks that are not there.

    Args:
        make: builds it, on that rank.
        world: ranks.
        num_tokens: of one rank's step.
        synchronous: see ``simulated_rank``.
    """
    with simulated_rank(world, synchronous) as recorder:
        contestant = make()
        before = recorder.alive
        for _ in range(WARM_UP + 1):
            before = recorder.alive
            recorder.clear()
            recorder.mark("forward")
            loss = contestant.forward()
            recorder.mark("backward")
            contestant.backward(loss)
            del loss
            recorder.mark("optimizer")
            contestant.step()
        states = contestant.states()
        kept = {name: _device_bytes(tensors) for name, tensors in states.items()}
        program = Program(
            *(recorder.events, world, before, recorder.peak, kept, num_tokens),
            num_trained=contestant.num_trained,
            host=sum(
                tensor.nbytes for name in HOST_STATES for tensor in states.get(name, ()) if not tensor.is_meta
            ),
            calls=recorder.calls,
        )
        del contestant
    gc.collect()
    return program


def _device_bytes(tensors: Any) -> int:
    """Bytes of the storages behind some tensors of a simulated accelerator; views of one storage count once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.is_meta}
    return sum(storages.values())


def described(program: Program, cluster: Cluster) -> Found:
    """Everything that is counted and predicted, in numbers that grow in a straight line with the blocks."""
    times = {bound: replay(program, there) for bound, there in cluster.bounds().items()}
    expected = times["expected"]
    sent = program.sent()
    return {
        "peak_bytes": program.peak,
        "states_bytes": program.states,
        "kept_bytes": program.kept | {"buffers": max(0, program.states - sum(program.kept.values()))},
        "host_bytes": program.host,
        "num_trained": program.num_trained,
        "flops": program.flops,
        "moved_bytes": program.moved,
        "launches": program.launches,
        "host_waits": program.host_waits,
        "collectives": {name: number for name, (number, _) in sent.items()},
        "sent_bytes": {name: size for name, (_, size) in sent.items()},
        "link_bytes": expected.crossing,
        "step_s": {bound: timing.step for bound, timing in times.items()},
        "phases_s": expected.phases,
        "spent_s": expected.spent,
        "collectives_s": expected.collectives,
    }


def continued(few: Any, more: Any, further: int) -> Any:
    """``more`` and ``further`` times what it has beyond ``few``, number by number ([Note: repeated blocks])."""
    if isinstance(more, Mapping):
        names = [*more, *(name for name in few if name not in more)]
        return {name: continued(few.get(name, 0), more.get(name, 0), further) for name in names}
    return more + further * (more - few)


def _derive(found: Found, setup: SimulationSetup) -> None:
    """Rates, which do not grow in a straight line."""
    groups = setup.world_size // setup.sequence_parallel
    tokens = groups * setup.micro_batch_size * setup.sequence_length
    found["tokens_per_s"] = {bound: tokens / seconds for bound, seconds in found["step_s"].items()}
    if setup.price is not None:
        dollars = setup.price * setup.world_size / 3600
        found["tokens_per_dollar"] = {bound: rate / dollars for bound, rate in found["tokens_per_s"].items()}
