"""Decoder blocks that share weights, as those of Zamba2."""

from __future__ import annotations

import pytest
import torch
from engine.zamba2 import zamba2_config
from transformers import Zamba2ForCausalLM

from trace_dist import quantize_nf4
from trace_dist.sharding.fsdp2 import refuse_shared


@pytest.mark.parametrize("quantize", [False, True])
def test_fsdp2_would_part_them(quantize: bool) -> None:
    with torch.device("meta"):
        model = Zamba2ForCausalLM(zamba2_config())
    if quantize:
        quantize_nf4(model)
    with pytest.raises(ValueError, match=r"layers\.1\..* and .*layers\.3\..* are one weight in two blocks"):
        refuse_shared(model)
