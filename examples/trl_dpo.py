"""Sparse Matrix Tuning with TRL's DPOTrainer: prefer right answers to wrong ones.

python examples/trl_dpo.py                               # a new adapter; its reference is the base model
python examples/trl_dpo.py --adapter runs/sft            # go on with an adapter; its reference is a copy of it
python examples/trl_dpo.py --data pairs.jsonl            # {"prompt", "chosen", "rejected"} on each line
"""

import peft
import torch
import typer
from accelerate import PartialState
from datasets import Dataset
from peft.functional import cast_adapter_dtype
from trl import DPOConfig, DPOTrainer

import smtune
from smtune.data import Collator, alpaca_prompt, arithmetic, batches, prepare
from smtune.models import load_model, load_tokenizer


def word_problems(n):
    problems = [(alpaca_prompt(row["instruction"]), int(row["answer"])) for row in arithmetic(n)]
    return [{"prompt": prompt, "chosen": f"{x}", "rejected": f"{x + 1}"} for prompt, x in problems]


def planned(config, base, rows, tokenizer):
    """The configuration with the blocks that matter most for the chosen answers."""
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    encoded, _ = prepare(answers, tokenizer, max_length=256)
    return config.with_plan(smtune.make_plan(base, batches(encoded, Collator(tokenizer.pad_token_id), 8, n=10), config))


def main(
    model: str = "smollm2-135m",
    data: str | None = None,
    adapter: str | None = None,
    output: str = "runs/dpo",
    steps: int = 30,
):
    tokenizer = load_tokenizer(model)
    base = load_model(model, device=PartialState().device)  # in fp32, as what is trained
    rows = Dataset.from_list(word_problems(400)) if data is None else Dataset.from_json(data)
    if adapter is None:
        policy, config = base, planned(smtune.SMTConfig(budget=0.0084, task_type="CAUSAL_LM"), base, rows, tokenizer)
    else:
        policy, config = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True), None

    arguments = DPOConfig(output, learning_rate=1e-3, max_steps=steps, max_length=256, bf16=torch.cuda.is_available())
    trainer = DPOTrainer(policy, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    cast_adapter_dtype(trainer.model, "default")  # to fp32, where TRL has made blocks bf16: on a base of bitsandbytes
    trainer.train()
    trainer.save_model(output)
    print(f"Wrote {output}. As a plain model: smtune merge {output} merged/")
    return trainer


if __name__ == "__main__":
    typer.run(main)
