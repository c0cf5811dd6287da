"""An accelerate loop. Start it with `accelerate launch accelerate_loop.py` (on 2 CPU ranks: `--cpu --num_processes 2`)."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist import Mask, MaskedAdamW

accelerator = Accelerator(gradient_accumulation_steps=2)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config)
before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
mask = Mask.random(model, density=0.1, granularity="element", seed=0, maskable="all")

loader = DataLoader(torch.arange(64).view(4, 16), batch_size=1)
if accelerator.is_fsdp2:  # it shards a model only together with an optimizer, which goes unused
    model, _, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters()), loader)
else:
    model, loader = accelerator.prepare(model, loader)
optimizer = MaskedAdamW(model, mask, lr=1e-2, max_grad_norm=1.0)  # last, and not prepared

for epoch in range(10):
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                optimizer.step()
                optimizer.zero_grad()
    if epoch % 3 == 0:
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

tuned = accelerator.unwrap_model(model).named_parameters()
changed = sum(int((weight.cpu() != before[name]).sum()) for name, weight in tuned)
accelerator.print(f"{changed} entries changed, {mask.num_entries} are masked")
accelerator.end_training()
