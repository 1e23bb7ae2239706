"""Sparse Matrix Tuning as a LightningModule. Needs `pip install lightning`.

python examples/lightning_module.py                                        # SmolLM2-135M on word problems, on a CPU too
python examples/lightning_module.py --model meta-llama/Llama-3.2-1B --data rows.jsonl --output runs/mine
"""

import lightning
import peft
import torch
import typer
from torch.utils.data import DataLoader

import smtune
from smtune.data import Collator, batches, prepare
from smtune.models import load_model, load_tokenizer


class FineTuning(lightning.LightningModule):
    def __init__(self, model, learning_rate=1e-3):
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def training_step(self, batch, batch_number):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)


def main(model: str = "smollm2-135m", data: str = "arithmetic", output: str = "runs/lightning", steps: int = 30):
    tokenizer = load_tokenizer(model)
    rows, report = prepare(data, tokenizer, max_length=256)
    base = load_model(model, device="cuda" if torch.cuda.is_available() else "cpu")  # in fp32, as what is trained
    collate = Collator(tokenizer.pad_token_id)
    print(report)

    config = smtune.SMTConfig(budget=0.0084, task_type="CAUSAL_LM")
    plan = smtune.make_plan(base, batches(rows, collate, 8, n=10), config)
    smt = peft.get_peft_model(base, config.with_plan(plan)).train()
    smt.print_trainable_parameters()

    # On several devices Lightning runs this file once for each: make the plan before, in one process, and load it here.
    trainer = lightning.Trainer(
        devices=1, max_steps=steps, gradient_clip_val=1.0, default_root_dir=output, log_every_n_steps=1
    )
    trainer.fit(FineTuning(smt), DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate))
    smt.save_pretrained(output)
    print(f"Wrote {output}. As a plain model: smtune merge {output} merged/")
    return smt, trainer


if __name__ == "__main__":
    typer.run(main)
