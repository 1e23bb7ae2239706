"""The task table, reading of records, and the options inside instructions."""

import json

import pytest

from smtune.data import alpaca_prompt
from smtune.errors import InputError
from smtune.evaluation import GROUPS, TASKS, Choice, Item, choices, extract_answer, load_items, resolve_tasks

QUESTION = "Please choose the correct answer to the question: "


def item(task, instruction, answer="answer1"):
    return Item(TASKS[task], 0, instruction, "", answer)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_the_table_is_complete():
    assert len(GROUPS["commonsense"]) == 8
    assert len(GROUPS["math"]) == 6
    assert {name for name, task in TASKS.items() if task.leaked} == {"AddSub", "MultiArith", "SingleEq"}
    assert all(name == task.name and task.source for name, task in TASKS.items())


def test_names_aliases_and_groups_resolve_once_in_order():
    names = [task.name for task in resolve_tasks(["SIQA", "arc-e", "social_i_qa", "gsm8K", "ARC_Challenge"])]
    assert names == ["social_i_qa", "ARC-Easy", "gsm8k", "ARC-Challenge"]
    assert [task.name for task in resolve_tasks(["commonsense", "boolq", "Math"])] == [
        *GROUPS["commonsense"],
        *GROUPS["math"],
    ]


def test_unknown_tasks_are_all_named_with_the_closest():
    with pytest.raises(InputError, match=r'"helaswag"\. Did you mean "hellaswag"\?.*"zzz"\.'):
        resolve_tasks(["helaswag", "zzz"])
    with pytest.raises(InputError, match="Got none"):
        resolve_tasks([])


@pytest.mark.parametrize(
    ("task", "instruction", "question", "expected"),
    [
        (
            "boolq",
            "Please answer the following question with true or false, question: is ice wet?\n\n"
            "Answer format: true/false",
            "Please answer the following question with true or false, question: is ice wet?",
            {"true": "true", "false": "false"},
        ),
        (
            "piqa",
            "Please choose the correct solution to the question: boil an egg\n\nSolution1: In water.\nFor long.\n\n"
            "Solution2: In a hat: gently.\n\nAnswer format: solution1/solution2",
            "Please choose the correct solution to the question: boil an egg",
            {"solution1": "In water.\nFor long.", "solution2": "In a hat: gently."},
        ),
        (
            "social_i_qa",
            f"{QUESTION}Kai sat. Why?\n\nAnswer1: to rest Answer2: to run Answer3: to hide\n\n"
            "Answer format: answer1/answer2/answer3",
            f"{QUESTION}Kai sat. Why?",
            {"answer1": "to rest", "answer2": "to run", "answer3": "to hide"},
        ),
        (
            "hellaswag",
            "Please choose the correct ending to complete the given sentence: Knives: She cuts. she\n\n"
            "Ending1: stops. Ending2: cuts more. Ending3: sings. Ending4: leaves.\n\n"
            "Answer format: ending1/ending2/ending3/ending4",
            "Please choose the correct ending to complete the given sentence: Knives: She cuts. she",
            {"ending1": "stops.", "ending2": "cuts more.", "ending3": "sings.", "ending4": "leaves."},
        ),
        (
            "ARC-Easy",
            f"{QUESTION}Which gas?\n\nAnswer1: O Answer2: N Answer3: H Answer4: He Answer5: Ar\n\n"
            "Answer format: answer1/answer2/answer3/answer4/answer5",
            f"{QUESTION}Which gas?",
            {"answer1": "O", "answer2": "N", "answer3": "H", "answer4": "He", "answer5": "Ar"},
        ),
        (
            "AQuA",
            "Find x, see (A) above. Answer Choices: (A) $61 (B) 65 % (C) 1/2 (D)7 (E) None of these",
            "Find x, see (A) above.",
            {"A": "$61", "B": "65 %", "C": "1/2", "D": "7", "E": "None of these"},
        ),
    ],
)
def test_options_are_read_from_the_instruction(task, instruction, question, expected):
    found = choices(item(task, instruction))
    opening = {"AQuA": "The answer is", "hellaswag": ""}.get(task, "the correct answer is")
    assert [(c.label, c.scored.strip()) for c in found] == list(expected.items())
    assert all(c.scored.startswith(" ") == bool(opening) for c in found)
    assert {c.opening for c in found} == {opening}
    # The prompt asks without listing the options.
    assert {c.prompt for c in found} == {alpaca_prompt(question)}


def test_winogrande_scores_what_follows_the_filled_blank():
    request = "Please choose the correct answer to fill in the blank to complete the given sentence:"
    sentence = "Ann thanked Eve because _ was kind."
    instruction = f"{request} {sentence}\n\nOption1: Ann Option2: Eve Answer format: option1/option2"
    prompt = alpaca_prompt(request)
    assert choices(item("winogrande", instruction)) == [
        Choice("option1", prompt, "Ann thanked Eve because Ann", " was kind."),
        Choice("option2", prompt, "Ann thanked Eve because Eve", " was kind."),
    ]


@pytest.mark.parametrize(
    ("task", "instruction", "message"),
    [
        ("ARC-Easy", "no format", "Answer format"),
        ("ARC-Easy", "Answer1: a\n\nAnswer format: answer1/answer2", 'after "Answer2:" in ARC-Easy, record 1'),
        ("ARC-Easy", "Answer1: Answer2: b\n\nAnswer format: answer1/answer2", 'after "Answer1:"'),
        ("AQuA", "Answer Choices: (A) 1 (B) 2", r'after "\(E\)"'),
        ("winogrande", "given sentence: no blank\n\nOption1: a Option2: b Answer format: option1/option2", "blank"),
    ],
)
def test_malformed_options_are_an_error(task, instruction, message):
    with pytest.raises(InputError, match=message):
        choices(item(task, instruction))


def test_a_task_without_options_has_no_choices():
    with pytest.raises(ValueError, match="Expected a task with options"):
        choices(item("gsm8k", "How many?"))


@pytest.mark.parametrize("name", ["gsm8k.jsonl", "gsm8k.json", "gsm8k/test.json"])
def test_items_load_from_every_layout(tmp_path, name):
    records = [{"instruction": f"How many?\u2028{k}", "input": "", "output": "", "answer": k} for k in range(5)]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    items = load_items(TASKS["gsm8k"], tmp_path)
    assert [(i.index, i.answer) for i in items] == [(k, str(k)) for k in range(5)]
    assert [i.key for i in items] == [i.key for i in load_items(TASKS["gsm8k"], path)]
    assert len({i.key for i in items}) == 5


def test_a_mixed_file_gives_the_task_its_own_records(tmp_path):
    path = tmp_path / "mixed.jsonl"
    write_jsonl(path, [{"instruction": "q", "answer": "1", "task": task} for task in ("gsm8k", "SVAMP", "gsm8k")])
    assert [i.index for i in load_items(TASKS["gsm8k"], path)] == [0, 2]
    with pytest.raises(InputError, match="Expected records of AddSub"):
        load_items(TASKS["AddSub"], path)


def test_limit_is_a_seeded_sample_in_file_order(tmp_path):
    write_jsonl(tmp_path / "gsm8k.jsonl", [{"instruction": f"q{k}", "answer": "1"} for k in range(50)])

    def load(**kwargs):
        return [i.index for i in load_items(TASKS["gsm8k"], tmp_path, **kwargs)]

    sample = load(limit=10)
    assert sample == load(limit=10) == sorted(sample)
    assert sample != load(limit=10, seed=1)
    assert load(limit=99) == list(range(50))
    with pytest.raises(InputError, match="limit"):
        load(limit=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "q", "answer": "1"}\n{"instr', "line 2"),
        ('{"instruction": "q"}\n', r'"instruction" and "answer" in .*record 1. Got .*instruction'),
        ("[3]", r"record 1. Got the fields \[\]"),
        ("", "gsm8k"),
    ],
)
def test_bad_files_are_an_error_that_says_where(tmp_path, text, message):
    (tmp_path / "gsm8k.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_items(TASKS["gsm8k"], tmp_path)


def test_missing_files_are_an_error_that_says_where_to_get_them(tmp_path):
    with pytest.raises(InputError, match=r"boolq\.jsonl, boolq\.json or boolq/test\.json.*LLM-Adapters"):
        load_items(TASKS["boolq"], tmp_path)


def test_packaged_records_need_no_source(tmp_path):
    assert len(load_items(TASKS["gsm8k"])) == 50
    items = load_items(TASKS["arithmetic"], limit=5)
    assert len(items) == 5
    assert all(extract_answer(i.task, f"The answer is {i.answer}.") == float(i.answer) for i in items)
    assert load_items(TASKS["arithmetic"], tmp_path, limit=5) == items
    with pytest.raises(InputError, match=r"Expected boolq.jsonl.*LLM-Adapters"):
        load_items(TASKS["boolq"])


@pytest.mark.parametrize("task", ["winogrande", "social_i_qa", "openbookqa", "AQuA"])
def test_every_packaged_record_spells_its_options(task):
    for real in load_items(TASKS[task]):
        found = choices(real)
        assert real.answer in {choice.label for choice in found}
        assert all(choice.scored.strip() and "Answer format" not in choice.prompt for choice in found)
