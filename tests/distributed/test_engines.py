"""Two processes under each engine plan, train, save and resume as one process does on the same global batch.

The processes are started by the engines' own launchers and run engines.py: DDP by torchrun, FSDP2 by `accelerate
launch` with examples/configs/fsdp2.yaml, ZeRO by `deepspeed`. FSDP2 and ZeRO-2 are run by default, the others nightly.
Where deepspeed is missing its tests skip, or fail with SMTUNE_REQUIRE_DEEPSPEED=1, as in CI.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import engines
import peft
import pytest
import torch
from engines import BY_PARTS, MODES, WORLD_SIZE
from safetensors.torch import load_file

import smtune
from smtune.training import read_metrics

BY_DEFAULT = ("FSDP2", "ZeRO-2")  # DDP by day is `smtune train --nproc 2`, in test_launch
WHOLE = ("DDP", *BY_DEFAULT, "ZeRO-1", "ZeRO-3", "ZeRO-3 + CPUAdam offload")
ALONE = "one process on the same global batch"


def over(*names: str):
    """Parametrise by engine; what is not run by default is nightly."""
    params = [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.nightly) for name in names]
    return pytest.mark.parametrize("engine", params)


def over_all():
    return over(*WHOLE, *BY_PARTS)


def launcher(engine: str) -> list[str]:
    """The command that starts a script on two processes, as the engine's users do."""
    kind = BY_PARTS.get(engine, engine)
    n, tools = str(WORLD_SIZE), Path(sys.executable).parent
    if kind == "DDP":
        return [str(tools / "torchrun"), "--standalone", "--nproc-per-node", n]
    if kind == "FSDP2":
        config = str(engines.EXAMPLES / "fsdp2.yaml")
        by_rank_0 = ["--fsdp_cpu_ram_efficient_loading", str(engine in BY_PARTS).lower()]
        return [
            *(str(tools / "accelerate"), "launch", "--config_file", config, "--num_processes", n),
            *("--main_process_port", str(engines.free_port()), *by_rank_0),
        ]
    return [str(tools / "deepspeed"), "--num_gpus", n, "--master_port", str(engines.free_port())]


def launch(engine: str, folder: Path) -> list[dict] | str:
    """What each process saw, or what a failed one wrote."""
    if engine.startswith("ZeRO"):
        engines.need_deepspeed()
    done = engines.call([*launcher(engine), engines.__file__, engine, str(folder)], folder)
    if done.returncode:
        return f"{' '.join(done.args)}\n{done.stdout[-6000:]}\n{done.stderr[-12000:]}"
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process on all of the data: the folder of the model and the plans, and what a plain loop and Trainer did."""
    folder = tmp_path_factory.mktemp("alone")
    engines.write_base(folder)
    seen = {}
    for mode in MODES:
        base = engines.load_base(folder)
        plan = smtune.make_plan(base, engines.warmup(), engines.smt_config(mode))
        model = peft.get_peft_model(base, engines.smt_config(mode).with_plan(plan))
        with engines.acting_as(mode):
            seen[mode] = engines.train_by_torch(model), smtune.trained_state_dict(model)
    plan.save(folder / "plan.json")
    with engines.acting_as("resident"):
        engines.by_trainer(engines.recipe(folder, "whole", mode="resident"))
    full = {"method": "full", "model": str(folder / "tied")}
    engines.by_trainer(engines.recipe(folder, "full-float32") | full)
    (folder / "trainer-plan.json").write_bytes((folder / "whole" / "plan.json").read_bytes())
    return folder, plan, seen


@pytest.fixture(scope="module")
def launched():
    return {}


@pytest.fixture
def ranks(engine, alone, launched, tmp_path_factory):
    """(folder, what each process saw) of an engine, started once for all tests."""
    if engine not in launched:
        folder = tmp_path_factory.mktemp("engine")
        for name in ("base", "tied", "rows.jsonl", "plan.json", "trainer-plan.json"):
            (folder / name).symlink_to(alone[0] / name)
        launched[engine] = folder, launch(engine, folder)
    if isinstance(launched[engine][1], str):
        pytest.fail(launched[engine][1])
    return launched[engine]


def assert_same_tensors(state: dict, expected: dict, tolerance: float = 1e-6) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def adapter_of(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.support("Engines", row="{engine}", column="{mode}", against=ALONE)
@pytest.mark.parametrize("mode", MODES)
@over_all()
def test_two_processes_train_as_one(engine, mode, alone, ranks):
    """A plain loop with accumulation, clipping and an evaluation after every micro-batch: losses, norms, blocks."""
    expected, blocks = alone[2][mode]
    first, second = (rank[mode] for rank in ranks[1])
    together = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"])]
    assert together == pytest.approx(expected.losses, rel=1e-6)
    assert first["losses"] != pytest.approx(second["losses"], rel=1e-3)  # the processes saw different rows
    assert min(expected.norms) > engines.CLIP
    assert first["norms"] == pytest.approx(expected.norms, rel=1e-5)
    assert_same_tensors(first["state"], blocks)
    assert not second["state"]
    moved = [tensor.abs().max().item() for name, tensor in blocks.items() if name.endswith("weight")]
    assert min(moved) > 1e-2


@pytest.mark.parametrize("mode", MODES)
@over_all()
def test_an_adapter_is_written_whole(engine, mode, alone, ranks):
    """By `trained_state_dict`, and as the engine's users do; loaded in one process it gives the engine's logits."""
    folder, (first, second) = ranks[0] / mode, (rank[mode] for rank in ranks[1])
    assert_same_tensors(adapter_of(folder / "users"), adapter_of(folder / "adapter"), 0.0)
    model = peft.PeftModel.from_pretrained(engines.load_base(alone[0]), folder / "adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=engines.random_batch(0)).logits
        untrained = engines.load_base(alone[0])(input_ids=engines.random_batch(0)).logits
    torch.testing.assert_close(first["logits"], logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(second["logits"], logits, rtol=0, atol=1e-6)
    assert not torch.allclose(logits, untrained, atol=1e-2)


@over("ZeRO-2", "ZeRO-3")
def test_the_fp32_master_of_bf16_blocks_is_saved(engine, ranks):
    saved, blocks = (ranks[1][0]["bf16"][key] for key in ("saved", "blocks"))
    assert saved.keys() >= blocks.keys()
    for name, block in blocks.items():
        assert block.dtype == torch.bfloat16
        assert saved[name].dtype == torch.float32
        assert torch.equal(saved[name].bfloat16(), block)
        assert (saved[name] != block).any()  # it has bits that bf16 has not


@over("FSDP2")
def test_fp32_blocks_on_a_bf16_base(engine, alone, ranks):
    """Both dtypes are sharded together. One process takes the ranks' rows in turn: bf16 gradients round for each."""
    model = engines.on_bf16(alone[0])
    expected = engines.train_by_torch(model, range(WORLD_SIZE), WORLD_SIZE)
    losses = torch.tensor(expected.losses).unflatten(0, (engines.STEPS, WORLD_SIZE, -1))
    for rank, seen in enumerate(ranks[1]):
        assert seen["bf16 base"]["losses"] == pytest.approx(losses[:, rank].flatten().tolist(), rel=1e-5)
    assert_same_tensors(ranks[1][0]["bf16 base"]["state"], smtune.trained_state_dict(model), 1e-5)


@over(*engines.FULL)
def test_full_fine_tuning_is_saved_whole(engine, alone, ranks):
    """Once where embeddings are tied, and in fp32: of a model that computes in bf16, its master."""
    expected, found = (load_file(path / "full-float32/model/model.safetensors") for path in (alone[0], ranks[0]))
    assert_same_tensors(found, expected)
    assert "lm_head.weight" not in found
    if engine != "DDP":
        folder = ranks[0] / "full-bfloat16" / "model"
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
        for name, tensor in load_file(folder / "model.safetensors").items():
            assert tensor.dtype == torch.float32
            assert (tensor != tensor.bfloat16()).any(), name
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-2)


@pytest.mark.support("Engines", row="{engine}", column="scoring", against="one process that sees all batches")
@over(*WHOLE)
def test_the_plan_is_that_of_one_process(engine, alone, ranks):
    """Each process scored other batches, one of them more, before the engine took the model over."""
    plans = [rank[mode]["plan"] for rank in ranks[1] for mode in MODES]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0]["batches_seen"] == 5
    assert blocks_of(plans[0]) == blocks_of(alone[1].to_dict())
    part = smtune.make_plan(engines.load_base(alone[0]), engines.warmup(0, WORLD_SIZE), engines.smt_config())
    assert blocks_of(part.to_dict()) != blocks_of(alone[1].to_dict())  # one process's share chooses others


def blocks_of(plan: dict) -> list[str]:
    return [module["blocks"] for module in plan["modules"]]


@pytest.mark.support("Engines", row="{engine}", column="scoring, sharded", against="one process that sees all batches")
@over("FSDP2", "ZeRO-3")
def test_scoring_a_sharded_model(engine, alone, ranks):
    first, second = (rank["scoring"] for rank in ranks[1])
    for criterion in ("abs_of_sum", "activation", "weight"):
        base, config = engines.load_base(alone[0]), engines.smt_config(criterion=criterion)
        expected = smtune.make_plan(base, engines.warmup(n=6), config).to_dict()
        assert first[criterion] == second[criterion]
        assert blocks_of(first[criterion]) == blocks_of(expected)
        assert first[criterion]["total_params"] == expected["total_params"]
    assert "as many batches on every rank" in first["failure"]
    assert "more on rank 0" in first["failure"]
    assert "fewer on rank 1" in second["failure"]


@pytest.mark.support("Engines", row="{engine}", column="Trainer", against=ALONE)
@over_all()
def test_trainer_trains_as_one_process(engine, alone, ranks):
    whole, expected = ranks[0] / "whole", alone[0] / "whole"
    assert_same_tensors(adapter_of(whole / "adapter"), adapter_of(expected / "adapter"))
    events, expected_events = (read_metrics(path / "metrics.jsonl") for path in (whole, expected))
    # Of an optimizer that DeepSpeed has made itself, Trainer logs the rate of the next step.
    for key in ("loss", "grad_norm", *["learning_rate"] * ("offload" not in engine)):
        assert [e[key] for e in events] == pytest.approx([e[key] for e in expected_events], rel=1e-5), key
    assert [e["tokens"] for e in events] == [e["tokens"] for e in expected_events]
    assert min(e["grad_norm"] for e in expected_events) > engines.CLIP
    plan, expected_plan = (smtune.Plan.load(path / "plan.json").to_dict() for path in (whole, expected))
    assert blocks_of(plan) == blocks_of(expected_plan)


@pytest.mark.support("Engines", row="{engine}", column="resume", against="the same processes without a stop")
@over_all()
def test_a_resumed_run_ends_as_one_without_a_stop(engine, ranks):
    """To the bit; CPUAdam's powers of β are products until it is resumed, and then one call of pow."""
    whole, resumed = (ranks[0] / output for output in ("whole", "stopped"))
    tolerance = 1e-6 if "offload" in engine else 0.0
    assert_same_tensors(adapter_of(resumed / "adapter"), adapter_of(whole / "adapter"), tolerance)
    timeless = [
        [{k: v for k, v in e.items() if k not in ("elapsed", "tokens_per_second")} for e in read_metrics(path)]
        for path in (resumed / "metrics.jsonl", whole / "metrics.jsonl")
    ]
    assert len(timeless[0]) == len(timeless[1]) == 6
    for event, expected in zip(*timeless):
        assert event == pytest.approx(expected, rel=10 * tolerance, abs=0)


@over("DDP")
def test_rows_in_groups_come_in_the_same_order_when_resumed(engine, ranks):
    whole, resumed = (ranks[0] / output for output in ("grouped", "grouped-stopped"))
    assert_same_tensors(adapter_of(resumed / "adapter"), adapter_of(whole / "adapter"), 0.0)


@over("DDP", "FSDP2")
def test_only_block_gradients_are_reduced(engine, alone, ranks):
    """4 bytes of each block parameter go over the wire in a step, and 4 of every parameter in full fine-tuning."""
    n_all = sum(parameter.numel() for parameter in engines.load_base(alone[0]).parameters())
    assert alone[1].n_params == 9 * 16**2
    for rank in ranks[1]:
        assert rank["bytes"] == {"smt": 4 * padded(alone[1], engine), "full": 4 * n_all}


def padded(plan: smtune.Plan, engine: str) -> int:
    """FSDP2 splits the m blocks of a module evenly, with one of zeros where m is odd."""
    counts = [len(module.rows) for module in plan.modules.values()]
    spare = sum(count % WORLD_SIZE for count in counts) if engine == "FSDP2" else 0
    return (sum(counts) + spare) * plan.block_size**2
