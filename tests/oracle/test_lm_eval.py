"""Option likelihood against EleutherAI's lm-evaluation-harness (`lm_eval`), item by item in fp32.

Two routes: our items written out as tasks of the harness, which then tokenises, batches, scores and judges by itself;
and its model class behind `evaluate`. Where `lm_eval` is missing these tests skip, or fail with
SMTUNE_REQUIRE_LM_EVAL=1.
"""

from __future__ import annotations

import random

import pytest
import torch
import yaml

from needs import needs
from smtune.evaluation import TASKS, Item, evaluate, harness, load_items, load_run
from tiny_base import byte_llama, byte_tokenizer

pytestmark = needs("lm_eval", "pip install -e '.[lm-eval]'")

WORDS = "iron rust magnet ice seed root moon tide coal lamp glass sand frog egg wire heat".split()
SENTENCES = ["use a {} and a {}.", "Put the {}, slowly, under the {}", "a {} — never a {}!", "the {} with 3 {}s"]


def text(source):
    return source.choice(SENTENCES).format(*source.sample(WORDS, 2))


def listed(word, texts, separator):
    return separator.join(f"{word}{k}: {option}" for k, option in enumerate(texts, 1))


def arc_easy(n):
    """Questions in ARC-Easy's form, with 3 to 5 options."""
    source = random.Random("ARC-Easy")
    for k in range(n):
        n_options = 3 + k % 3
        question = f"Please choose the correct answer to the question: What would {text(source)[:-1]} do?"
        form = "/".join(f"answer{j}" for j in range(1, n_options + 1))
        options = listed("Answer", [text(source) for _ in range(n_options)], " ")
        body = f"{question}\n\n{options}\n\nAnswer format: {form}"
        yield Item(TASKS["ARC-Easy"], k, body, "", f"answer{source.randint(1, n_options)}")


def piqa(n):
    """Goals in PIQA's form, with 2 solutions."""
    source = random.Random("piqa")
    for k in range(n):
        question = f"Please choose the correct solution to the question: How to make {text(source)}"
        options = listed("Solution", [text(source), text(source)], "\n\n")
        body = f"{question}\n\n{options}\n\nAnswer format: solution1/solution2"
        yield Item(TASKS["piqa"], k, body, "", f"solution{1 + k % 2}")


def boolq(n):
    source = random.Random("boolq")
    for k in range(n):
        question = f"Please answer the following question with true or false, question: can you {text(source)}?"
        yield Item(TASKS["boolq"], k, f"{question}\n\nAnswer format: true/false", "", ["true", "false"][k % 2])


def packaged(name):
    return lambda n: load_items(TASKS[name], limit=n)


MADE = {"ARC-Easy": arc_easy, "piqa": piqa, "boolq": boolq, "winogrande": packaged("winogrande")}
MADE |= {"AQuA": packaged("AQuA")}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return byte_llama(len(tokenizer))


def in_the_harness(model, tokenizer, items, folder, batch_size):
    """The harness's samples of items that are written to a folder as one of its tasks."""
    name = harness.write_task(items, folder)
    return harness.run_tasks(harness.load(model, tokenizer, batch_size), folder, [name])[name]


def check_agreement(ours, theirs, tolerance):
    """All but near ties agree, of which there are few; returns the record."""
    found = harness.agreement(ours, theirs)
    assert found["differ"] == []
    assert found["largest_difference"] < tolerance
    assert len(found["near_ties"]) <= 0.05 * found["items"]
    assert all(count >= found["items"] - len(found["near_ties"]) for count in found["agree"].values())
    return found


@pytest.mark.parametrize("name", list(MADE))
def test_tasks_run_by_the_harness_agree(model, tokenizer, tmp_path, name):
    items = list(MADE[name](12))
    ours = evaluate(model, tokenizer, items, protocol="likelihood", model_id="tiny", batch_size=5).results
    theirs = in_the_harness(model, tokenizer, items, tmp_path, batch_size=7)
    found = check_agreement(ours, theirs, 1e-3)
    assert found["agree"].keys() == ({"acc"} if name == "winogrande" else {"acc", "acc_norm"})
    declared = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    assert declared["task"] == f"smtune_{name}"


def test_the_comparison_sees_a_prompt_that_is_not_ours(model, tokenizer, tmp_path):
    items = list(piqa(12))
    ours = evaluate(model, tokenizer, items, protocol="likelihood", model_id="tiny").results
    harness.write_task(items, tmp_path)
    path = tmp_path / "piqa.yaml"
    path.write_text(path.read_text().replace("target_delimiter: ' '", "target_delimiter: ''"))
    theirs = harness.run_tasks(harness.load(model, tokenizer, 8), tmp_path, ["smtune_piqa"])["smtune_piqa"]
    found = harness.agreement(ours, theirs)
    assert found["largest_difference"] > 0.1
    assert found["differ"]


@pytest.mark.parametrize("name", list(MADE))
def test_the_backend_agrees_and_goes_on(model, tokenizer, tmp_path, name):
    items = list(MADE[name](10))
    kwargs = {"protocol": "likelihood", "model_id": "tiny", "batch_size": 4}
    ours = evaluate(model, tokenizer, items, **kwargs).results
    model.train()

    def stop(done, total):
        raise KeyboardInterrupt

    kwargs |= {"backend": "lm-eval", "out_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, items, progress=stop, **kwargs)
    assert len(load_run(tmp_path)[1]) == 4
    evaluation = evaluate(model, tokenizer, items, **kwargs)
    assert model.training
    assert tokenizer.pad_token is None
    assert load_run(tmp_path)[0]["backend"] == f"lm_eval {harness.version()}"
    for own, other in zip(ours, evaluation.results):
        assert (other.key, other.prediction, other.correct) == (own.key, own.prediction, own.correct)
        assert other.log_probs == pytest.approx(own.log_probs, abs=1e-3)
        assert other.characters == own.characters
    assert evaluation.summary.tasks[0].accuracy_sum is not None


def test_an_ending_that_follows_the_prompt_includes_its_line_end_there(model, tokenizer):
    """What is documented of HellaSwag: the harness scores the end of the prompt's last line too."""
    form = "Please choose the correct ending to complete the given sentence: He\n\nEnding1: sat. Ending2: ran off. "
    item = Item(TASKS["hellaswag"], 0, form + "Answer format: ending1/ending2", "", "ending1")
    kwargs = {"protocol": "likelihood", "model_id": "tiny"}
    (ours,) = evaluate(model, tokenizer, [item], **kwargs).results
    (theirs,) = evaluate(model, tokenizer, [item], backend="lm-eval", **kwargs).results
    ids = tokenizer(item.prompt.split("\n\nEnding1")[0] + "\n\n### Response:\n")["input_ids"]
    with torch.no_grad():
        line_end = model.eval()(torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(-1)[ids[-1]].item()
    for label, value in ours.log_probs.items():
        assert theirs.log_probs[label] == pytest.approx(value + line_end, abs=1e-3)


def as_other_tasks(items):
    """Packaged items of four options in the forms of ARC-Easy, as they are, and of PIQA: the right one and another."""
    for item in items:
        yield Item(TASKS["ARC-Easy"], item.index, item.instruction, "", item.answer)
    for k, item in enumerate(items):
        question, options = item.instruction.split("\n\n")[:2]
        texts = [part.split(":", 1)[1].strip() for part in options.split("Answer")[1:]]
        right = int(item.answer.removeprefix("answer")) - 1
        pair = [texts[right], texts[right - 1]][:: 1 if k % 2 else -1]
        question = question.replace("correct answer", "correct solution")
        body = f"{question}\n\n{listed('Solution', pair, chr(10) * 2)}\n\nAnswer format: solution1/solution2"
        yield Item(TASKS["piqa"], item.index, body, "", "solution1" if k % 2 else "solution2")


@pytest.mark.nightly
def test_smollm2_agrees(smollm2, smollm2_tokenizer, tmp_path):
    items = list(as_other_tasks(load_items(TASKS["openbookqa"], limit=40)))
    for name in ("ARC-Easy", "piqa"):
        chosen = [item for item in items if item.task.name == name]
        ours = evaluate(smollm2, smollm2_tokenizer, chosen, protocol="likelihood", model_id="smollm2").results
        theirs = in_the_harness(smollm2, smollm2_tokenizer, chosen, tmp_path, batch_size=16)
        found = check_agreement(ours, theirs, 1e-3)
        assert found["items"] == 40
        assert all(0 < right < 1 for right in found["accuracy"]["acc_norm"])
