"""``trace-dist simulate``: one rank of many trains without values, and a stated model says how long that would take.

    trace-dist simulate --model config.json --nodes 4 --gpus_per_node 8 --gpu h100

What runs are the contestants of ``bench step``, on a rank of ``profiling.simulation``. Memory, launches and bytes on the wire are
counted there; time is predicted (``simulation.replay``).

Of a large model two or more are simulated that have fewer decoder blocks, and all numbers are continued from these
([Note: repeated blocks] in ``simulation.blocks``).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trace_dist.benchmarks.contestants import KNOWN, Contestant, Race, build
from trace_dist.data.slices import slice_length
from trace_dist.models.architecture import cause, empty_model
from trace_dist.profiling.estimate import load_config
from trace_dist.profiling.simulation.blocks import Part, added_up, parts_of
from trace_dist.profiling.simulation.events import Program
from trace_dist.profiling.simulation.gpus import load_gpu
from trace_dist.profiling.simulation.rank import simulated_rank
from trace_dist.profiling.simulation.replay import Cluster, replay
from trace_dist.profiling.simulation.setup import SimulationSetup
from trace_dist.sharding.sequence import check_divisible
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
WARM_UP = 2
"""Steps before the one that is recorded: the first makes states and lets DeepSpeed learn the order of modules."""
ATTENTION = ("sdpa", "eager")
"""Ways of attention that are simulated: torch's fused one, where the family has it, and transformers' own."""
HOST_STATES = ("master", "exp_avg", "exp_avg_sq", "staging")
"""What an optimizer may keep in host memory."""
Found = dict[str, Any]


@dataclass(frozen=True)
class ModelRace(Race):
    """A race of a model of one's own.

    Attributes:
        model_config: of transformers.
        recomputes: whether activations are recomputed in the backward pass.
    """

    model_config: Any = None
    recomputes: bool = False

    def config(self) -> Any:
        return super().config() if self.model_config is None else self.model_config

    def model(self) -> PreTrainedModel:
        module = super().model()
        if self.recomputes:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module


Key = tuple[str, tuple[int, ...], int]
"""Method, decoder blocks, ranks."""


def simulate(setup: SimulationSetup, recorded: MutableMapping[Key, Program] | None = None) -> Found:
    """Simulate some methods on one cluster.

    Args:
        setup: what and where.
        recorded: steps that were recorded of the same model, batch and density; those that are recorded now are added. Another
            GPU asks for no others.

    Returns:
        ``setup``, ``gpu`` and ``methods``: name -> memory, launches, bytes and predicted times, and their ratios to ``full``;
        ``simulated_blocks``: how many decoder blocks the simulated models have; ``attention``: one of ``ATTENTION``.

    Raises:
        ValueError: a value makes no sense, the model has no readable config, its code needs values, or it has many decoder blocks
            and cannot be continued from fewer.
    """
    gpu = load_gpu(setup.gpu)
    cluster = Cluster(gpu, setup.nodes, setup.gpus_per_node, setup.link_gbps)
    found = _simulated(setup, lambda program: described(program, cluster), recorded)
    methods = found["methods"]
    for each in methods.values():
        _derive(each, setup)
    full = methods.get("full")
    for each in methods.values():
        if full is not None:
            each["step_ratio"] = each["step_s"]["expected"] / full["step_s"]["expected"]
    return {"setup": asdict(setup), "gpu": asdict(gpu), **found}


def count(setup: SimulationSetup) -> Found:
    """What ``simulate`` counts, without times; the kind of GPU does not matter.

    Args:
        setup: what, and on how many ranks.

    Returns:
        As of ``simulate``, but ``setup``, ``gpu`` and what is predicted of ``methods``.

    Raises:
        ValueError: see ``simulate``.
    """
    return _simulated(setup, counted)


def _simulated(
    setup: SimulationSetup,
    describe: Callable[[Program], Found],
    recorded: MutableMapping[Key, Program] | None = None,
) -> Found:
    """Each method's recorded steps, as ``describe`` has them, continued to all decoder blocks."""
    for name in setup.methods:
        if name not in KNOWN:
            raise ValueError(f"methods: {name!r} is unknown; use some of {', '.join(KNOWN)}")
    config = load_config(setup.model)
    _check_blocks(setup, config)
    if setup.sequence_parallel > 1:
        check_divisible(config, setup.sequence_parallel)
    whole = empty_model(config, torch.bfloat16, f"model={setup.model!r}")
    chosen = whole.config._attn_implementation
    attention = chosen if chosen in ATTENTION else ATTENTION[-1]
    parts = parts_of(whole, config, f"model={setup.model!r}", setup.blocks)
    methods, recorded = {}, {} if recorded is None else recorded
    for name in setup.methods:
        begin = time.perf_counter()
        for part in parts:
            key = (name, part.layers, setup.world_size)
            if key not in recorded:
                recorded[key] = _recorded(setup, part, name, attention)
        found = [describe(recorded[name, part.layers, setup.world_size]) for part in parts]
        methods[name] = added_up(found, [part.weight for part in parts])
        logger.info("%s: simulated in %.0f s", name, time.perf_counter() - begin)
    counts = [len(part.layers) for part in parts]
    return {"simulated_blocks": counts, "attention": attention, "methods": methods}


def _check_blocks(setup: SimulationSetup, config: Any) -> None:
    number = config.get_text_config().num_hidden_layers
    if setup.blocks > number:
        raise ValueError(f"blocks={setup.blocks}: the model has {number} decoder blocks; use at most as many")


def _recorded(setup: SimulationSetup, part: Part, name: str, attention: str) -> Program:
    race = ModelRace(
        *("tiny", setup.density, setup.micro_batch_size, setup.sequence_length, attention),
        sequence_parallel=setup.sequence_parallel,
        model_config=part.config,
        recomputes=setup.activation_checkpointing,
    )
    num_tokens = race.micro_batch * slice_length(race.sequence, race.sequence_parallel)
    try:
        return record(lambda: build(name, race), setup.world_size, num_tokens)
    # A family's code, which may need values, another length, other inputs than tokens or another dtype; and that of peers.
    except Exception as error:
        raise ValueError(
            f"model={setup.model!r}, methods=[{name}]: a step of the family {part.config.model_type!r} cannot be simulated "
            f"({cause(error)}); change what it names, or leave the method out"
        ) from error


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


def counted(program: Program) -> Found:
    """Everything that is counted, in numbers that grow in a straight line with the blocks."""
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
    }


def described(program: Program, cluster: Cluster) -> Found:
    """Everything that is counted and predicted, in numbers that grow so too."""
    times = {bound: replay(program, there) for bound, there in cluster.bounds().items()}
    expected = times["expected"]
    return {
        **counted(program),
        "link_bytes": expected.crossing,
        "step_s": {bound: timing.step for bound, timing in times.items()},
        "phases_s": expected.phases,
        "spent_s": expected.spent,
        "collectives_s": expected.collectives,
    }


def _derive(found: Found, setup: SimulationSetup) -> None:
    """Rates, which do not grow in a straight line."""
    groups = setup.world_size // setup.sequence_parallel
    tokens = groups * setup.micro_batch_size * setup.sequence_length
    found["tokens_per_s"] = {bound: tokens / seconds for bound, seconds in found["step_s"].items()}
    if setup.price is not None:
        dollars = setup.price * setup.world_size / 3600
        found["tokens_per_dollar"] = {bound: rate / dollars for bound, rate in found["tokens_per_s"].items()}
