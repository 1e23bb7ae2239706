"""The comparison with lm-evaluation-harness on made-up answers, and what is said where `lm_eval` is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from smtune.errors import InputError
from smtune.evaluation import TASKS, Item, check, evaluate, harness
from smtune.evaluation.results import ItemResult

QUESTION = "Please choose the correct solution to the question: Why?\n\nSolution1: long one Solution2: two"
ITEM = Item(TASKS["piqa"], 3, QUESTION + "\n\nAnswer format: solution1/solution2", "", "solution2")


def ours(first, second):
    values = {"solution1": first, "solution2": second}
    characters = {"solution1": 8, "solution2": 3}
    return ItemResult(ITEM.key, "piqa", 3, "solution2", "solution2", True, log_probs=values, characters=characters)


def theirs(first, second, acc, acc_norm):
    doc = {"key": ITEM.key, "labels": ["solution1", "solution2"]}
    return {"doc": doc, "filtered_resps": [(first, False), (second, False)], "acc": acc, "acc_norm": acc_norm}


def test_both_metrics_are_compared():
    # By the sum solution2 (right), per character solution1.
    found = harness.agreement([ours(-4.0, -3.0)], [theirs(-4.0, -3.25, 1.0, 0.0)])
    assert found["agree"] == {"acc": 1, "acc_norm": 1}
    assert found["accuracy"] == {"acc": [1.0, 1.0], "acc_norm": [0.0, 0.0]}
    assert found["largest_difference"] == 0.25
    assert found["differ"] == found["near_ties"] == []


@pytest.mark.parametrize(
    "sample",
    [
        theirs(-4.0, -3.0, 0.0, 0.0),  # the same option, called wrong
        theirs(-3.0, -4.0, 1.0, 0.0),  # another option, called right
    ],
)
def test_a_difference_is_one_by_option_or_by_verdict(sample):
    found = harness.agreement([ours(-4.0, -3.0)], [sample])
    assert found["agree"]["acc"] == 0
    assert [(case["index"], case["metric"]) for case in found["differ"]] == [(3, "acc")]


def test_near_ties_are_listed_whether_they_agree_or_not():
    close = harness.NEAR_TIE / 2
    same = harness.agreement([ours(-3.0 - close, -3.0)], [theirs(-3.0 - close, -3.0, 1.0, 0.0)])
    turned = harness.agreement([ours(-3.0 - close, -3.0)], [theirs(-3.0, -3.0 - close, 0.0, 0.0)])
    for found, agree in ((same, 1), (turned, 0)):
        assert found["agree"]["acc"] == agree
        assert [case["metric"] for case in found["near_ties"]] == ["acc"]
        assert found["differ"] == []


def test_other_items_are_not_compared():
    sample = theirs(-1.0, -2.0, 1.0, 1.0)
    sample["doc"]["key"] = "0" * 16
    with pytest.raises(ValueError, match="the same items"):
        harness.agreement([ours(-1.0, -2.0)], [sample])


def test_a_task_as_it_is_written(tmp_path):
    assert harness.write_task([ITEM], tmp_path) == "smtune_piqa"
    declared = yaml.safe_load((tmp_path / "piqa.yaml").read_text())
    (line,) = Path(declared["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    record = json.loads(line)
    assert record[declared["doc_to_text"]].endswith("Why?\n\n### Response:\nthe correct answer is")
    assert record[declared["doc_to_choice"]] == ["long one", "two"]
    assert record[declared["doc_to_target"]] == 1
    assert record["key"] == ITEM.key


def test_an_answer_that_is_no_option(tmp_path):
    wrong = Item(ITEM.task, 0, ITEM.instruction, "", "solution3")
    with pytest.raises(InputError, match="solution1, solution2.*'solution3'"):
        harness.write_task([wrong], tmp_path)


def test_without_lm_eval_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(harness.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[lm-eval\]'"):
        evaluate(
            None, None, [ITEM], protocol="likelihood", backend="lm-eval", model_id="x", out_dir=tmp_path / "results"
        )
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backend": "lm-eval", "protocol": "generate"}, 'the protocol "likelihood".*Got "generate"'),
        ({"backend": "lm_eval", "protocol": "likelihood"}, 'Did you mean "lm-eval"'),
        ({"beams": 0}, "at least 1 beam"),
        ({"beams": 4, "protocol": "likelihood"}, 'Got 4 under "likelihood"'),
    ],
)
def test_settings_that_do_not_go_together(kwargs, message):
    with pytest.raises(InputError, match=message):
        check([ITEM], **kwargs)
