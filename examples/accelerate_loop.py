"""Sparse Matrix Tuning in a loop on Accelerate, on one device or several.

python examples/accelerate_loop.py                                         # SmolLM2-135M on word problems, on a CPU too
torchrun --nproc-per-node 4 examples/accelerate_loop.py --model meta-llama/Llama-3.2-1B --data rows.jsonl
"""

import itertools

import peft
import torch
import typer
from accelerate import Accelerator
from torch.utils.data import DataLoader

import smtune
from smtune.data import Collator, batches, prepare
from smtune.models import load_model, load_tokenizer


def main(model: str = "smollm2-135m", data: str = "arithmetic", output: str = "runs/accelerate", steps: int = 30):
    # Processes on CPUs are one run only where Accelerate is told so.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=2)
    tokenizer = load_tokenizer(model)
    rows, report = prepare(data, tokenizer, max_length=256)
    base = load_model(model, device=accelerator.device)  # in fp32, as what is trained
    collate = Collator(tokenizer.pad_token_id)
    accelerator.print(report)

    # Every process scores its share of the batches; all of them get the same plan.
    config = smtune.SMTConfig(budget=0.0084, task_type="CAUSAL_LM")
    share = itertools.islice(
        batches(rows, collate, 4, n=20), accelerator.process_index, None, accelerator.num_processes
    )
    plan = smtune.make_plan(base, share, config)
    smt = peft.get_peft_model(base, config.with_plan(plan))

    trained = [parameter for parameter in smt.parameters() if parameter.requires_grad]
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
    smt, optimizer, loader = accelerator.prepare(smt, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0), loader)
    losses = []
    smt.train()
    passes = (batch for _ in itertools.count() for batch in loader)
    for batch in itertools.islice(passes, 2 * steps):
        with accelerator.accumulate(smt):
            loss = smt(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.print(f"batch {len(losses)}: loss {losses[-1]:.4f}")
    accelerator.unwrap_model(smt).save_pretrained(output, is_main_process=accelerator.is_main_process)
    accelerator.print(f"Wrote {output}. As a plain model: smtune merge {output} merged/")
    return smt, losses


if __name__ == "__main__":
    typer.run(main)
