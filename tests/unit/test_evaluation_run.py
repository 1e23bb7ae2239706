"""The runner against brute force, one item at a time: batching, resuming, and the model left as found."""

import copy
import io
import json

import peft
import pytest
import torch
from rich.console import Console
from transformers import GenerationConfig

from smtune.errors import InputError
from smtune.evaluation import (
    TASKS,
    Item,
    choices,
    compare,
    comparison_table,
    evaluate,
    load_run,
    summary_table,
)
from tiny_base import byte_llama, byte_tokenizer

EOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer):
    return byte_llama(len(tokenizer))


def letters_items(n=7):
    """Questions with options, of quite different lengths."""
    return [
        Item(
            TASKS["AQuA"],
            k,
            f"Find {'x' * (5 * k % 17)}. Answer Choices: (A) {k} (B) {k * 111} (C) none (D) $5.50 (E) a{'b' * k}",
            "",
            "ABCDE"[k % 5],
        )
        for k in range(n)
    ]


OPTIONS = "Which? Answer1: this Answer2: that Answer format: answer1/answer2"


def option_items(instruction, answer):
    return [Item(TASKS["openbookqa"], 0, instruction, "", answer)]


def number_items(n=7):
    return [Item(TASKS["gsm8k"], k, f"What is {k}{' and' * (k % 3)}?", "", str(k)) for k in range(n)]


def brute_force_log_prob(model, tokenizer, context, scored):
    """log p(scored | context): no batch, no padding, one position after the other."""
    ids = tokenizer(context)["input_ids"]
    total = 0.0
    for token in tokenizer(scored)["input_ids"]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        ids = [*ids, token]
    return total


def brute_force_completion(model, tokenizer, prompt, max_new_tokens):
    ids = tokenizer(prompt)["input_ids"]
    new = []
    while len(new) < max_new_tokens:
        with torch.no_grad():
            token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token == EOS:
            break
        new.append(token)
    return tokenizer.decode(new)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_likelihood_equals_brute_force_at_any_batch_size(model, tokenizer, batch_size):
    items = letters_items()
    blank = "Please ... given sentence: Ann thanked Eve as _ was kind.\n\nOption1: Ann Option2: Eve "
    items.append(Item(TASKS["winogrande"], 0, blank + "Answer format: option1/option2", "", "option1"))
    model.eval()
    evaluation = evaluate(model, tokenizer, items, protocol="likelihood", model_id="tiny", batch_size=batch_size)
    for item, result in zip(items, evaluation.results):
        expected = {
            c.label: brute_force_log_prob(model, tokenizer, c.prompt + c.opening, c.scored) for c in choices(item)
        }
        assert result.key == item.key
        assert result.log_probs == pytest.approx(expected, abs=1e-4)
        per_character = {c.label: expected[c.label] / len(c.scored.strip()) for c in choices(item)}
        assert result.prediction == max(per_character, key=lambda label: per_character[label])
        assert result.correct == (result.prediction == item.answer)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_completions_equal_brute_force_at_any_batch_size(model, tokenizer, batch_size):
    items = number_items()
    model.eval()
    # Sampling settings of the model must not leak into the protocol.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.5, repetition_penalty=3.0, eos_token_id=EOS, max_length=20
    )
    results = evaluate(model, tokenizer, items, model_id="tiny", batch_size=batch_size, max_new_tokens=12).results
    assert [r.completion for r in results] == [
        brute_force_completion(model, tokenizer, item.prompt, 12) for item in items
    ]
    assert {r.prediction is None and r.correct for r in results} == {False}


def alone(model, tokenizer, prompt, beams, max_new_tokens=12):
    """(completion, mean log-probability of its tokens) by transformers: one prompt, no padding."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=EOS,
    )[0, ids.shape[1] :]
    with torch.no_grad():
        logits = model(torch.cat([ids[0], found])[None]).logits[0, ids.shape[1] - 1 : -1]
    log_probs = logits.log_softmax(-1).gather(1, found[:, None])
    return tokenizer.decode([token for token in found if token != EOS]), log_probs.mean().item()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_beams_are_those_of_transformers_at_any_batch_size(model, tokenizer, batch_size):
    items = number_items()
    model.eval()
    expected = [alone(model, tokenizer, item.prompt, 4) for item in items]
    greedy = [alone(model, tokenizer, item.prompt, 1) for item in items]
    # A search finds what greedy steps miss, and says otherwise.
    assert [text for text, _ in expected] != [text for text, _ in greedy]
    assert sum(mean for _, mean in expected) > sum(mean for _, mean in greedy)
    kwargs = {"model_id": "tiny", "batch_size": batch_size, "max_new_tokens": 12}
    found = evaluate(model, tokenizer, items, beams=4, **kwargs)
    assert [result.completion for result in found.results] == [text for text, _ in expected]
    assert found.summary.run["beams"] == 4
    plain = evaluate(model, tokenizer, items, **kwargs)
    assert [result.completion for result in plain.results] == [text for text, _ in greedy]
    assert "beams" not in plain.summary.run  # so that results from before there were beams can be gone on with


def test_a_completion_ends_at_the_end_of_text(model, tokenizer):
    items = number_items(4)
    model.eval()
    first = evaluate(model, tokenizer, items, model_id="tiny", max_new_tokens=6).results
    assert all(result.truncated for result in first)
    # Whatever the model says second on item 0 becomes an end of text.
    ids = tokenizer(items[0].prompt)["input_ids"]
    with torch.no_grad():
        for _ in range(2):
            ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    model.generation_config.eos_token_id = [EOS, ids[-1]]
    second = evaluate(model, tokenizer, items, model_id="tiny", max_new_tokens=6).results
    assert second[0].completion == tokenizer.decode(ids[-2:-1])
    assert not second[0].truncated


@pytest.mark.parametrize("protocol", ["generate", "likelihood"])
def test_an_interrupted_run_resumes_to_the_same_result(model, tokenizer, tmp_path, protocol):
    items = letters_items()
    kwargs = {"protocol": protocol, "model_id": "tiny", "batch_size": 2}
    if protocol == "generate":
        kwargs["max_new_tokens"] = 8
    whole = evaluate(model, tokenizer, items, out_dir=tmp_path / "whole", **kwargs)

    def interrupt(done, total):
        assert total == len(items)
        if done == 4:
            raise KeyboardInterrupt

    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, items, out_dir=folder, progress=interrupt, **kwargs)
    path = folder / "items.jsonl"
    assert len(path.read_text().splitlines()) == 1 + 4
    with path.open("ab") as file:
        file.write('{"key": "half a li\u2212'.encode()[:-1])  # within a character

    seen = []
    resumed = evaluate(model, tokenizer, items, out_dir=folder, progress=lambda done, _: seen.append(done), **kwargs)
    assert seen == [6, 7]
    assert resumed == whole
    for name in ("items.jsonl", "summary.json"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(whole.summary.to_dict()))
    assert not list(folder.glob("*.tmp"))

    # A finished run is only read, whatever the model would say now.
    again = evaluate(NeverRun(model), tokenizer, items, out_dir=folder, **kwargs)
    assert again == whole


class NeverRun(torch.nn.Module):
    """A model that may be looked at but not run."""

    def __init__(self, model):
        super().__init__()
        self.dtype, self.generation_config = model.dtype, model.generation_config

    def forward(self, **_):
        raise AssertionError("the model ran")

    generate = forward


def test_tasks_can_be_added_to_a_run(model, tokenizer, tmp_path):
    kwargs = {"model_id": "tiny", "out_dir": tmp_path, "max_new_tokens": 4}
    evaluate(model, tokenizer, number_items(3), **kwargs)
    both = evaluate(model, tokenizer, [*letters_items(2), *number_items(3)], **kwargs)
    assert [task.task for task in both.summary.tasks] == ["AQuA", "gsm8k"]
    assert len(load_run(tmp_path)[1]) == 5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_id": "other"}, "model 'tiny', not 'other'"),
        ({"max_new_tokens": 5}, "max_new_tokens 4, not 5"),
        ({"protocol": "likelihood"}, "protocol 'generate', not 'likelihood'"),
        ({"beams": 2}, "beams None, not 2"),
    ],
)
def test_results_of_another_run_are_not_mixed_in(model, tokenizer, tmp_path, change, named):
    kwargs = {"model_id": "tiny", "out_dir": tmp_path, "max_new_tokens": 4}
    evaluate(model, tokenizer, letters_items(1), **kwargs)
    before = (tmp_path / "items.jsonl").read_text()
    with pytest.raises(InputError, match=f"{named}.*Give another folder"):
        evaluate(model, tokenizer, letters_items(1), **{**kwargs, **change})
    assert (tmp_path / "items.jsonl").read_text() == before


def test_results_of_other_questions_are_not_mixed_in(model, tokenizer, tmp_path):
    """Such as the packaged items of a task, and then its whole file; or a file that was mended."""
    kwargs = {"model_id": "tiny", "out_dir": tmp_path, "max_new_tokens": 4}
    evaluate(model, tokenizer, number_items(3), **kwargs)
    mended = [*number_items(2), Item(TASKS["gsm8k"], 2, "What is 2 and and?", "", "3")]
    with pytest.raises(InputError, match="record 3 of gsm8k is not the same.*Give another folder"):
        evaluate(NeverRun(model), tokenizer, mended, **kwargs)
    assert len(evaluate(model, tokenizer, number_items(5)[2:], **kwargs).results) == 3  # others of the same file
    assert len(load_run(tmp_path)[1]) == 5


def test_an_item_that_two_processes_wrote_counts_once(model, tokenizer, tmp_path):
    evaluate(model, tokenizer, number_items(3), model_id="tiny", out_dir=tmp_path, max_new_tokens=4)
    path = tmp_path / "items.jsonl"
    path.write_text(path.read_text() + path.read_text().split("\n", 1)[1])
    results = load_run(tmp_path)[1]
    assert len(results) == 3
    assert compare(results, results)["gsm8k"].n == 3


def test_the_same_weights_by_another_name_go_on(model, tokenizer, tmp_path):
    kwargs = {"out_dir": tmp_path, "max_new_tokens": 4}
    evaluate(model, tokenizer, number_items(1), model_id="run (0123456789ab)", **kwargs)
    evaluate(model, tokenizer, number_items(2), model_id="renamed (0123456789ab)", **kwargs)
    assert len(load_run(tmp_path)[1]) == 2
    with pytest.raises(InputError, match="Got those of another: model"):
        evaluate(model, tokenizer, number_items(2), model_id="run (0123456789ac)", **kwargs)
    kwargs["out_dir"] = tmp_path / "unknown"
    evaluate(model, tokenizer, number_items(1), model_id="a/b (unknown revision)", **kwargs)
    with pytest.raises(InputError, match="Got those of another: model"):
        evaluate(model, tokenizer, number_items(1), model_id="c/d (unknown revision)", **kwargs)


@pytest.mark.parametrize("text", ["", "\n", "{}\n", '{"run": {}}\nnot json\n', '{"run": {}}\n{"key": 1}\n'])
def test_a_damaged_run_is_an_error(tmp_path, text):
    (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"items\.jsonl"):
        load_run(tmp_path)


@pytest.mark.parametrize("protocol", ["generate", "likelihood"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("fails", [False, True], ids=["finishes", "fails"])
def test_the_model_is_left_as_found(model, tokenizer, protocol, wrapped, fails):
    settings = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=EOS)
    model.generation_config = settings
    model.config.use_cache = False
    if wrapped:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.train()
    model.get_submodule("base_model.model.lm_head" if wrapped else "lm_head").eval()
    modes = [module.training for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    weights = copy.deepcopy(model.state_dict())
    rng, side = torch.get_rng_state(), tokenizer.padding_side

    def stop(*_):
        raise KeyboardInterrupt

    kwargs = {"protocol": protocol, "model_id": "tiny", "max_new_tokens": 3}
    if fails:
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, tokenizer, letters_items(2), progress=stop, **kwargs)
    else:
        evaluate(model, tokenizer, letters_items(2), **kwargs)

    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert tokenizer.padding_side == side
    base = model.get_base_model() if wrapped else model
    assert base.generation_config is settings
    assert base.config.use_cache is False
    assert torch.is_grad_enabled()
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()  # nothing cached under no_grad is in the way


def test_summary_counts_and_tables(model, tokenizer):
    items = letters_items()
    run = evaluate(model, tokenizer, items, protocol="likelihood", model_id="tiny")
    (task,) = run.summary.tasks
    assert task.n == 7
    assert task.correct == sum(r.correct for r in run.results)
    assert task.accuracy.value == task.accuracy_per_character == task.correct / 7
    assert task.accuracy.low <= task.accuracy.value < task.accuracy.high
    assert run.summary.averages == {}

    said = evaluate(model, tokenizer, items, model_id="tiny", max_new_tokens=2)
    (task,) = said.summary.tasks
    assert task.unparsed == sum(r.prediction is None for r in said.results) > 0
    assert task.truncated == 7
    assert task.accuracy_sum is None

    differences = compare(run.results, said.results)
    assert differences["AQuA"].n == 7
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary_table(run.summary), comparison_table(differences, "likelihood", "generate"))
    text = console.export_text()
    assert "AQuA" in text
    assert "McNemar" in text
    with pytest.raises(InputError, match="none in common"):
        compare(run.results, [])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"protocol": "likelyhood"}, 'Did you mean "likelihood"'),
        ({"protocol": "likelihood"}, "Expected tasks with options.*gsm8k"),
        ({"protocol": "likelihood", "items": option_items("No format.", "answer1")}, "Answer format"),
        ({"protocol": "likelihood", "items": option_items(OPTIONS, "answer7")}, "among its options, answer1, answer2"),
        ({"items": []}, "at least one item"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"items": number_items(2) + number_items(1)}, "1 repeated"),
    ],
)
def test_bad_requests_are_errors_before_anything_is_written(model, tokenizer, tmp_path, kwargs, message):
    kwargs = {"items": number_items(2), "model_id": "tiny", "out_dir": tmp_path / "run", **kwargs}
    with pytest.raises(InputError, match=message):
        evaluate(model, tokenizer, **kwargs)
    assert not (tmp_path / "run").exists()
