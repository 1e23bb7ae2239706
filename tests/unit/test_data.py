from __future__ import annotations

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smtune import InputError
from smtune.data import (
    PACKAGED,
    alpaca_prompt,
    arithmetic,
    count_overlap,
    load_examples,
    make_collator,
    prepare,
    question_key,
    read_records,
    scoring_batches,
)
from smtune.data.arithmetic import TEMPLATES

CHATML = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@pytest.fixture
def tokenizer():
    """One token a word; the end of text pads, as in SmolLM2."""
    words = (
        "<eos> <unk> Question one two three four Answer yes no user assistant <|im_start|> <|im_end|> hi you".split()
    )
    backend = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>", chat_template=CHATML
    )


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def trained(tokenizer, row):
    """The tokens with loss."""
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))
    return words(tokenizer, [label for label in row["labels"] if label != -100])


# Shapes -----------------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_published_one():
    assert alpaca_prompt("Add.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert "### Input:\n1 2\n\n### Response:\n" in alpaca_prompt("Add.", "1 2")
    assert alpaca_prompt("{x} %s").count("{x} %s") == 1


def test_instruction_records(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", [{"instruction": "one", "input": "two", "output": "Answer yes"}])
    (example,) = load_examples(path)
    assert example.segments[0].text == alpaca_prompt("one", "two")
    dataset, report = prepare([example], tokenizer)
    assert trained(tokenizer, dataset[0]) == ["Answer", "yes", "<eos>"]
    assert report.answer_tokens == 3
    assert dataset[0]["length"] == len(dataset[0]["input_ids"]) == report.tokens


def test_prompt_completion_and_text(tmp_path, tokenizer):
    pairs = load_examples(write(tmp_path / "a.jsonl", [{"prompt": "Question one", "completion": "Answer yes"}]))
    texts = load_examples(write(tmp_path / "b.jsonl", [{"text": "one two three"}]))
    assert trained(tokenizer, prepare(pairs, tokenizer)[0][0]) == ["Answer", "yes", "<eos>"]
    assert trained(tokenizer, prepare(pairs, tokenizer, train_on="all")[0][0]) == [
        "Question",
        "one",
        "Answer",
        "yes",
        "<eos>",
    ]
    assert trained(tokenizer, prepare(texts, tokenizer)[0][0]) == ["one", "two", "three", "<eos>"]


def test_chats_have_loss_on_every_assistant_turn_and_its_end(tmp_path, tokenizer):
    turns = [("user", "hi"), ("assistant", "hi you"), ("user", "one"), ("assistant", "two")]
    path = write(tmp_path / "d.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    (row,) = prepare(load_examples(path, tokenizer=tokenizer), tokenizer)[0]
    assert " ".join(words(tokenizer, row["input_ids"])) == (
        "<|im_start|> user hi <|im_end|> <|im_start|> assistant hi you <|im_end|> "
        "<|im_start|> user one <|im_end|> <|im_start|> assistant two <|im_end|>"
    )
    assert trained(tokenizer, row) == ["hi", "you", "<|im_end|>", "two", "<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    path = write(tmp_path / "d.jsonl", [{"messages": turns}])
    with pytest.raises(InputError, match="rewrites earlier turns"):
        load_examples(path, tokenizer=tokenizer)


def test_json_parquet_and_several_sources_read_alike(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": "one", "completion": "two"}, {"prompt": "three", "completion": "four"}]
    lines = write(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert load_examples(lines) == load_examples(tmp_path / "d.json") == load_examples(str(tmp_path / "d.parquet"))
    assert load_examples([lines, tmp_path / "d.json"]) == load_examples(lines) * 2


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "one\u2028two\x85"}\n', encoding="utf-8")
    assert load_examples(path)[0].segments[0].text == "one\u2028two\x85"


# Bad input --------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "one", "completion": "two"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps(GOOD), "{oops"], "d.jsonl, line 2: expected one JSON object. Got Expecting property name"),
        ([json.dumps(GOOD), "", "[1]"], "d.jsonl, line 3: expected a JSON object. Got list"),
        ([json.dumps({"promt": "one", "completion": "x"})], 'line 1: expected the fields instruction.*"prompt"'),
        ([json.dumps(GOOD), json.dumps({"text": "x"})], "1 of 2 rows.*line 2: expected prompt .*Got text, without"),
        ([json.dumps(GOOD | {"completion": 3})], 'line 1: expected "completion" to be a string. Got int'),
        ([json.dumps(GOOD | {"completion": " "})], 'line 1: expected "completion" to have text'),
        ([json.dumps({"instruction": "a", "output": None})], 'expected "output" to be a string. Got NoneType'),
        ([""], "Got an empty source"),
        ([json.dumps({"messages": "hi"})], "with a chat template"),
    ],
)
def test_a_faulty_file_names_path_line_and_what_was_expected(tmp_path, lines, message):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=re.compile(message, re.DOTALL)) as error:
        load_examples(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "a list of turns. Got str"),
        ([{"content": "x"}], 'turn 1: expected an object with "role"'),
        ([{"role": "user", "content": 1}], 'turn 1: expected "content" to be a string'),
        ([{"role": "user", "content": "x"}], "an assistant turn with text"),
    ],
)
def test_a_faulty_chat(tmp_path, tokenizer, messages, message):
    with pytest.raises(InputError, match=message):
        load_examples(write(tmp_path / "d.jsonl", [{"messages": messages}]), tokenizer=tokenizer)


def test_many_faults_are_counted_and_the_first_shown(tmp_path):
    path = write(tmp_path / "d.jsonl", [GOOD, *[{"prompt": "x", "completion": ""}] * 9])
    with pytest.raises(InputError) as error:
        load_examples(path)
    assert "9 of 10 rows" in str(error.value)
    assert "line 2" in str(error.value)
    assert "line 6" in str(error.value)
    assert "line 7" not in str(error.value)
    assert "… and 4 more" in str(error.value)


def test_files_that_are_not_what_they_are_called(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match="line 2: expected UTF-8"):
        load_examples(tmp_path / "d.jsonl")
    (tmp_path / "d.parquet").write_text("no")
    with pytest.raises(InputError, match="expected a Parquet file"):
        load_examples(tmp_path / "d.parquet")
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(InputError, match="ending in .jsonl, .json, .parquet"):
        load_examples(tmp_path / "d.csv")
    (tmp_path / "d.json").write_text('{"text": "x"}')
    with pytest.raises(InputError, match="array of records. Got dict"):
        load_examples(tmp_path / "d.json")
    write(tmp_path / "e.json", [GOOD, GOOD])
    with pytest.raises(InputError, match="name the file .jsonl"):
        load_examples(tmp_path / "e.json")
    with pytest.raises(InputError, match="is a folder"):
        load_examples(tmp_path)


def test_missing_sources_suggest_what_there_is(tmp_path):
    write(tmp_path / "train.jsonl", [GOOD])
    with pytest.raises(InputError, match='no such file. Did you mean "train.jsonl"'):
        load_examples(tmp_path / "trian.jsonl")
    with pytest.raises(InputError, match='Did you mean "arithmetic"'):
        load_examples("arithmetik")


def test_an_unknown_format_or_option(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", [GOOD])
    with pytest.raises(InputError, match='Did you mean "messages"'):
        load_examples(path, format="message")
    with pytest.raises(InputError, match='Did you mean "answer"'):
        prepare(load_examples(path), tokenizer, train_on="anwser")


def test_the_hub_is_asked_for_names_and_its_refusal_is_told(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="owner/name:main.*no such file, and the hub.*offline"):
        load_examples("owner/name:main", split="test")
    assert asked == [(("owner/name", "main"), {"split": "test"})]


# Lengths ----------------------------------------------------------------------------------------------------------


def long_and_short(tmp_path):
    rows = [{"prompt": "one two three four", "completion": "Answer yes"}, {"prompt": "one", "completion": "no"}]
    return load_examples(write(tmp_path / "d.jsonl", rows))


def test_long_examples_are_dropped_and_counted(tmp_path, tokenizer):
    dataset, report = prepare(long_and_short(tmp_path), tokenizer, max_length=5)
    assert len(dataset) == 1
    assert (report.n_examples, report.n_kept, report.n_dropped, report.longest) == (2, 1, 1, 7)
    assert "1 dropped: longer than 5 tokens (longest 7)" in str(report)


def test_prompts_are_cut_from_the_left_and_answers_never(tmp_path, tokenizer):
    dataset, report = prepare(long_and_short(tmp_path), tokenizer, max_length=5, on_long="truncate_prompt")
    assert words(tokenizer, dataset[0]["input_ids"]) == ["three", "four", "Answer", "yes", "<eos>"]
    assert trained(tokenizer, dataset[0]) == ["Answer", "yes", "<eos>"]
    assert (report.n_prompts_cut, report.n_dropped) == (1, 0)
    _, report = prepare(long_and_short(tmp_path), tokenizer, max_length=2, on_long="truncate_prompt")
    assert report.n_dropped == 1  # its answer alone is 3 tokens


def test_a_beginning_token_survives_the_cut(tmp_path, tokenizer):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 1)]
    )
    dataset, _ = prepare(long_and_short(tmp_path), tokenizer, max_length=5, on_long="truncate_prompt")
    assert words(tokenizer, dataset[0]["input_ids"]) == ["<unk>", "four", "Answer", "yes", "<eos>"]


def test_long_examples_can_be_an_error(tmp_path, tokenizer):
    with pytest.raises(InputError, match="at most 5 tokens. Got 7 in example 1"):
        prepare(long_and_short(tmp_path), tokenizer, max_length=5, on_long="error")


def test_nothing_left_is_an_error(tmp_path, tokenizer):
    with pytest.raises(InputError, match="raise max_length to 7"):
        prepare(long_and_short(tmp_path), tokenizer, max_length=1)


def test_long_texts_are_split_without_loss(tmp_path, tokenizer):
    examples = load_examples(write(tmp_path / "d.jsonl", [{"text": "one two three four one two"}]))
    dataset, report = prepare(examples, tokenizer, max_length=3)
    joined = [word for row in dataset for word in words(tokenizer, row["input_ids"])]
    assert joined == ["one", "two", "three", "four", "one", "two", "<eos>"]
    assert (report.n_kept, report.n_dropped, report.tokens) == (3, 0, 7)


# Batches ----------------------------------------------------------------------------------------------------------


def test_padding_is_masked_by_position_though_the_end_token_pads(tmp_path, tokenizer):
    dataset, _ = prepare(long_and_short(tmp_path), tokenizer)
    batch = make_collator(tokenizer)([{k: row[k] for k in ("input_ids", "labels")} for row in dataset])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [7, 3]
    assert batch["labels"][1].tolist()[:3] == [-100, tokenizer.convert_tokens_to_ids("no"), tokenizer.eos_token_id]
    assert (batch["labels"][1, 3:] == -100).all()


def test_scoring_batches_are_whole_distinct_and_seeded(tokenizer, tmp_path):
    rows = [{"prompt": "one", "completion": word} for word in ["one", "two", "three", "four", "yes", "no", "hi"]]
    dataset, _ = prepare(load_examples(write(tmp_path / "d.jsonl", rows)), tokenizer)
    batches = list(scoring_batches(dataset, tokenizer, batch_size=2, n_batches=10, seed=3))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2]
    seen = torch.cat([batch["input_ids"][:, 1] for batch in batches]).tolist()
    assert len(set(seen)) == 6
    again = list(scoring_batches(dataset, tokenizer, batch_size=2, n_batches=10, seed=3))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again))
    assert set(batches[0]) == {"input_ids", "attention_mask", "labels"}


# What the package carries -----------------------------------------------------------------------------------------


def test_packaged_data_is_what_the_notice_says():
    sets = {name: {record["task"] for record in read_records(name)} for name in PACKAGED}
    assert sets["mini/math"] == {"gsm8k", "AQuA"}
    assert sets["mini/commonsense"] == {"winogrande", "social_i_qa", "openbookqa"}
    assert sets["mini/test"] == {"gsm8k", "AQuA", "SVAMP", "winogrande", "social_i_qa", "openbookqa"}
    assert len(load_examples("mini/math")) == 1100
    assert len(load_examples("mini/commonsense")) == 900
    test = read_records("mini/test")
    assert count_overlap(test, [*read_records("mini/math"), *read_records("mini/commonsense")]) == 0


def test_arithmetic_is_right_distinct_and_split():
    train, test = arithmetic(2000, "train"), arithmetic(500, "test", seed=9)
    assert len({record["instruction"] for record in train}) == 2000
    assert count_overlap(test, train) == 0
    assert sum(map(len, TEMPLATES.values())) >= 25
    for record in train:
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (-?\d+)\.", record["output"])
        for left, sign, right, result in steps:
            assert eval(f"{left} {sign} {right}") == int(result)
        assert record["output"].endswith(f"{steps[-1][3]}. The answer is {record['answer']}.")
        assert int(record["answer"]) >= 0
        numbers = set(re.findall(r"\d+", record["instruction"]))
        assert steps[0][0] in numbers
        assert all(right in numbers for _, _, right, _ in steps)
    assert arithmetic(5, seed=1) == arithmetic(5, seed=1) != arithmetic(5, seed=2)


def test_question_keys_ignore_spacing_and_case():
    assert question_key("How many, in ALL?") == question_key("how many in all")
    assert count_overlap([{"instruction": "A b?"}], [{"instruction": "a  B"}]) == 1
