"""Sparse Matrix Tuning with TRL's SFTTrainer.

python examples/trl_sft.py                                                 # SmolLM2-135M on word problems, on a CPU too
python examples/trl_sft.py --model meta-llama/Llama-3.2-1B --data rows.jsonl    # {"prompt", "completion"} on each line
"""

import torch
import typer
from accelerate import PartialState
from datasets import Dataset
from peft.functional import cast_adapter_dtype
from trl import SFTConfig, SFTTrainer

import smtune
from smtune.data import Collator, alpaca_prompt, arithmetic, batches, prepare
from smtune.models import load_model, load_tokenizer


def main(model: str = "smollm2-135m", data: str | None = None, output: str = "runs/sft", steps: int = 30):
    tokenizer = load_tokenizer(model)
    base = load_model(model, device=PartialState().device)  # in fp32, as what is trained
    if data is None:
        rows = Dataset.from_list(
            [{"prompt": alpaca_prompt(row["instruction"]), "completion": row["output"]} for row in arithmetic(400)]
        )
    else:
        rows = Dataset.from_json(data)

    # SFTTrainer takes any PEFT configuration, but cannot score blocks: the plan comes first.
    config = smtune.SMTConfig(budget=0.0084, task_type="CAUSAL_LM")
    encoded, report = prepare(rows.to_list(), tokenizer, max_length=256)
    print(report)
    plan = smtune.make_plan(base, batches(encoded, Collator(tokenizer.pad_token_id), 8, n=10), config)

    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=output,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            max_steps=steps,
            max_length=256,
            logging_steps=max(1, steps // 10),
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=config.with_plan(plan),  # or model=peft.get_peft_model(base, config.with_plan(plan)), without this
    )
    trainer.model.print_trainable_parameters()
    cast_adapter_dtype(trainer.model, "default")  # to fp32, where TRL has made blocks bf16: on a base of bitsandbytes
    trainer.train()
    trainer.save_model(output)
    print(f"Wrote {output}. As a plain model: smtune merge {output} merged/")
    return trainer


if __name__ == "__main__":
    typer.run(main)
