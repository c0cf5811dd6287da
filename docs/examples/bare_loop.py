"""A bare training loop. Start it with `python bare_loop.py`, or `torchrun --nproc_per_node 2 bare_loop.py`."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist import Mask, MaskedAdamW
from trace_dist.utils import dist

dist.init_distributed()
device = dist.local_device()
torch.manual_seed(0)  # every rank builds the same model
config = LlamaConfig(
    vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
# Or AutoModelForCausalLM.from_pretrained(...); DDP and fully_shard work too.
model = LlamaForCausalLM(config).to(device)
before = {name: weight.detach().clone() for name, weight in model.named_parameters()}

mask = Mask.random(model, density=0.1, granularity="row", seed=0)  # or Mask.load("masks/task.safetensors")
optimizer = MaskedAdamW(model, mask, lr=1e-2, max_grad_norm=1.0)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)

ids = torch.arange(64, device=device).view(4, 16)[dist.rank() :: dist.world_size()]
for step in range(20):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if dist.is_main() and step % 5 == 4:
        print(f"step {step + 1}: loss {loss.item():.3f}, gradient norm {optimizer.grad_norm:.3f}")

changed = sum(int((weight != before[name]).sum()) for name, weight in model.named_parameters())
if dist.is_main():
    print(f"{changed} entries changed, {mask.num_entries} are masked")
dist.close()
