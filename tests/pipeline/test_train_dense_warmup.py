"""`smt.dense_warmup_steps`: every weight is trained first, and kept; then blocks are chosen and trained. It ends in a
whole model, against loops written out here, and a stopped run ends with the same bits."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from runs import STEPS, Stop, StopAt, same, tensors_of, trained_tensors, untimed, write_config
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import smtune
from smtune import InputError
from smtune.data import prepare
from smtune.models import load_model, load_tokenizer
from smtune.training import dry_run, read_metrics, run, select_plan, train
from smtune.training.folder import RunFolder

SIZE, BUDGET, WARMUP_STEPS = 16, 12, 4
SMT = f"smt={{block_size: {SIZE}, budget: {BUDGET}, dense_warmup_steps: {WARMUP_STEPS}}}"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Batches(TrainerCallback):
    """Records what the model is given in training, and its losses."""

    def __init__(self):
        self.batches, self.losses = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def hook(module, args, kwargs, output):
            self.batches.append({name: kwargs[name].clone() for name in ("input_ids", "attention_mask", "labels")})
            self.losses.append(output.loss.item())

        model.register_forward_hook(hook, with_kwargs=True)


def padded(rows):
    """Rows to one batch, padded on the right to their longest."""
    longest = max(len(row["input_ids"]) for row in rows)

    def of(name, fill):
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    return {
        "input_ids": of("input_ids", 0),
        "labels": of("labels", -100),
        "attention_mask": of("labels", -200).ne(-200),
    }


def loss_of(model, batch):
    """The mean over all labels of the batch, from the logits."""
    mask = batch["attention_mask"].long()
    logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def clip_(gradients, limit):
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_(min(1.0, limit / (norm.item() + 1e-6)))


def full_steps(model, batches, learning_rate):
    """Full fine-tuning, a step for each batch. Returns the losses and the sum of each weight's gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses, sums = [], {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad
        clip_([parameter.grad for parameter in model.parameters()], 1.0)
        optimizer.step()
    return losses, sums


def best_blocks(sums):
    """(name, row, column) of the blocks with the largest mean |Σ gradient|."""
    scored = []
    for name, gradient in sums.items():
        if name.removesuffix(".weight").endswith(PROJECTIONS):
            for row in range(0, gradient.shape[0], SIZE):
                for column in range(0, gradient.shape[1], SIZE):
                    block = gradient[row : row + SIZE, column : column + SIZE]
                    scored.append((block.abs().mean().item(), name, row, column))
    return {block for _, *block_ in sorted(scored)[-BUDGET:] for block in [tuple(block_)]}


def block_steps(model, batches, blocks, learning_rate):
    """Training of blocks by masked dense gradients. Returns the losses."""
    masks = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name in {b[0] for b in blocks}}
    for name, row, column in blocks:
        masks[name][row : row + SIZE, column : column + SIZE] = 1.0
    weights = {name: dict(model.named_parameters())[name] for name in masks}
    optimizer = torch.optim.AdamW(weights.values(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for batch in batches:
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        for name, weight in weights.items():
            weight.grad *= masks[name]
        clip_([weight.grad for weight in weights.values()], 1.0)
        optimizer.step()
    return losses


@pytest.fixture(scope="module")
def whole(base, rows, tmp_path_factory):
    """A run that is not stopped."""
    config = write_config(tmp_path_factory.mktemp("whole"), base, rows, SMT, "training.logging_steps=1")
    return train(config, console=Console(quiet=True))


def scoring_of(config):
    return json.loads(RunFolder(config.output).scoring.read_text())


def test_it_equals_a_loop_written_out(configure, quiet, base, rows):
    step_of_four = ["training.batch_size=4", "training.gradient_accumulation_steps=1"]
    constant = ["training.schedule=constant", "training.warmup_steps=0", "training.learning_rate=1e-3"]
    config = configure(SMT, "smt.policy=global", "smt.dense_warmup_learning_rate=3e-3", *step_of_four, *constant)
    seen = Batches()
    train(config, console=quiet, callbacks=[seen])

    model = LlamaForCausalLM.from_pretrained(base, dtype="float32").train()
    dataset, _ = prepare(str(rows), load_tokenizer(str(base)), max_length=64)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    warm_up = [padded([dataset[row] for row in order[k : k + 4]]) for k in range(0, 4 * WARMUP_STEPS, 4)]
    losses, sums = full_steps(model, warm_up, 3e-3)
    assert scoring_of(config)["dense_warmup"]["losses"] == pytest.approx(losses, abs=1e-6)

    blocks = best_blocks(sums)
    plan = smtune.Plan.load(RunFolder(config.output).plan)
    chosen = {(f"{name}.weight", SIZE * r, SIZE * c) for name in plan.modules for r, c in plan.index(name).pairs}
    assert chosen == blocks
    assert plan.batches_seen == WARMUP_STEPS

    assert len(seen.batches) == STEPS
    losses = block_steps(model, seen.batches, blocks, 1e-3)
    assert seen.losses == pytest.approx(losses, abs=1e-6)
    assert losses[-1] < losses[0]
    trained = load_model(config.output)
    apart = [(p - expected).abs().flatten() for p, expected in zip(trained.parameters(), model.parameters())]
    apart = torch.cat(apart)
    assert apart.max() < 2e-5  # a fiftieth of one step: AdamW divides rounding by gradients that are all but zero
    assert (apart < 1e-6).float().mean() > 0.999


def test_a_step_takes_the_rows_of_a_training_step(configure, quiet):
    """2 batches of 2 rows are 1 batch of 4, by the mean over their labels; 8 steps of 4 go over the 24 rows again."""
    losses = []
    for batch_size in (1, 2, 4):
        sizes = [f"training.batch_size={batch_size}", f"training.gradient_accumulation_steps={4 // batch_size}"]
        config = configure(
            SMT.replace(f"steps: {WARMUP_STEPS}", "steps: 8"), *sizes, "training.max_steps=1", output=f"run{batch_size}"
        )
        train(config, console=quiet)
        losses.append(scoring_of(config)["dense_warmup"]["losses"])
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_it_ends_in_a_whole_model(configure, quiet, base):
    config = configure(SMT)
    result = train(config, console=quiet)
    folder = RunFolder(config.output)
    assert not (folder.path / "adapter").exists()
    plain = AutoModelForCausalLM.from_pretrained(result.trained, dtype="float32")
    assert same(plain.state_dict(), load_model(result.folder).state_dict())
    assert load_tokenizer(result.folder).eos_token == "<end>"

    started, warmed, ended = (tensors_of(place) for place in (base, folder.warmed, result.trained))
    assert started.keys() == warmed.keys() == ended.keys()
    plan = smtune.Plan.load(folder.plan)
    for name, before in warmed.items():
        assert not torch.equal(before, started[name])
        changed = ended[name] != before
        mask = torch.zeros_like(changed)
        module = name.removesuffix(".weight")
        for row, column in plan.index(module).pairs if module in plan.modules else ():
            mask[SIZE * row : SIZE * (row + 1), SIZE * column : SIZE * (column + 1)] = True
        assert not changed[~mask].any(), name
        assert changed[mask].float().mean() > 0.9 or not mask.any()

    assert (result.dense_warmup_steps, result.steps) == (WARMUP_STEPS, STEPS)
    assert result.trainable_parameters == BUDGET * SIZE**2
    assert json.loads(folder.result.read_text())["dense_warmup_steps"] == WARMUP_STEPS
    assert scoring_of(config)["dense_warmup"]["learning_rate"] == config.resolved().training.learning_rate == 1e-2
    card = (folder.trained(config) / "README.md").read_text()
    assert f"{WARMUP_STEPS} of full fine-tuning" in card
    assert "no adapter" in card
    here = str(folder.path.parent)
    assert all(here not in file.read_text() for file in folder.trained(config).glob("*.json"))


def test_bfloat16_is_of_the_frozen_weights_alone(configure, quiet):
    logits = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}

        def on_train_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                logits.append(model.eval()(input_ids=torch.arange(12).view(1, 12)).logits)

    config = configure(SMT, "dtype=bfloat16")
    result = train(config, console=quiet, callbacks=[Look()])
    assert {tensor.dtype for tensor in tensors_of(RunFolder(config.output).warmed).values()} == {torch.float32}
    assert {tensor.dtype for tensor in trained_tensors(result).values()} == {torch.bfloat16}
    with torch.no_grad():
        saved = load_model(result.folder, "bfloat16")(input_ids=torch.arange(12).view(1, 12)).logits
    assert torch.equal(saved, logits[0])


@pytest.mark.parametrize("criterion", ["sum_of_abs", "random"])
def test_other_criteria(configure, quiet, criterion):
    config = configure(SMT, f"smt.criterion={criterion}")
    result = train(config, console=quiet)
    plan = smtune.Plan.load(RunFolder(result.folder).plan)
    assert (plan.criterion, plan.n_blocks) == (criterion, BUDGET)
    assert plan.batches_seen == (0 if criterion == "random" else WARMUP_STEPS)


STOPS = {
    "in the warm-up": (run, "_say_step", 2),
    "while the warmed model is written": (LlamaForCausalLM, "save_pretrained", 1),
    "before the plan": (smtune.Plan, "save", 1),
    "before training": (run, "wrap", 1),
    "while the model is written": (PreTrainedTokenizerFast, "save_pretrained", 1),
}


@pytest.mark.nightly
@pytest.mark.parametrize("stop", [*STOPS, "in training"])
def test_a_stopped_run_ends_with_the_same_bits(configure, quiet, whole, monkeypatch, stop):
    config = configure(SMT, "training.logging_steps=1")
    with monkeypatch.context() as patch:
        if stop in STOPS:
            owner, name, call = STOPS[stop]
            die_at(patch, owner, name, call)
        with pytest.raises(Stop):
            train(config, console=quiet, callbacks=[StopAt(5)] if stop == "in training" else [])
    folder = RunFolder(config.output)
    assert not folder.is_finished
    if stop not in ("in the warm-up", "while the warmed model is written", "before the plan"):
        monkeypatch.setattr(run, "warm_up", lambda *args: pytest.fail("warmed up again"))
    resumed = train(config, resume=True, console=quiet)
    monkeypatch.undo()

    assert same(trained_tensors(resumed), trained_tensors(whole))
    assert untimed(folder.metrics) == untimed(RunFolder(whole.folder).metrics)
    assert len(read_metrics(folder.metrics)) == STEPS
    left, right = (json.loads(RunFolder(one.folder).scoring.read_text())["dense_warmup"] for one in (resumed, whole))
    assert left == right
    assert train(config, resume=True, console=quiet) == resumed


def die_at(patch, owner, name, call):
    """The call-th call of a function stops the run, after it has done its work."""
    calls, original = 0, getattr(owner, name)

    def die(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        if calls == call:
            raise Stop
        return result

    patch.setattr(owner, name, die)


def test_a_warmed_model_that_is_gone_is_made_again(configure, quiet, whole):
    config = configure(SMT)
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(1)])
    shutil.rmtree(RunFolder(config.output).warmed)
    result = train(config, resume=True, console=quiet)
    assert same(trained_tensors(result), trained_tensors(whole))


def test_checkpointed_activations_change_nothing_but_memory(configure, quiet, whole, attention_runs):
    saving = train(configure(SMT, "training.gradient_checkpointing=true"), console=quiet)
    # Of 2 layers, in 2 batches a step, once for the forward and once for the backward.
    assert len(attention_runs) == 2 * 2 * 2 * (WARMUP_STEPS + STEPS)
    left, right = trained_tensors(whole), trained_tensors(saving)
    for name in left:
        torch.testing.assert_close(left[name], right[name])


def test_a_dry_run_foresees_it(configure, quiet, tmp_path):
    config = configure(SMT)
    plan = dry_run(config)
    assert not (tmp_path / "run").exists()
    result = train(config, console=quiet)
    assert {name.rstrip("/") for name in plan.writes} == {path.name for path in (tmp_path / "run").iterdir()}
    assert (plan.trainable_parameters, plan.scoring_batches) == (result.trainable_parameters, WARMUP_STEPS)
    console = Console(width=200, file=io.StringIO())
    console.print(plan)
    assert f"a dense warm-up: {WARMUP_STEPS} steps of 4 rows train every weight" in console.file.getvalue()


@pytest.mark.parametrize(("rate", "is_remarked"), [("null", True), ("2e-5", False)])
def test_a_rate_for_blocks_is_no_rate_for_all_weights(configure, rate, is_remarked):
    config = configure(SMT, "training.learning_rate=3e-3", f"smt.dense_warmup_learning_rate={rate}")
    remarks = dry_run(config).remarks
    assert any("dense_warmup_learning_rate is 0.003, and trains every" in each for each in remarks) == is_remarked


def test_what_it_says(configure, capsys):
    train(configure(SMT, "training.logging_steps=2"), console=Console(width=200))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dense warm-up")]
    assert [line.split("  loss")[0] for line in lines] == ["dense warm-up, step 2/4", "dense warm-up, step 4/4"]


def test_what_is_refused_before_the_weights_are_read(configure, quiet, base, tmp_path, monkeypatch):
    quantised = tmp_path / "quantised"  # a checkpoint without weights: nobody comes to read them
    shutil.copytree(base, quantised, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((quantised / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(values))
    config = configure(SMT, f"model={quantised}")
    for start in (lambda: dry_run(config), lambda: train(config, console=quiet)):
        with pytest.raises(InputError, match=r"is quantised \(bitsandbytes\): choose another model"):
            start()
    config = configure(f"model={quantised}", method="full")
    for start in (lambda: dry_run(config), lambda: train(config, console=quiet)):
        with pytest.raises(InputError, match="method: expected a model whose weights can all be trained"):
            start()

    with pytest.raises(InputError, match="weights that are not kept"):
        select_plan(configure(SMT), quiet)
    for engine in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{engine}", "true")
            for start in (lambda: dry_run(configure(SMT)), lambda: train(configure(SMT), console=quiet)):
                with pytest.raises(InputError, match="a launcher that asks for DeepSpeed or FSDP"):
                    start()
    assert not (tmp_path / "run").exists()


def test_a_warm_up_that_diverges_says_what_to_do(configure, quiet):
    config = configure(SMT, "smt.dense_warmup_learning_rate=1e30", "training.max_grad_norm=0")
    with pytest.raises(InputError, match="lower the learning rate of the dense warm-up"):
        train(config, console=quiet)
