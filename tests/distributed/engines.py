"""What test_engines.py compares: one model and one recipe, trained by one process and by the processes of an engine.

A launcher starts it as `engines.py ENGINE FOLDER`. It trains every case of the engine, by a plain loop and by
`smtune.training` on Trainer, and leaves in FOLDER what each process saw, and the adapters that the first one wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

import smtune
from smtune import InputError
from smtune.models import skeleton
from smtune.sharded import whole
from smtune.training import parse_config, train, trainer
from smtune.tuner import layer as tuner_layer
from smtune.tuner.layer import SMTLinear

WORLD_SIZE, STEPS, ACCUMULATION = 2, 4, 2
LEARNING_RATE, CLIP = 1e-2, 0.05
EPS = 1e-4
"""Of AdamW. By its default first steps are sign steps, and entries whose gradient is rounding noise go either way."""

MODES = ("resident", "additive")
REQUIRE_DEEPSPEED = "SMTUNE_REQUIRE_DEEPSPEED"
"""Set to 1 (CI does) to turn a test that skips for want of deepspeed into a failure."""

BY_PARTS = {"ZeRO-3, zero.Init": "ZeRO-3", "FSDP2, loaded by rank 0": "FSDP2"}
"""Engines that split the weights while they are loaded: then there is nothing to score with, and the plan is read."""

FULL = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
"""Engines that do full fine-tuning, too."""

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"


# Model and data -------------------------------------------------------------------------------------------------------


def write_base(folder: Path) -> None:
    """A tiny base model, and a file of rows. Called by tests: processes that engines start do not know `tiny_base`."""
    from tiny_base import sums, write_lines, write_tiny_base

    write_tiny_base(folder / "base")
    write_lines(folder / "rows.jsonl", sums(32))
    shutil.copytree(folder / "base", folder / "tied")
    tied = AutoConfig.from_pretrained(folder / "base", tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tied).save_pretrained(folder / "tied")


def load_base(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)


def random_batch(seed: int) -> torch.Tensor:
    """Token ids of 4 rows; a process takes every second one."""
    return torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(seed))


def warmup(rank: int = 0, size: int = 1, n: int = 5) -> list[dict[str, torch.Tensor]]:
    """The process's share of n batches: different ones, and with 5 not equally many."""
    return [{"input_ids": random_batch(100 + k), "labels": random_batch(100 + k)} for k in range(rank, n, size)]


def smt_config(mode: str = "auto", criterion: str = "abs_of_sum") -> smtune.SMTConfig:
    targets = ["q_proj", "k_proj", "v_proj"]
    return smtune.SMTConfig(
        target_modules=targets,
        block_size=16,
        budget=9,
        policy="global",  # tells other scores by other blocks
        warmup_steps=10,
        mode=mode,
        criterion=criterion,
    )


# Plain loops ----------------------------------------------------------------------------------------------------------


class Seen:
    """What a process saw of a training.

    Each micro-batch is followed by an evaluation, which no engine may take for a step.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def evaluate(self, model, ids: torch.Tensor) -> None:
        with torch.no_grad():
            self.losses.append(model(input_ids=ids, labels=ids).loss.item())


def micro_batches(step: int, rank: int, size: int) -> list[torch.Tensor]:
    return [random_batch(ACCUMULATION * step + k)[rank::size] for k in range(ACCUMULATION)]


def make_optimizer(model, kind=torch.optim.AdamW):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kind(trained, lr=LEARNING_RATE, eps=EPS, weight_decay=0.0)


def train_by_torch(model, ranks: Sequence[int] = (0,), size: int = 1) -> Seen:
    """One process, with the rows of some ranks in turn, or DDP."""
    seen, optimizer = Seen(), make_optimizer(model)
    for step in range(STEPS):
        batches = [ids for rank in ranks for ids in micro_batches(step, rank, size)]
        for ids in batches:
            adds_up = ids is not batches[-1] and hasattr(model, "no_sync")
            with model.no_sync() if adds_up else nullcontext():
                (model(input_ids=ids, labels=ids).loss / len(batches)).backward()
            seen.evaluate(model, ids)
        seen.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


def train_by_accelerate(accelerator, model, optimizer) -> Seen:
    seen = Seen()
    for step in range(STEPS):
        for ids in micro_batches(step, accelerator.process_index, accelerator.num_processes):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    seen.norms.append(getattr(norm, "full_tensor", lambda norm=norm: norm)().item())
                seen.evaluate(model, ids)
                optimizer.step()
                optimizer.zero_grad()
    return seen


def train_by_deepspeed(engine) -> Seen:
    seen = Seen()
    for step in range(STEPS):
        for ids in micro_batches(step, dist.get_rank(), dist.get_world_size()):
            loss = engine(input_ids=ids, labels=ids).loss
            seen.evaluate(engine, ids)
            engine.backward(loss)
            engine.step()
        seen.norms.append(float(engine.get_global_grad_norm()))
    return seen


def zero_config(engine: str) -> dict:
    stage = int(engine.removeprefix("ZeRO-")[0])
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # else small weights are never split
    if "offload" in engine:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


# Cases ----------------------------------------------------------------------------------------------------------------


@contextmanager
def acting_as(mode: str):
    """Fail if a resident layer acts beside its weight, as one does whose weight is not here, or no additive layer does.

    The two agree to rounding, so results do not tell them apart.
    """
    original, calls = tuner_layer.additive_block_linear, []

    def additive_block_linear(*args, **kwargs):
        assert mode == "additive", "a layer that should be resident acted beside its weight"
        calls.append(None)
        return original(*args, **kwargs)

    tuner_layer.additive_block_linear = additive_block_linear
    try:
        yield
    finally:
        tuner_layer.additive_block_linear = original
    assert calls or mode != "additive", "no layer acted beside its weight"


def plan_for(engine: str, folder: Path, base, mode: str) -> smtune.Plan:
    if engine in BY_PARTS:
        return smtune.Plan.load(folder / "plan.json")
    return smtune.make_plan(base, warmup(dist.get_rank(), WORLD_SIZE), smt_config(mode))


def finish(folder: Path, case: str, model, runs, seen: Seen, plan: smtune.Plan, users: dict | None) -> dict:
    """Save the adapter, by `trained_state_dict` and as the engine's users do, and collect what was seen.

    Args:
        model: the PeftModel. runs: what is called, the engine's wrapper. users: the state dict of the engine's own
            making; None where `save_pretrained` needs none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SMTLinear)]
    assert layers
    assert all(layer.resident == (case == "resident") for layer in layers)
    runs.eval()
    with torch.no_grad():
        logits = runs(input_ids=random_batch(0)).logits
    state = smtune.trained_state_dict(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / case / "adapter", state_dict=state)
        model.save_pretrained(folder / case / "users", state_dict=users)
    return {"logits": logits, "losses": seen.losses, "norms": seen.norms, "plan": plan.to_dict(), "state": state}


def run_ddp(engine: str, folder: Path, mode: str) -> dict:
    from torch.nn.parallel import DistributedDataParallel

    base = load_base(folder)
    plan = plan_for(engine, folder, base, mode)
    model = DistributedDataParallel(peft.get_peft_model(base, smt_config(mode).with_plan(plan)))
    seen = train_by_torch(model, [dist.get_rank()], WORLD_SIZE)
    return finish(folder, mode, model.module, model, seen, plan, None)


def run_fsdp2(engine: str, folder: Path, mode: str) -> dict:
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    reads = engine not in BY_PARTS or dist.get_rank() == 0
    base = load_base(folder) if reads else skeleton(str(folder / "base"), "float32", buffers=True)
    assert all(parameter.is_meta != reads for parameter in base.parameters())
    plan = plan_for(engine, folder, base, mode)
    model = peft.get_peft_model(base, smt_config(mode).with_plan(plan))
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    seen = train_by_accelerate(accelerator, model, optimizer)
    return finish(folder, mode, model, model, seen, plan, accelerator.get_state_dict(model))


def run_zero(engine: str, folder: Path, mode: str) -> dict:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config = zero_config(engine)
    alive = HfDeepSpeedConfig(config) if engine in BY_PARTS else None
    base = load_base(folder)
    assert all(hasattr(parameter, "ds_id") == (alive is not None) for parameter in base.parameters())
    plan = plan_for(engine, folder, base, mode)
    by_itself = "auto" if alive is not None and mode == "additive" else mode  # as it becomes for weights in parts
    model = peft.get_peft_model(base, smt_config(by_itself).with_plan(plan))
    kind = deepspeed.ops.adam.DeepSpeedCPUAdam if "offload" in engine else torch.optim.AdamW
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, kind), config=config)
    if "ZeRO-3" in engine:
        assert all(parameter.numel() == 0 for parameter in model.parameters())
    seen = train_by_deepspeed(wrapped)
    whole = "ZeRO-3" not in engine
    users = None if whole else wrapped._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    result = finish(folder, mode, model, wrapped, seen, plan, users)
    wrapped.destroy()
    return result


def on_bf16(folder: Path):
    """A bf16 base with resident blocks, which are fp32."""
    plan = smtune.Plan.load(folder / "plan.json")
    return peft.get_peft_model(load_base(folder, torch.bfloat16), smt_config("resident").with_plan(plan))


def run_on_bf16(folder: Path) -> dict:
    """FSDP2, which shards both dtypes together."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    model = on_bf16(folder)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.float32}
    seen = train_by_accelerate(accelerator, model, optimizer)
    return {"losses": seen.losses, "state": smtune.trained_state_dict(model)}


def run_in_bf16(engine: str, folder: Path) -> dict:
    """DeepSpeed's bf16, which makes the blocks bf16 with an fp32 master: what is saved, and what the model has."""
    import deepspeed

    model = peft.get_peft_model(load_base(folder), smt_config().with_plan(smtune.Plan.load(folder / "plan.json")))
    config = zero_config(engine) | {"bf16": {"enabled": True}}
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
    train_by_deepspeed(wrapped)
    blocks = {name: whole(p).to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    result = {"saved": smtune.trained_state_dict(model), "blocks": blocks}
    wrapped.destroy()
    return result


def score_sharded(engine: str, folder: Path) -> dict:
    """Plans by scoring a base whose weights are sharded, and what unequal numbers of batches lead to."""
    base = load_base(folder)
    if engine == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        for layer in base.model.layers:
            fully_shard(layer)
        fully_shard(base)
    else:
        import deepspeed

        config = {**zero_config(engine), "gradient_accumulation_steps": 1}
        deepspeed.initialize(model=base, config=config)
    share = partial(warmup, dist.get_rank(), WORLD_SIZE)
    result = {
        criterion: smtune.make_plan(base, share(n=6), smt_config(criterion=criterion)).to_dict()
        for criterion in ("abs_of_sum", "activation", "weight")
    }
    try:
        smtune.make_plan(base, share(n=5), smt_config())
    except InputError as error:
        result["failure"] = str(error)
    return result


# Bytes ----------------------------------------------------------------------------------------------------------------


class Reduced(TorchDispatchMode):
    """Bytes of the tensors that FSDP2 reduces over processes, in fp32 as they are handed over."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "reduce" in function._schema.name:
            inputs = args[1] if "reduce_scatter" in function._schema.name else args[0]
            self.bytes += sum(tensor.nbytes for tensor in (inputs if isinstance(inputs, (list, tuple)) else [inputs]))
        return function(*args, **(kwargs or {}))


def bytes_reduced(engine: str, folder: Path, method: str) -> int:
    """Bytes of gradients that DDP, over two accumulated micro-batches, or FSDP2 hands over to be added up in a step."""
    base, ids = load_base(folder), random_batch(0)[dist.get_rank() :: WORLD_SIZE]
    plan = smtune.Plan.load(folder / "plan.json")
    model = base if method == "full" else peft.get_peft_model(base, smt_config("resident").with_plan(plan))
    if engine == "DDP":
        from torch.nn.parallel import DistributedDataParallel

        wrapped, seen = DistributedDataParallel(model), []

        def hook(state, bucket):
            seen.append(bucket.buffer().nbytes)
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, hook)
        with wrapped.no_sync():
            wrapped(input_ids=ids, labels=ids).loss.backward()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        return sum(seen)
    from torch.distributed.fsdp import fully_shard

    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with Reduced() as reduced:
        model(input_ids=ids, labels=ids).loss.backward()
    return reduced.bytes


# Trainer --------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for a kill."""


class StopAt(TrainerCallback):
    def __init__(self, step=3):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def recipe(folder: Path, output: str, processes: int = 1, mode: str = "auto", **training) -> dict:
    """6 steps of 8 rows, whatever the number of processes, with a checkpoint after 2 and 4."""
    return {
        "model": str(folder / "base"),
        "output": str(folder / output),
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "smt": {"block_size": 16, "budget": 9, "warmup_steps": 5, "score_batch_size": 4, "mode": mode},
        "training": {
            "learning_rate": LEARNING_RATE,
            "max_steps": 6,
            "batch_size": 4 // processes,
            "gradient_accumulation_steps": ACCUMULATION,
            "max_grad_norm": CLIP,
            "logging_steps": 1,
            "save_steps": 2,
            **training,
        },
    }


def by_trainer(values: dict, **options):
    """`smtune.training.train` with AdamW's eps set, which recipes leave alone."""
    original = trainer.TrainingArguments
    trainer.TrainingArguments = partial(original, adam_epsilon=EPS)
    try:
        return train(parse_config(values), console=Console(quiet=True), **options)
    finally:
        trainer.TrainingArguments = original


@contextmanager
def wrapped_by(engine: str):
    """Fail unless every step of Trainer is one of this engine: DDP, to which it could fall back, trains the same."""
    original, seen = trainer.RecipeTrainer.training_step, set()

    def training_step(self, model, *args, **kwargs):
        seen.add(engine_of(model))
        return original(self, model, *args, **kwargs)

    trainer.RecipeTrainer.training_step = training_step
    try:
        yield
    finally:
        trainer.RecipeTrainer.training_step = original
    assert seen == {engine}, f"Trainer trained by {seen}"


def engine_of(model) -> str:
    """What has wrapped a model: "DDP", "FSDP2", "ZeRO-1" and so on, or "none"."""
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    if hasattr(model, "zero_optimization_stage"):
        return f"ZeRO-{model.zero_optimization_stage()}"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "FSDP2"
    return "DDP" if isinstance(model, DistributedDataParallel) else "none"


def run_trainer(engine: str, folder: Path) -> None:
    """A whole run, one that is stopped after step 3 and resumed from the checkpoint of step 2, and full fine-tuning."""
    training = {}
    if engine.startswith("ZeRO"):
        config = json.loads((EXAMPLES / ("zero3-offload.json" if "offload" in engine else "zero3.json")).read_text())
        config["zero_optimization"] |= zero_config(engine)["zero_optimization"]
        training["deepspeed"] = config
    if engine == "FSDP2":
        training["fsdp"] = {}  # its checkpoints are whole; those of fsdp2.yaml, and so of "loaded by rank 0", sharded
    values = partial(recipe, folder, processes=WORLD_SIZE, **training)  # "auto": resident, also when resumed
    for output in ("whole", "stopped"):
        config = values(output)
        if engine in BY_PARTS:
            config["smt"] = {"mode": "resident", "plan": str(folder / "trainer-plan.json")}
        if output == "whole":
            by_trainer(config)
            continue
        try:
            by_trainer(config, callbacks=[StopAt()])
        except Stop:
            dist.barrier()
        by_trainer(config, resume=True)
    if engine == "DDP":  # an epoch has four steps: the second one is stopped and resumed within
        grouped = partial(values, group_by_length=True, max_steps=8, save_steps=3)
        by_trainer(grouped("grouped"))
        try:
            by_trainer(grouped("grouped-stopped"), callbacks=[StopAt(7)])
        except Stop:
            dist.barrier()
        by_trainer(grouped("grouped-stopped"), resume=True)
    if engine in FULL:
        # TrainingArguments refuses bf16 where there is no GPU, unless told to use the CPU, which DeepSpeed's are not.
        with mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True):
            for dtype in ("float32", "bfloat16") if engine != "DDP" else ("float32",):
                config = values(f"full-{dtype}") | {"method": "full", "dtype": dtype, "model": str(folder / "tied")}
                if dtype == "bfloat16":  # what is saved has just been evaluated
                    config["data"] = config["data"] | {"validation": config["data"]["train"]}
                by_trainer(config)


# Processes ------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def need_deepspeed() -> None:
    """Skip the test where deepspeed is missing; fail it where it was said to be there."""
    if find_spec("deepspeed") is not None:
        return
    if os.environ.get(REQUIRE_DEEPSPEED) == "1":
        pytest.fail(f"deepspeed is not installed, but {REQUIRE_DEEPSPEED}=1")
    pytest.skip("needs deepspeed: pip install -e '.[distributed]'")


def call(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a launcher on CPUs, one thread a process. All that it has started ends after 20 minutes, or with the test."""
    tools = str(Path(sys.executable).parent)  # where launchers look for python, and deepspeed for ninja
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": str(WORLD_SIZE),  # how many devices deepspeed sees on CPUs
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }
    options: dict = {"env": environment, "cwd": folder, "text": True, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            output, errors = process.communicate(timeout=1200)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def let_accelerate_shard_on_cpus() -> None:
    """Accelerate shards over processes only where they have accelerators; here CPUs pass for those."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

    def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend


def main(engine: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kind = BY_PARTS.get(engine, engine)
    if kind == "FSDP2":
        let_accelerate_shard_on_cpus()
    if kind.startswith("ZeRO"):
        import deepspeed

        # Its sums over the processes of one machine, which it would compile for a minute: gloo's are the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
        run_one = run_zero
    else:
        dist.init_process_group("gloo")
        run_one = run_ddp if engine == "DDP" else run_fsdp2
    results = {}
    for mode in MODES:
        with acting_as(mode):
            results[mode] = run_one(engine, folder, mode)
    with acting_as("resident"):
        if engine in ("FSDP2", "ZeRO-3"):
            results["scoring"] = score_sharded(engine, folder)
        if engine in ("ZeRO-2", "ZeRO-3"):
            results["bf16"] = run_in_bf16(engine, folder)
        if engine == "FSDP2":
            results["bf16 base"] = run_on_bf16(folder)
        if engine in ("DDP", "FSDP2"):
            results["bytes"] = {method: bytes_reduced(engine, folder, method) for method in ("smt", "full")}
        with wrapped_by(BY_PARTS.get(engine, engine).removesuffix(" + CPUAdam offload")):
            run_trainer(engine, folder)
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(arguments[0], Path(arguments[1]))
