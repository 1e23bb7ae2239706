"""Sparse Matrix Tuning in a plain PyTorch loop.

python examples/plain_loop.py                                              # SmolLM2-135M on word problems, on a CPU too
python examples/plain_loop.py --model meta-llama/Llama-3.2-1B --data rows.jsonl --output runs/mine
"""

import itertools

import peft
import torch
import typer

import smtune
from smtune.data import Collator, batches, prepare
from smtune.models import load_model, load_tokenizer


def train(model, loader, learning_rate=1e-3):
    """One step a batch, while the learning rate falls linearly to zero. Returns the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(loader))
    losses = []
    model.train()
    for step, batch in enumerate(loader, start=1):
        loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step} of {len(loader)}: loss {losses[-1]:.4f}")
    return losses


def main(model: str = "smollm2-135m", data: str = "arithmetic", output: str = "runs/plain-loop", steps: int = 30):
    tokenizer = load_tokenizer(model)
    rows, report = prepare(data, tokenizer, max_length=256)  # prompts masked: the loss is on the answers
    base = load_model(model, device="cuda" if torch.cuda.is_available() else "cpu")  # in fp32, as what is trained
    collate = Collator(tokenizer.pad_token_id)
    print(report)

    config = smtune.SMTConfig(budget=0.0084, task_type="CAUSAL_LM")
    plan = smtune.make_plan(base, batches(rows, collate, 8, n=10), config)  # scores, selects; base stays as it was
    smt = peft.get_peft_model(base, config.with_plan(plan))
    smt.print_trainable_parameters()

    passes = (batch for k in itertools.count(1) for batch in batches(rows, collate, 8, seed=k))
    losses = train(smt, list(itertools.islice(passes, steps)))
    smt.save_pretrained(output)
    print(f"Wrote {output}. As a plain model: smtune merge {output} merged/")
    return smt, losses


if __name__ == "__main__":
    typer.run(main)
