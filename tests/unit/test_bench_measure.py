"""What `smtune bench` counts and how it takes turns, on a tiny Llama."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smtune import InputError
from smtune.bench import arms, measure, probes, request, run, suites
from smtune.bench.arms import BUILDERS, FURTHER, Arm, Setting
from smtune.bench.plans import paper_share, random_plan, used_columns
from smtune.bench.process import Child, ChildError
from smtune.bench.request import Request, jobs
from smtune.bench.results import Results
from smtune.bench.run import How, groups, run_series
from smtune.bench.sift import SparseEntries, sift
from smtune.bench.subjects import attention_inputs, find_subject
from smtune.bench.turns import pair, turns
from smtune.bench.worker import Worker
from smtune.kernels.candidates import CANDIDATES
from smtune.report.benchmarks.page import page
from smtune.tuner.layer import SMTLinear

RIVAL = str(Path(__file__).parents[2] / "benchmarks" / "appendix_a.py")
TOKENS = 64
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # SHiRA's
SUBJECT = find_subject("llama-64x2")
ITEMSIZE = {"float32": 4, "bfloat16": 2}


def build(name: str, dtype: str = "float32", **options) -> tuple[Arm, dict[str, torch.Tensor]]:
    model = SUBJECT.load(dtype)
    batch = SUBJECT.inputs(model, TOKENS)
    return arms.build(name, Setting(SUBJECT, dtype, rival=RIVAL, **options), model, batch), batch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*BUILDERS, "smt-at-use", "smt-after-step"])
def test_every_arm_is_built_and_steps(name, dtype):
    arm, batch = build(name, dtype)
    start = [parameter.detach().clone() for parameter in arm.trained]
    for _ in range(2):
        seconds = measure.step(arm, batch)
    assert set(seconds) == set(measure.PHASES)
    assert all(second >= 0 for second in seconds.values())
    trains = name not in ("floor", "control")
    assert bool(arm.trained) == trains
    assert any(not torch.equal(old, new) for old, new in zip(start, arm.trained)) == trains
    assert all(parameter.grad is None for parameter in arm.trained)
    if name != "full":
        assert all(parameter.dtype == torch.float32 for parameter in arm.trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smt-0.43", {}),
        ("smt-0.84", {}),
        ("smt-4.91", {}),
        ("smt-0.84", {"share": 1.0}),
        ("smt-0.84", {"block_size": 32, "share": 0.5}),
        ("smt-0.84", {"layers": (0,)}),  # a layer without blocks above
        ("smt-at-use", {}),
        ("smt-after-step", {}),
    ],
)
def test_smt_is_the_floor_and_its_blocks_exactly(name, options, dtype):
    floor, batch = build("floor", dtype)
    arm, _ = build(name, dtype, **options)
    blocks = sum(parameter.numel() for parameter in arm.trained)
    expected = measure.count_flops(floor, batch)
    expected["backward"] += 2 * blocks * TOKENS
    assert measure.count_flops(arm, batch) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"share": 1 / 8}, {"share": 1.0}, {"layers": (0,)}, {"layers": (1,)}, {"block_size": 8, "share": 0.05}],
)
def test_smt_saves_the_used_columns_once_beyond_the_floor(options, dtype):
    floor, batch = build("floor", dtype, floor_from=min(options.get("layers", (0,))))
    arm, _ = build("smt-0.84", dtype, **options)
    assert arm.plan is not None
    beyond = measure.count_saved(arm, batch) - measure.count_saved(floor, batch)
    assert beyond == TOKENS * used_columns(arm.plan) * ITEMSIZE[dtype]


def test_the_backward_ends_where_the_blocks_end():
    arm, batch = build("smt-0.84", layers=(1,))
    upper, _ = build("floor", floor_from=1)
    whole, _ = build("floor")
    blocks = sum(parameter.numel() for parameter in arm.trained)
    backward = measure.count_flops(arm, batch)["backward"]
    assert backward == measure.count_flops(upper, batch)["backward"] + 2 * blocks * TOKENS
    assert backward < measure.count_flops(whole, batch)["backward"]


def test_used_columns_are_a_union_over_the_projections_of_an_attention():
    plan = random_plan(SUBJECT.load("float32"), block_size=16, share=1.0)
    assert used_columns(plan) == 2 * 64


def test_dense_arms_pay_for_whole_gradients_and_lora_for_its_path():
    def total(name):
        arm, batch = build(name)
        return sum(measure.count_flops(arm, batch).values())

    weights = 2 * 3 * 64 * 64
    floor = total("floor")
    assert total("supertuning") == total("sift") == floor + 2 * weights * TOKENS
    assert total("dense-v") == floor + 2 * weights // 3 * TOKENS
    assert total("lora") > total("smt-0.84")


@pytest.mark.parametrize(
    ("percent", "blocks"), [(0.43, 14), (0.84, 27), (1.26, 40), (2.5, 80), (3.73, 120), (4.91, 158)]
)
def test_shares_are_the_papers_by_whole_blocks_a_layer(percent, blocks):
    assert paper_share(percent) * 768 == pytest.approx(blocks, abs=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "lora",
        "lora-4.91",
        "lora-autocast",
        "lora-4.91-autocast",
        "lora-all",
        "dora",
        "dora-4.91",
        "dora-autocast",
        "shira",
        "shira-4.91",
        "supertuning",
        "supertuning-4.91",
        "sift",
        "appendix-a",
    ],
)
def test_rivals_have_as_many_parameters_as_smt(name):
    subject = find_subject("llama-256x2")
    like = "smt-4.91" if "4.91" in name else "smt-0.84"
    counts = {}
    for each in (name, like):
        model = subject.load("float32")
        arm = arms.build(each, Setting(subject, "float32", rival=RIVAL), model, subject.inputs(model, TOKENS))
        counts[each] = sum(parameter.numel() for parameter in arm.trained)
    rank_one = 2 * sum(
        a + b for a, b in ([(256, 256)] * 4 + [(256, 704)] * 3 if name == "lora-all" else [(256, 256)] * 3)
    )
    steps = {"supertuning": 6, "supertuning-4.91": 6, "sift": 6, "appendix-a": 0}
    assert abs(counts[name] - counts[like]) <= steps.get(name, rank_one / 2)


def test_random_plans_have_exactly_as_many_blocks_in_every_layer():
    model = SUBJECT.load("float32")
    plan = random_plan(model, block_size=16, share=5 / 48, layers=[1])
    by_layer = [sum(len(plan.modules[name].rows) for name in layer) for layer in attention_inputs(model)]
    assert by_layer == [0, 5]
    assert plan == random_plan(model, block_size=16, share=5 / 48, layers=[1])
    assert plan != random_plan(model, block_size=16, share=5 / 48, layers=[1], seed=1)


def test_written_at_use_and_after_the_step_train_alike():
    weights = {}
    for name in ("smt-at-use", "smt-after-step", "smt-0.84"):
        arm, batch = build(name)
        for _ in range(3):
            measure.step(arm, batch)
        arm.model(**batch)  # the last step's blocks are written at this use
        named = {key.replace("base_model.model.", ""): value for key, value in arm.model.named_parameters()}
        weights[name] = torch.cat([value.flatten() for key, value in named.items() if "_proj.base_layer.weight" in key])
    sizes = {name: weight.numel() for name, weight in weights.items()}
    assert len(set(sizes.values())) == 1, sizes
    assert torch.equal(weights["smt-at-use"], weights["smt-after-step"])
    assert torch.equal(weights["smt-at-use"], weights["smt-0.84"])


def test_sift_changes_the_chosen_entries_alone():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(5, 8)

    def backward():
        (x @ weight.T).square().sum().backward()

    (entries,) = sift({"w": weight}, share=0.25, backward=backward)
    dense = torch.autograd.functional.jacobian(lambda w: (x @ w.T).square().sum(), weight.detach())
    assert set(entries.index.tolist()) == set(dense.abs().flatten().topk(16).indices.tolist())
    before = weight.detach().clone()
    backward()
    assert weight.grad is None
    torch.testing.assert_close(entries.values.grad, dense.flatten()[entries.index])
    with torch.no_grad():
        entries.values += 1
    entries.write()
    changed = (weight != before).flatten()
    assert set(changed.nonzero().flatten().tolist()) == set(entries.index.tolist())


def test_sift_adds_gradients_up():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    entries = SparseEntries(weight, torch.tensor([3, 7]))
    for _ in range(2):
        weight.sum().backward()
    assert entries.values.grad is not None
    assert entries.values.grad.tolist() == [2, 2]


# Memory -------------------------------------------------------------------------------------------------------------


def test_state_is_explained_to_the_byte():
    arm, batch = build("smt-4.91", "bfloat16")
    base = sum(tensor.nbytes for tensor in SUBJECT.load("bfloat16").parameters())
    measure.step(arm, batch)
    state = measure.state_bytes(arm)
    blocks = sum(parameter.numel() for parameter in arm.trained)
    counters = 4 * len(arm.trained)  # AdamW counts the steps of each tensor in one fp32 number
    assert state["trained"] == state["gradients"] == 4 * blocks
    assert state["optimizer"] == 8 * blocks + counters
    assert state["originals"] == 2 * blocks
    assert 0 <= state["base"] - base < 4096  # buffers: rotary frequencies, the blocks' index


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["smt-0.84", "smt-4.91", "smt-additive"])
def test_the_peak_above_the_floors_is_what_smt_holds_to_the_byte(name, dtype):
    """Deltas, originals, Adam, the index and the saved columns: at the peak there are no gradients of blocks yet."""
    arm, batch = build(name, dtype)
    floor, _ = build("floor", dtype)
    measure.step(arm, batch)
    mine, floors = measure.state_bytes(arm), measure.state_bytes(floor)
    held = sum(mine[key] for key in ("trained", "originals", "optimizer")) + mine["base"] - floors["base"]
    saved = measure.count_saved(arm, batch) - measure.count_saved(floor, batch)
    assert measure.peak_tensor_bytes(arm, batch) - measure.peak_tensor_bytes(floor, batch) == held + saved
    arm.model(**batch).loss.backward()
    assert sum(parameter.grad.nbytes for parameter in arm.trained) == mine["gradients"]


def test_peak_counts_what_a_step_allocates():
    floor, batch = build("floor")
    full, _ = build("full")
    for arm in (floor, full):
        measure.step(arm, batch)
    state = measure.state_bytes(full)
    assert measure.peak_tensor_bytes(full, batch) >= sum(state.values())
    assert measure.peak_tensor_bytes(floor, batch) >= measure.state_bytes(floor)["base"] + measure.count_saved(
        floor, batch
    )
    assert measure.peak_tensor_bytes(full, batch) > measure.peak_tensor_bytes(floor, batch)


def test_alive_after_the_forward_sees_what_hooks_cannot():
    smt, batch = build("smt-0.84")
    listing, _ = build("appendix-a")
    floor, _ = build("floor")
    hidden = measure.alive_after_forward(listing, batch) - measure.alive_after_forward(floor, batch)
    assert measure.count_saved(listing, batch) == measure.count_saved(floor, batch)
    assert hidden >= 2 * TOKENS * 64 * 4  # the inputs of two attentions, whole
    assert measure.alive_after_forward(smt, batch) < measure.alive_after_forward(listing, batch)


# An adapter's life --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "exact"), [("smt-0.84", True), ("lora", False), ("full", None)])
def test_adapter_life(name, exact):
    arm, batch = build(name)
    for _ in range(3):
        measure.step(arm, batch)
    life = measure.adapter_life(arm, batch)
    if exact is None:
        assert life is None
        return
    assert life is not None
    assert life["restored_exactly"] is exact
    assert life["bytes"] > 4 * sum(parameter.numel() for parameter in arm.trained)
    assert all(life[key] > 0 for key in ("load_s", "switch_s", "merge_s", "unmerge_s"))


def test_an_unmerge_that_leaves_blocks_behind_is_seen(monkeypatch):
    arm, batch = build("smt-0.84")
    for _ in range(3):
        measure.step(arm, batch)
    monkeypatch.setattr(SMTLinear, "unmerge", lambda layer: layer.merged_adapters.clear())
    life = measure.adapter_life(arm, batch)
    assert life is not None
    assert life["restored_exactly"] is False


class ProductsInFP32(TorchDispatchMode):
    """Counts products of two matrices in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.count += args[-1].dtype == torch.float32
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "wide"), [("lora", True), ("dora", True), ("full", False), ("smt-0.84", False)])
def test_autocast_arms_multiply_in_bf16(name, wide):
    arm, batch = build(name, "bfloat16")
    with ProductsInFP32() as plain:
        measure.step(arm, batch)
    assert (plain.count > 0) == wide
    if f"{name}-autocast" in BUILDERS:
        arm, batch = build(f"{name}-autocast", "bfloat16")
        with ProductsInFP32() as cast:
            measure.step(arm, batch)
        assert cast.count == 0
        assert not suites.comparison("x", "llama-64x2", "float32", TOKENS, [f"{name}-autocast"], None).cases


# Turns and groups ---------------------------------------------------------------------------------------------------


def test_a_floor_step_stands_beside_every_arm_and_the_order_turns():
    assert turns(["a", "b", "c"], 0) == ["floor", "a", "b", "floor", "c", "floor"]
    assert turns(["a", "b", "c"], 1) == ["floor", "b", "c", "floor", "a", "floor"]
    assert turns([], 3) == ["floor"]
    for number in range(6):
        order = turns(list("abcde"), number)
        places = [place for place, name in enumerate(order) if name != "floor"]
        assert all("floor" in (order[place - 1], order[place + 1]) for place in places)


def test_a_pair_is_with_the_neighbour_or_the_mean_of_two():
    order = turns(["a", "b", "c"], 0)
    seconds = [{"forward": float(place)} for place in range(len(order))]
    assert [pair(order, seconds, order.index(name))["forward"] for name in "abc"] == [0, 3, 4]


def test_groups_fit_into_memory_and_full_is_alone():
    series = suites.comparison("x", "llama-7b-layers", "float32", 1024, suites.ARMS, None)
    cases = list(series.cases)
    one = suites.needed_memory(series, None)
    found = list(groups(series, cases, memory=6 * one))
    assert sorted(case.name for group in found for case in group) == sorted(case.name for case in cases)
    assert [case.name for case in found[-1]] == ["full"]
    assert all(sum(suites.needed_memory(series, case) for case in group) <= 5 * one for group in found[:-1])
    assert len(list(groups(series, cases, memory=1e15))) == 2
    assert all(len(group) == 1 for group in groups(series, cases, memory=0))


def test_all_suites_come_to_jobs():
    request = Request(suites=["all"], dtypes=["float32", "bfloat16"], rival=Path(RIVAL))
    assert len(jobs(request)) > 2 * len(suites.SUITES)
    assert len(jobs(Request(suites=["layers7b"], tokens=[512, 1024, 2048]))) == 3


def test_sweeps_have_tokens_of_their_own():
    assert len(jobs(Request(suites=["sweeps"], tokens=[512, 1024]))) == len(jobs(Request(suites=["sweeps"])))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": ["lora-autocast"]}, "--dtype bfloat16 for the arm lora-autocast. Got float32"),
        ({"arms": ["lora-autocast"], "quick": True, "dtypes": ["bfloat16"]}, "for the arm lora-autocast. Got float32"),
        ({"suites": ["sweeps"], "arms": ["lora"]}, "--arms with the suites layers7b or smollm2. Got it with sweeps"),
        ({"suites": ["sweeps", "cost-aware"], "tokens": [512]}, "no --tokens with sweeps, cost-aware"),
        ({"quick": True, "tokens": [512]}, "no --tokens with --quick"),
        ({"suites": ["kernels"], "device": "cuda"}, "`make bench-gpu` times those of GPUs"),
    ],
)
def test_what_nothing_would_be_done_for_is_refused(given, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=message):
        request.check(Request(**given), [])


@pytest.mark.parametrize("given", [{"suites": ["all"]}, {"quick": True, "suites": ["kernels"]}])
def test_all_is_what_a_gpu_can_do(given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    request.check(Request(**given, device="cuda"), [])
    on_cpu, on_gpu = (len(jobs(Request(suites=["all"], device=device))) for device in ("cpu", "cuda"))
    assert on_gpu == on_cpu - 1


def test_arms_for_one_of_the_dtypes_are_enough():
    request.check(Request(arms=["lora-autocast"], dtypes=["float32", "bfloat16"]), [])


def test_a_record_tells_who_timed_it_and_who_counted_it(tmp_path):
    path = tmp_path / "bench.json"
    Results(path, MACHINE, "timing").add(record("a", uncounted=True))
    later = Results(path, MACHINE, "counting")
    found = later.find(record("a"))
    assert found is not None
    later.add({key: value for key, value in found.items() if key != "uncounted"})
    (found,) = later.records
    assert (found["run"]["command"], found["counted_run"]["command"]) == ("timing", "counting")


def test_sweeps_vary_one_thing():
    """On smaller models of as many layers: blocks end where the floor of their series does."""
    for series in suites.sweeps("float32"):
        layers = series.model.partition("x")[2]
        subject = find_subject(f"llama-256x{layers}")
        floor = series.floor.get("floor_from", 0)
        assert len({case.fields["value"] for case in series.cases}) == len(series.cases)
        for case in series.cases:
            options = {key: tuple(value) if isinstance(value, list) else value for key, value in case.options.items()}
            setting = Setting(subject, "float32", **options)
            plan = random_plan(
                subject.load("float32"), setting.block_size or subject.block_size, setting.share or 0, setting.layers
            )
            with_blocks = [
                number
                for number, names in enumerate(attention_inputs(subject.load("float32")))
                if any(plan.modules[name].rows for name in names)
            ]
            lowest = case.fields["value"] if case.fields["sweep"] == "depth" else floor
            assert with_blocks == list(range(lowest, int(layers)))


# Probes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "accumulator"),
    [("abs_of_sum", "float32"), ("abs_of_sum", "bfloat16"), ("net", "float32"), ("fisher", "float32")],
)
def test_scoring_against_the_floor_and_dense_gradients(criterion, accumulator):
    model = SUBJECT.load("float32")
    found = probes.scoring(model, SUBJECT, SUBJECT.inputs(model, TOKENS), criterion, accumulator, rounds=2)
    weights = 2 * 3 * 64 * 64
    assert len(found["rounds"]) == 2
    assert set(found["rounds"][0]) == {"floor", "dense", "score"}
    assert found["flops"]["dense"] == found["flops"]["floor"] + 2 * weights * TOKENS
    score = 2 * 3 * 16 * TOKENS if criterion == "net" else weights * TOKENS
    assert found["flops"]["score"] == found["flops"]["floor"] + 2 * score
    assert found["accumulator_bytes"] == {"abs_of_sum": weights, "net": 96, "fisher": 96}[criterion] * (
        2 if accumulator == "bfloat16" else 4
    )
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_beside_the_dense_product(dtype):
    found = probes.kernels(list(CANDIDATES), dtype, tokens=8, features=32, block_size=8, blocks=3, rounds=2)
    assert list(found) == list(CANDIDATES)
    for record in found.values():
        assert len(record["seconds"]) == len(record["ideal_seconds"]) == 2
        assert record["error"] is None
    assert sum(record["used"] for record in found.values()) == 1


def test_a_kernel_that_cannot_run_does_not_stop_the_others(monkeypatch):
    def refuses(*_):
        raise RuntimeError("no such product")

    monkeypatch.setitem(probes.CANDIDATES, "bmm", refuses)
    found = probes.kernels(["strided", "bmm"], "float32", tokens=8, features=32, block_size=8, blocks=3, rounds=2)
    assert (len(found["strided"]["seconds"]), found["strided"]["error"]) == (2, None)
    assert (found["bmm"]["seconds"], found["bmm"]["error"]) == ([], "RuntimeError: no such product")


# Records and processes ----------------------------------------------------------------------------------------------

MACHINE = dict.fromkeys(("cpu", "features", "cores", "threads", "gpu", "torch", "transformers", "peft"), "x")


def record(arm: str, **fields) -> dict:
    timed = {"timed_on": "shared weights"}
    return {"kind": "arm", "suite": "s", "model": "m", "dtype": "d", "tokens": 1, "arm": arm} | timed | fields


def test_results_go_on_and_failures_are_tried_again(tmp_path):
    path = tmp_path / "new" / "bench.json"
    results = Results(path, MACHINE, "smtune bench")
    results.add(record("a", error=None))
    results.add(record("b", error="out of memory"))
    again = Results(path, MACHINE, "smtune bench --rounds 3")
    assert [again.has(record(arm)) for arm in "abc"] == [True, False, False]
    again.add(record("b", error=None))
    values = json.loads(path.read_text())
    assert [(each["arm"], each["error"]) for each in values["records"]] == [("a", None), ("b", None)]
    assert [each["run"]["command"] for each in values["records"]] == ["smtune bench", "smtune bench --rounds 3"]
    assert all(each["run"].keys() == {"date", "commit", "command"} for each in values["records"])
    assert values["format"] == 1


def test_what_was_timed_apart_or_not_counted_is_not_there(tmp_path):
    results = Results(tmp_path / "bench.json", MACHINE, "")
    results.add(record("a", timed_on=None))
    results.add(record("b", uncounted=True))
    results.add(record("x", kind="kernel", timed_on=None))
    assert results.find(record("a")) is None
    assert results.has(record("x", kind="kernel"))
    assert results.find(record("b")) is not None
    assert not results.has(record("b"))


def test_an_arm_that_is_timed_again_keeps_both_records(tmp_path):
    results = Results(tmp_path / "bench.json", MACHINE, "")
    results.add(record("a", control=[1.0, 1.1]))
    results.add(record("a", control=[1.2], uncounted=True))
    assert results.find(record("a"))["control"] == [1.2]
    assert not results.has(record("a"))
    results.add(record("a", control=[1.2]))
    assert [each["control"] for each in results.records] == [[1.0, 1.1], [1.2]]
    assert results.has(record("a"))
    results.add(record("b", timed_on=None))
    results.add(record("b", control=[1.3]))  # the first was timed apart
    assert [each["arm"] for each in results.records] == ["a", "a", "b"]


def test_results_of_another_machine_are_not_mixed(tmp_path):
    path = tmp_path / "bench.json"
    Results(path, MACHINE, "").add(record("a"))
    with pytest.raises(InputError, match="cores x not 64"):
        Results(path, MACHINE | {"cores": 64}, "")
    with pytest.raises(InputError, match="features x not \\['avx2'\\]"):  # "AMD EPYC" is with AVX-512 or without
        Results(path, MACHINE | {"features": ["avx2"]}, "")
    path.write_text("[]")
    with pytest.raises(InputError, match="neither"):
        Results(path, MACHINE, "")


def test_a_worker_speaks_json_alone_and_tells_of_faults():
    requests = [{"do": "candidates", "dtype": "float32", "device": "cpu", "threads": 1}, {"do": "step"}]
    program = (
        "import sys, smtune.bench.worker as w;"
        "w.Worker.step = lambda self: print('noise') or __import__('os').system('echo more noise') or {};"
        "w.main()"
    )
    lines = "".join(json.dumps(request) + "\n" for request in [*requests, {"do": "adapter"}])
    done = subprocess.run([sys.executable, "-c", program], input=lines, capture_output=True, text=True, check=True)
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert "strided" in first["ok"]
    assert second == {"ok": {}}
    assert "KeyError" in third["error"]
    assert "noise" in done.stderr


def test_a_dead_child_says_how_it_died():
    with Child(threads=1) as child:
        with pytest.raises(ChildError, match="Expected a model to measure"):
            child.ask("build", arm="floor", model="lama", dtype="float32", tokens=TOKENS)
        child._process.kill()
        with pytest.raises(ChildError, match="signal 9"):
            child.ask("step")


def test_arms_of_one_process_share_the_models_weights_and_nothing_else():
    worker = Worker()
    asked = {"model": "llama-64x2", "dtype": "float32", "tokens": TOKENS, "threads": 1}
    for name in ("floor", "dense-v", "smt-0.84"):
        worker.build(arm=name, name=name, **asked)
    places = [
        {key.replace("base_model.model.", "").replace("base_layer.", ""): each.data_ptr() for key, each in named}
        for named in (arm.model.named_parameters() for arm in worker._arms.values())
    ]
    assert all(place[key] == places[0][key] for place in places for key in places[0])
    assert not any(each.requires_grad for each in worker._arms["floor"].model.parameters())
    assert [len(arm.trained) > 0 for arm in worker._arms.values()] == [False, True, True]
    for name in worker._arms:
        assert worker.step(name=name)["forward"] > 0
    worker.drop("dense-v")
    with pytest.raises(KeyError):
        worker.step(name="dense-v")


def counted_as_nothing(series, case, how):
    return dict.fromkeys(run.BESIDE, 0) | {"flops": {"forward": 1, "backward": 1}}


@pytest.mark.nightly
def test_what_was_timed_outlives_a_run_that_is_killed_while_it_counts(tmp_path, monkeypatch):
    series = suites.comparison("x", "llama-64x2", "float32", TOKENS, ["smt-0.84", "lora"], None)
    results = Results(tmp_path / "bench.json", MACHINE, "")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_counted", killed)
        with pytest.raises(KeyboardInterrupt):
            run_series(series, results, How(rounds=2, threads=1))
    results = Results(tmp_path / "bench.json", MACHINE, "later")
    before = {each["arm"]: each["rounds"] for each in results.records}
    assert {arm: len(rounds) for arm, rounds in before.items()} == {"floor": 0, "smt-0.84": 2, "lora": 2}
    monkeypatch.setattr(run, "_Timing", lambda *args: pytest.fail("timed again"))
    monkeypatch.setattr(run, "_counted", counted_as_nothing)
    run_series(series, results, How(rounds=2, threads=1))
    for each in results.records:
        assert each["rounds"] == before[each["arm"]]
        assert each["flops"]["forward"] == 1
        assert "uncounted" not in each
        assert len(each["control"]) == 2
        assert each["run"]["command"] == ("later" if each["arm"] == "floor" else "")


@pytest.mark.nightly
def test_an_arm_that_cannot_be_counted_keeps_its_times(tmp_path, monkeypatch):
    def dies(series, case, how):
        if case.name == "lora":
            raise ChildError("out of memory")
        return counted_as_nothing(series, case, how)

    monkeypatch.setattr(run, "_counted", dies)
    series = suites.comparison("x", "llama-64x2", "float32", TOKENS, ["lora"], None)
    results = Results(tmp_path / "bench.json", MACHINE, "")
    run_series(series, results, How(rounds=2, threads=1))
    lora = next(each for each in results.records if each["arm"] == "lora")
    assert (len(lora["rounds"]), lora["uncounted"], lora["error"]) == (2, "out of memory", None)
    assert "x-float32-64: what is counted of LoRA q,k,v" in page({"format": 1, "records": results.records}, {})


def test_a_floor_that_cannot_run_ends_its_series_alone(tmp_path, monkeypatch, capsys):
    def broken(series, *args):
        if series.suite.startswith("layers7b"):
            raise ChildError("out of memory")

    monkeypatch.setattr(request, "run_series", broken)
    suites_ = ("layers7b", "smollm2")
    told = []
    values, faults = request.run(Request(suites=suites_, threads=1), tmp_path / "bench.json", "", {"tell": told.append})
    assert (values["records"], faults) == ([], ["out of memory"])
    assert told == ["cannot go on here: out of memory"]


@pytest.mark.nightly
def test_an_arm_that_trains_the_weights_does_not_change_what_another_keeps(tmp_path):
    """All are built before any steps: else SMT would copy weights that 16 bits no longer hold."""
    series = suites.comparison("x", "llama-64x2", "float32", TOKENS, ["dense-v", "smt-0.84"], None)
    asked = []

    class Spy(Child):
        def ask(self, command, **arguments):
            asked.append(command)
            return super().ask(command, **arguments)

    results = Results(tmp_path / "bench.json", MACHINE, "")
    timing = run._Timing(series, suites.Case("floor", "floor"), results, How(rounds=1, threads=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Child", Spy)
        timing.run(series.cases)
    assert asked == sorted(asked)  # "build" …, then "step" …


def test_models_by_name():
    assert find_subject("llama-1024x4").block_size == 256
    norms = 5 * 64
    assert sum(parameter.numel() for parameter in SUBJECT.load("float32").parameters()) == SUBJECT.params + norms
    with pytest.raises(InputError, match="Did you mean"):
        find_subject("llama-7b-layer")


def test_further_arms_are_named_apart():
    assert not set(BUILDERS) & set(FURTHER)
