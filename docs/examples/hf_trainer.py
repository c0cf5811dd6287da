"""transformers' Trainer. Start it with `python hf_trainer.py` on one GPU, or `torchrun --nproc_per_node 2 hf_trainer.py`."""

import tempfile

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from trace_dist import Mask, MaskedAdamW

with tempfile.TemporaryDirectory() as folder:
    # First of all, as it joins the other ranks.
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=20,
        lr_scheduler_type="cosine",
        logging_steps=5,
        save_steps=10,  # trainer.train(resume_from_checkpoint=True) continues, on any number of ranks
        report_to=[],
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(arguments.device)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    mask = Mask.random(model, density=0.1, granularity="element", seed=0)
    # The optimizer clips: Trainer sees no dense gradient.
    optimizer = MaskedAdamW(model, mask, lr=1e-2, max_grad_norm=1.0)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(64).view(4, 16).tolist()]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=default_data_collator,
        optimizers=(optimizer, None),  # Trainer makes the schedule
    )
    trainer.train()

changed = sum(int((weight != before[name]).sum()) for name, weight in model.named_parameters())
if trainer.is_world_process_zero():
    print(f"{changed} entries changed, {mask.num_entries} are masked")
