"""Sparse Matrix Tuning with Hugging Face's Trainer.

python examples/hf_trainer.py                                              # SmolLM2-135M on word problems, on a CPU too
python examples/hf_trainer.py --resume                                    # go on where it was stopped
python examples/hf_trainer.py --model meta-llama/Llama-3.2-1B --data rows.jsonl --output runs/mine
"""

from pathlib import Path

import peft
import typer
from accelerate import PartialState
from transformers import Trainer, TrainingArguments

import smtune
from smtune.data import Collator, batches, prepare
from smtune.models import load_model, load_tokenizer


def main(
    model: str = "smollm2-135m",
    data: str = "arithmetic",
    output: str = "runs/trainer",
    steps: int = 30,
    resume: bool = False,
):
    tokenizer = load_tokenizer(model)
    rows, report = prepare(data, tokenizer, max_length=256)
    base = load_model(model, device=PartialState().device)  # in fp32, as what is trained
    collate = Collator(tokenizer.pad_token_id)
    print(report)

    config = smtune.SMTConfig(budget=0.0084, task_type="CAUSAL_LM")
    plan_file = Path(output, "plan.json")
    if resume:
        plan = smtune.Plan.load(plan_file)  # a checkpoint fits its own plan alone
    else:
        plan = smtune.make_plan(base, batches(rows, collate, 8, n=10), config)
        plan.save(plan_file)
    smt = peft.get_peft_model(base, config.with_plan(plan))
    smt.print_trainable_parameters()

    arguments = TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_steps=steps,
        save_steps=max(1, steps // 2),
        logging_steps=max(1, steps // 10),
    )
    trainer = Trainer(model=smt, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    smt.save_pretrained(Path(output, "adapter"), is_main_process=trainer.is_world_process_zero())
    print(f"Wrote {output}/adapter. As a plain model: smtune merge {output}/adapter merged/")
    return trainer


if __name__ == "__main__":
    typer.run(main)
