"""Backend ``fsdp2``: torch's ``fully_shard`` cuts dimension 0 of every parameter into chunks, one per rank.

A rank's chunk is the local tensor of a DTensor; it is contiguous, so it is one interval of the flattened parameter and is updated
in place. Frozen linear weights are gathered for backward and never reduced (``masked_linear`` delivers their compact
gradients); a parameter that a hook catches has been reduced by FSDP2 already, as the mean over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from trace_dist.config import Quantize
from trace_dist.masks.mask import Mask
from trace_dist.models.blocks import decoder_blocks
from trace_dist.models.loading import load_model_fsdp2
from trace_dist.models.shared import shared_names
from trace_dist.models.wrapping import unwrap
from trace_dist.sharding import gloo
from trace_dist.sharding.compaction import linear_modules
from trace_dist.sharding.holding import HoldingModel
from trace_dist.sharding.support import Accumulate, Support
from trace_dist.sharding.views import PartitionView, chunk_views
from trace_dist.utils import dist


def _wrap(module: nn.Module) -> None:
    """Shard every decoder block as one group, and what is left as the root's; each moves to the device by itself."""
    refuse_shared(module)
    mesh = init_device_mesh(dist.local_device().type, (dist.world_size(),))
    # Of what a hook catches; linear layers reduce nothing.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for part in (*decoder_blocks(module).values(), module):
        sharded = fully_shard(part, mesh=mesh, mp_policy=policy)
        if mesh.device_type == "cpu":
            sharded.set_custom_all_gather(gloo.AllGather())  # type: ignore[arg-type]


def refuse_shared(module: nn.Module) -> None:
    """Raise ValueError where a decoder block shares a weight with what lies outside it: each group would have one of its own."""
    blocks = decoder_blocks(module)
    for names in shared_names(module):
        # The first name of each block.
        by_block: dict[str, str] = {}
        for name in names:
            by_block.setdefault(next((path for path in blocks if name.startswith(f"{path}.")), ""), name)
        if len(by_block) > 1:
            first, other, *_ = by_block.values()
            raise ValueError(
                f"backend='fsdp2': {first} and {other} are one weight in two blocks, which fully_shard would part; use zero3"
            )


def _groups(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _drop_copies(module: nn.Module) -> None:
    """Let shards be the parameters: the root's group stays gathered after a forward pass without backward."""
    for group in _groups(module):
        group.reshard()


def _check_sharding(module: nn.Module) -> None:
    """Raise ValueError unless every parameter is one chunk of rows per rank, on the device that computes."""
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            raise ValueError(f"model: {name!r} is not sharded; call fully_shard on the whole model last")
        if parameter.device_mesh.size() != dist.world_size() or list(parameter.placements) != [Shard(0)]:
            raise ValueError(
                f"model: {name!r} is placed {parameter.placements} on a mesh of {tuple(parameter.device_mesh.shape)}; masked "
                f"training needs dimension 0 cut over all {dist.world_size()} ranks: fully_shard over a one-dimensional mesh"
            )
        if parameter.to_local().device.type not in (parameter.device_mesh.device_type, "meta"):
            raise ValueError(
                f"model: {name!r} is offloaded to the {parameter.to_local().device.type}; leave CPUOffloadPolicy out and use "
                "MaskedAdamW(offload='cpu'), which moves the optimizer states"
            )


class Fsdp2Model(HoldingModel):
    """A model sharded by FSDP2.

    Args:
        module: an ordinary model, sharded now unless it is already.
    """

    backend = "fsdp2"
    reduces_hooked_gradients = True

    def __init__(self, module: nn.Module) -> None:
        dist.ensure_group()
        outermost, module = module, unwrap(module)
        if not isinstance(module, FSDPModule):
            _wrap(module)
        _drop_copies(module)
        _check_sharding(module)
        super().__init__(outermost)
        # Settles where the shards live, so that `local` may be kept from then on.
        self.module._get_fsdp_state()._lazy_init()
        self._parameters = self._named_parameters()

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype, quantize: Quantize = "none") -> Fsdp2Model:
        """Load a checkpoint so that no rank ever holds more than its own shard."""
        dist.ensure_group()

        def first(shape: Sequence[int]) -> int:
            return chunk_views(shape, dist.world_size())[dist.rank()].start

        return cls(load_model_fsdp2(path, dtype, _wrap, dist.local_device(), first, quantize))

    def views(self, name: str) -> list[PartitionView]:
        return chunk_views(self.shape(name), self.world)

    def local(self, name: str) -> Tensor:
        return self._parameters[name].data.to_local().view(-1)

    def replaced(self) -> list[str]:
        _drop_copies(self.module)
        return super().replaced()

    def attach(self, mask: Mask, accumulate: Accumulate | None = None) -> list[Support]:
        _drop_copies(self.module)  # a hook on a copy would go with it, and see no slice
        self._check_dtypes(mask)
        supports = super().attach(mask, accumulate)
        # By what is trainable at the first forward pass FSDP2 settles in which dtype it reduces. Where that was an evaluation,
        # nothing is, and gradients would be summed in bf16; another mask may hold weights of another dtype.
        for part in self._param_groups():
            part._init_mp_dtypes()
        return supports

    def _param_groups(self) -> list[Any]:
        return [part for group in _groups(self.module) for part in group._get_fsdp_state()._fsdp_param_groups]

    def _check_dtypes(self, mask: Mask) -> None:
        """Raise ValueError where FSDP2 would reduce gradients of two dtypes as one: it can only do so with those of one."""
        linears = linear_modules(self.module)
        hooked = {
            id(p): name for name, p in self._parameters.items() if name in mask.units and name not in linears
        }
        for part in self._param_groups():
            params = [p.sharded_param for p in part.fsdp_params if id(p.sharded_param) in hooked]
            names = {p.dtype: hooked[id(p)] for p in params}
            if len(names) > 1:
                both = " and ".join(
                    f"{name!r} in {str(dtype).removeprefix('torch.')}" for dtype, name in names.items()
                )
                raise ValueError(
                    f"mask: it holds {both}, whose gradients FSDP2 cannot reduce together; leave one out (mask.maskable), or "
                    "use backend zero3"
                )

    def stamp(self, name: str) -> tuple[int, int]:
        parameter = self._parameters[name]
        return parameter._version, parameter._local_tensor.data_ptr()

    def copies(self) -> list[Tensor]:
        return [p.data for p in self.module.parameters() if not isinstance(p, DTensor)]

    def refresh(self, supports: Iterable[Support]) -> None:
        """The root group stays gathered after a forward pass without backward; drop every gathered copy."""
        for group in _groups(self.module):
            group.reshard()
            if self._is_held:
                group.unshard()

    @contextmanager
    def _gather_all(self) -> Iterator[None]:
        parts = self._param_groups()
        before = [part.post_forward_mesh_info for part in parts]
        for group in _groups(self.module):
            group.unshard()
        for part in parts:
            part.post_forward_mesh_info = None
        try:
            yield
        finally:
            for part, info in zip(parts, before, strict=True):
                part.post_forward_mesh_info = info
            for group in _groups(self.module):
                group.reshard()

    @contextmanager
    def gathered(self, parameters: list[Any]) -> Iterator[list[Tensor]]:
        yield [parameter.full_tensor() for parameter in parameters]
