"""What goes in comes out as tokens with loss where it belongs, or as an error that says where it is wrong."""

from __future__ import annotations

import hashlib
import json
import re

import datasets
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from smtune.data import (
    PACKAGED,
    Collator,
    alpaca_prompt,
    arithmetic,
    batches,
    check_records,
    comparison,
    count_overlap,
    encode,
    packaged_tests,
    prepare,
    question_key,
    read_records,
    read_rows,
    to_example,
)
from smtune.data.arithmetic import TEMPLATES
from smtune.data.sources import ASSETS, N_ARITHMETIC, N_COMPARISON, TEST_TASKS
from smtune.errors import InputError

PERMISSIVE = {"gsm8k", "AQuA", "SVAMP", "winogrande", "social_i_qa", "openbookqa"}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS, BOS = "<|im_end|>", "<s>"


@pytest.fixture
def tokenizer():
    """A token per character, so that borders can be read off; the end of sequence pads, as in SmolLM2."""
    characters = [chr(code) for code in (10, *range(32, 127))]
    vocabulary = {token: k for k, token in enumerate([EOS, BOS, "<|im_start|>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken(token, special=True) for token in (EOS, BOS, "<|im_start|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=EOS, bos_token=BOS, unk_token="<unk>", chat_template=CHATML
    )


@pytest.fixture
def bos_tokenizer(tokenizer):
    """One that puts a begin-of-sequence token before every text, as Llama's does."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    return tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokens(tokenizer, row):
    return "".join(tokenizer.convert_ids_to_tokens(row["input_ids"]))


def trained(tokenizer, row):
    """The tokens with loss; "·" for each without."""
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))
    return "".join("·" if label == -100 else tokenizer.convert_ids_to_tokens(label) for label in row["labels"])


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def error_of(call, *args, **kwargs):
    with pytest.raises(InputError) as raised:
        call(*args, **kwargs)
    return str(raised.value)


# The prompt -----------------------------------------------------------------------------------------------------------


def test_prompt_without_input():
    assert alpaca_prompt("Add {x}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {x}.\n\n### Response:\n"
    )


def test_prompt_with_input():
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n"
    )


# Shapes and masks, token by token -------------------------------------------------------------------------------------


def test_instruction_records_train_on_the_output(tokenizer):
    for extra, prompt in (({}, alpaca_prompt("Q")), ({"input": None}, alpaca_prompt("Q")),
                          ({"input": "I"}, alpaca_prompt("Q", "I"))):  # fmt: skip
        dataset, report = prepare([{"instruction": "Q", "output": "yes", "answer": "no", **extra}], tokenizer)
        assert tokens(tokenizer, dataset[0]) == f"{prompt}yes{EOS}"
        assert trained(tokenizer, dataset[0]) == "·" * len(prompt) + f"yes{EOS}"
        assert dataset[0]["length"] == len(prompt) + 4 == report.tokens == report.longest
        assert (report.n_examples, report.answer_tokens) == (1, 4)


def test_prompt_and_completion_are_joined_as_they_stand(tokenizer):
    dataset, _ = prepare([pair("ab ", " cd")], tokenizer)
    assert tokens(tokenizer, dataset[0]) == f"ab  cd{EOS}"
    assert trained(tokenizer, dataset[0]) == f"··· cd{EOS}"


def test_a_token_never_straddles_prompt_and_answer(tokenizer):
    whole = {"<eos>": 0, "<unk>": 1, "a": 2, "b": 3, "ab": 4}
    backend = Tokenizer(models.BPE(whole, [("a", "b")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenizer("ab")["input_ids"] == [4]
    dataset, _ = prepare([pair("a", "b")], tokenizer)
    assert (dataset[0]["input_ids"], dataset[0]["labels"]) == ([2, 3, 0], [-100, 3, 0])


def test_plain_text_and_train_on_all_give_loss_to_every_token(tokenizer):
    assert trained(tokenizer, prepare([{"text": "abc"}], tokenizer)[0][0]) == f"abc{EOS}"
    dataset, report = prepare([pair("ab", "cd")], tokenizer, train_on="all")
    assert trained(tokenizer, dataset[0]) == f"abcd{EOS}"
    assert report.answer_tokens == 3


def test_bos_leads_only_where_the_tokenizer_adds_it(bos_tokenizer):
    assert tokens(bos_tokenizer, prepare([pair("ab", "cd")], bos_tokenizer)[0][0]) == f"{BOS}abcd{EOS}"
    conversation = prepare([chat(("user", "u"), ("assistant", "a"))], bos_tokenizer)[0][0]
    assert BOS not in tokens(bos_tokenizer, conversation)


def test_conversations_have_loss_on_every_assistant_turn_and_its_end(tokenizer):
    turns = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"), ("user", "q3")]
    row = prepare([chat(*turns)], tokenizer)[0][0]
    spans = [(f"<|im_start|>{role}\n", f"{content}{EOS}\n", role == "assistant") for role, content in turns]
    assert tokens(tokenizer, row) == "".join(head + body for head, body, _ in spans)

    def length(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    expected = [head_or_body for head, body, loss in spans for head_or_body in ((head, False), (body, loss))]
    assert trained(tokenizer, row) == "".join(text if loss else "·" * length(text) for text, loss in expected)


def test_a_conversation_is_tokenised_as_one_text(tokenizer):
    """Of a tokenizer that begins every text with a space, as SentencePiece's, no turn gets one but the first."""
    backend = tokenizer.backend_tokenizer
    spaces = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split("", "isolated")])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}" + (
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    row = prepare([chat(("user", "q"), ("assistant", "Yes"), ("user", "r"), ("assistant", "No"))], tokenizer)[0][0]
    assert tokens(tokenizer, row).replace(" ", "") == "_u:q;a:Yes;u:r;a:No;"
    assert trained(tokenizer, row).replace(" ", "") == "·" * 7 + "Yes;" + "·" * 6 + "No;"
    assert tokens(tokenizer, prepare([pair("ab", "cd")], tokenizer)[0][0]).replace(" ", "") == f"_ab_cd{EOS}"


def test_a_space_that_belongs_to_the_next_turns_token_is_not_lost(tokenizer):
    """Byte-level tokenizers tell where the word starts, not the space before it, which the token holds as well."""
    vocabulary = {"\u0120": 0, "Y": 1, ":": 2, "\u0120Y": 3, EOS: 4}
    backend = Tokenizer(models.BPE(vocabulary, [("\u0120", "Y")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS)
    spaced.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert spaced(": Y")["input_ids"] == [2, 3]
    row = prepare([chat(("user", ": "), ("assistant", "Y"))], spaced)[0][0]
    assert row["input_ids"] == [2, 0, 1]
    assert row["labels"] == [-100, -100, 1]


def test_a_token_in_two_turns_is_cut_where_the_answer_starts(tokenizer):
    vocabulary = {"a": 0, "b": 1, "ab": 2, EOS: 3}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS)
    whole.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    row = prepare([chat(("user", "a"), ("assistant", "b"))], whole)[0][0]
    assert row["input_ids"] == [0, 1]
    assert row["labels"] == [-100, 1]


def test_a_key_that_a_message_lacks_does_not_reach_the_template_as_null(tokenizer, tmp_path, monkeypatch):
    calling = chat(("user", "q"), ("assistant", "a"))
    calling["messages"][1]["tool_calls"] = [{"name": "f"}]
    datasets.Dataset.from_list([calling]).to_parquet(tmp_path / "d.parquet")
    (record,) = read_records(tmp_path / "d.parquet")
    assert record.fields["messages"][0]["tool_calls"] is None
    given = []

    def render(messages, **options):  # in place of transformers', which leaves nulls out in newer releases
        given[:] = messages
        return "".join(message["content"] for message in messages)

    monkeypatch.setattr(tokenizer, "apply_chat_template", render)
    to_example(record, tokenizer)
    assert given == calling["messages"]


def test_a_template_that_writes_the_date_gives_the_same_rows_on_any_day(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    row = prepare([chat(("user", "q"), ("assistant", "a"))], tokenizer)[0][0]
    assert tokens(tokenizer, row).startswith("26 Jul 2024<|im_start|>")
    tokenizer.chat_template = "\nIt is {% set day = strftime_now('%Y-%m-%d') %}{{ day }}." + CHATML
    row = prepare([chat(("user", "q"), ("assistant", "a"))], tokenizer)[0][0]
    assert tokens(tokenizer, row).startswith("\nIt is 2024-07-26.<|im_start|>")


def test_answers_that_do_not_teach_to_stop_are_told_of(tokenizer):
    rows = [chat(("user", "q"), ("assistant", "a")), chat(("user", "q" * 90), ("assistant", "a"))]
    report = prepare(rows, tokenizer, max_length=60)[1]
    assert report.n_endless == 0
    assert "end-of-sequence" not in str(report)
    tokenizer.eos_token = "<unk>"  # the template ends a turn by another
    report = prepare(rows, tokenizer, max_length=60)[1]
    assert (report.n_examples, report.n_dropped, report.n_endless) == (1, 1, 1)
    assert "1 conversations of which no answer ends in the tokenizer's end-of-sequence token" in str(report)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    message = error_of(prepare, [chat(("user", "q"), ("assistant", "a"))], tokenizer)
    assert "only appends when a turn is added" in message
    assert "record 1" in message


@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{{ messages[7].role.x }}"])
def test_a_template_that_cannot_render(tokenizer, template):
    tokenizer.chat_template = template
    assert "the chat template can render at record 1. Got: " in error_of(
        prepare, [chat(("user", "q"), ("assistant", "a"))], tokenizer
    )


def test_conversations_need_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    (record,) = check_records([("d.jsonl, line 1", chat(("user", "q"), ("assistant", "a")))])
    for missing in (None, tokenizer):
        assert "Expected a tokenizer with a chat template to render d.jsonl, line 1" in error_of(
            to_example, record, missing
        )


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    tokenizer.eos_token = None
    assert "end-of-sequence token" in error_of(prepare, [pair("a", "b")], tokenizer)


# Too long -------------------------------------------------------------------------------------------------------------

LONG = [pair("0123456789", "abc"), pair("0", "a"), pair("01", "abcdefghi")]  # 14, 3 and 12 tokens


def test_too_long_is_dropped_and_counted(tokenizer):
    dataset, report = prepare(LONG, tokenizer, max_length=8)
    assert [tokens(tokenizer, row) for row in dataset] == [f"0a{EOS}"]
    assert (report.n_examples, report.n_dropped, report.n_prompt_truncated, report.longest) == (1, 2, 0, 14)
    assert str(report) == "1 examples, 3 tokens (2 of answers); longest 14 of 8 allowed; 2 dropped as too long"


def test_a_prompt_is_truncated_from_its_beginning_and_an_answer_never(tokenizer):
    dataset, report = prepare(LONG, tokenizer, max_length=8, on_long="truncate_prompt")
    assert [trained(tokenizer, row) for row in dataset] == [f"····abc{EOS}", f"·a{EOS}"]
    assert tokens(tokenizer, dataset[0]) == f"6789abc{EOS}"
    assert (report.n_examples, report.n_dropped, report.n_prompt_truncated) == (2, 1, 1)
    assert (report.tokens, report.answer_tokens) == (11, 6)


@pytest.mark.parametrize(("max_length", "kept"), [(14, "0123456789"), (13, "123456789"), (5, "9"), (4, None)])
def test_truncation_leaves_a_token_of_the_prompt(tokenizer, max_length, kept):
    dataset, report = prepare(LONG[:2], tokenizer, max_length=max_length, on_long="truncate_prompt")
    first = tokens(tokenizer, dataset[0])
    assert first == (f"0a{EOS}" if kept is None else f"{kept}abc{EOS}")
    assert report.n_dropped == (kept is None)


def test_truncation_keeps_bos(bos_tokenizer):
    row = prepare(LONG[:1], bos_tokenizer, max_length=8, on_long="truncate_prompt")[0][0]
    assert tokens(bos_tokenizer, row) == f"{BOS}789abc{EOS}"


def test_too_long_can_be_an_error(tokenizer):
    message = error_of(prepare, LONG, tokenizer, max_length=8, on_long="error")
    assert "at most 8 tokens at record 1. Got 14" in message


def test_nothing_left_is_an_error_that_says_how_long(tokenizer):
    message = error_of(prepare, [LONG[0], LONG[2]], tokenizer, max_length=8)
    assert "all 2 are longer, from 12 to 14. Raise max_length to 14" in message


def test_long_texts_are_split_evenly_and_nothing_is_lost(tokenizer):
    dataset, report = prepare([{"text": "0123456789"}, {"text": "ab"}], tokenizer, max_length=5)
    assert "".join(tokens(tokenizer, row) for row in dataset) == f"0123456789{EOS}ab{EOS}"
    assert dataset["length"][:] == [3, 4, 4, 3]
    assert (report.n_examples, report.n_split, report.n_dropped, report.tokens) == (4, 1, 0, 14)
    assert "1 texts split" in str(report)


def test_a_truncation_saved_with_the_tokenizer_cuts_nothing(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert tokens(tokenizer, prepare([pair("abcd", "efgh")], tokenizer)[0][0]) == f"abcdefgh{EOS}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "anwser"}, 'train_on among answer, all. Got "anwser". Did you mean "answer"?'),
        ({"on_long": "truncate"}, 'on_long among drop, truncate_prompt, error. Got "truncate".'),
        ({"max_length": 1}, "max_length of at least 2 tokens. Got 1"),
        ({"limit": 0}, "limit of at least 1 record. Got 0"),
        ({"format": "message"}, 'Got "message". Did you mean "messages"?'),
    ],
)
def test_wrong_options(tokenizer, options, message):
    assert message in error_of(prepare, LONG, tokenizer, **options)


def test_encode_needs_an_example(tokenizer):
    assert "at least one example" in error_of(encode, [], tokenizer, max_length=8)


# Batches --------------------------------------------------------------------------------------------------------------


def test_padding_has_no_loss_though_the_end_token_pads(tokenizer):
    dataset, _ = prepare(LONG, tokenizer)
    batch = Collator(tokenizer.eos_token_id)(list(dataset))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.shape == (3, 16) and tensor.dtype == torch.int64 for tensor in batch.values())
    for k, length in enumerate((14, 3, 12)):
        assert batch["attention_mask"][k].tolist() == [1] * length + [0] * (16 - length)
        assert (batch["input_ids"][k, length:] == tokenizer.eos_token_id).all()
        assert batch["labels"][k, length - 1] == tokenizer.eos_token_id  # the true end keeps its loss
        assert (batch["labels"][k, length:] == -100).all()
    assert Collator(0, multiple_of=1)(list(dataset))["labels"].shape == (3, 14)


def test_batches_are_seeded_and_never_repeat_a_row(tokenizer):
    dataset, _ = prepare([pair("p", letter) for letter in "abcdefg"], tokenizer)
    collator = Collator(0)

    def drawn(**options):
        return [batch["input_ids"][:, 1].tolist() for batch in batches(dataset, collator, 2, **options)]

    assert [len(batch) for batch in drawn(seed=1, n=10)] == [2, 2, 2, 1]
    assert len({row for batch in drawn(seed=1) for row in batch}) == 7
    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=1, n=2) == drawn(seed=1)[:2]
    assert "batch size of at least 1" in error_of(list, batches(dataset, collator, 0))


def test_the_loss_of_a_batch_is_that_of_its_answers(tokenizer, tiny_llama):
    dataset, _ = prepare([pair("ab", "cd"), pair("abcdef", "g")], tokenizer)
    (batch,) = batches(dataset, Collator(tokenizer.eos_token_id), 2)
    with torch.no_grad():
        output = tiny_llama(**batch)
        total, count = 0.0, 0
        for row in dataset:
            ids = torch.tensor(row["input_ids"])[None]
            scores = tiny_llama(ids).logits[0].log_softmax(-1)
            for position in range(1, ids.shape[1]):
                if row["labels"][position] != -100:
                    total -= scores[position - 1, ids[0, position]].item()
                    count += 1
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_trainer_groups_the_dataset_by_length(tokenizer, tiny_llama, tmp_path):
    from transformers import Trainer, TrainingArguments

    dataset, _ = prepare([pair("p", "a" * n) for n in range(1, 41)] * 12, tokenizer)
    padding = {}
    for strategy in ("random", "group_by_length"):
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=6,
            train_sampling_strategy=strategy,
            length_column_name="length",
            use_cpu=True,
            report_to="none",
        )
        trainer = Trainer(tiny_llama, arguments, train_dataset=dataset, data_collator=Collator(0, multiple_of=1))
        padding[strategy] = sum((batch["attention_mask"] == 0).sum().item() for batch in trainer.get_train_dataloader())
    assert padding["group_by_length"] < padding["random"] / 2


# Sources --------------------------------------------------------------------------------------------------------------


def test_json_lines_arrays_and_parquet_read_alike(tmp_path):
    rows = [
        {"instruction": "a", "input": None, "output": "b"},
        {"instruction": "c", "input": "d", "output": "é\u2028x"},
    ]
    folder = tmp_path / "a [b] *"
    folder.mkdir()
    lines = write(folder / "d.jsonl", rows)
    write(folder / "lines.json", rows)
    (folder / "bom.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8-sig")
    (folder / "array.json").write_text(json.dumps(rows, indent=2))
    (folder / "array.JSONL").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(folder / "d.parquet")
    expected = [to_example(record).segments for record in read_records(lines)]
    for name in ("lines.json", "bom.jsonl", "array.json", "array.JSONL", "d.parquet"):
        records = read_records(folder / name)
        assert [to_example(record).segments for record in records] == expected, name
        assert str(folder / name) in records[1].where
        assert ("line 2" if "lines" in name or "bom" in name else "record 2") in records[1].where


def test_a_mix_may_hold_several_shapes(tmp_path, tokenizer):
    pairs = write(tmp_path / "a.jsonl", [pair("p", "c")])
    texts = write(tmp_path / "b.jsonl", [{"text": "t"}])
    records = read_records([pairs, str(texts), "mini/math"])
    assert [record.shape for record in records[:3]] == ["prompt_completion", "text", "instruction"]
    assert len(records) == 1102


def test_rows_and_a_loaded_dataset_are_sources_too():
    rows = [pair("p", "c"), pair("q", "d")]
    assert read_records(datasets.Dataset.from_list(rows)) == read_records(rows)
    assert read_records(rows)[1].where == "record 2"
    assert "Got a list with a int in it" in error_of(read_records, [1])
    assert "Got an empty list" in error_of(read_records, [])


def test_a_limit_draws_by_seed_and_keeps_the_order():
    rows = [{"text": str(k)} for k in range(100)]

    def drawn(**options):
        return [int(record.fields["text"]) for record in read_records(rows, **options)]

    assert len(drawn(limit=7)) == 7
    assert drawn(limit=7) == sorted(drawn(limit=7)) == drawn(limit=7, seed=0) != drawn(limit=7, seed=1)
    assert drawn(limit=1000) == list(range(100))
    # The limit spares no row from the check.
    assert "line 100" in error_of(check_records, [(f"line {k}", {"text": "x" * (k != 100)}) for k in range(1, 101)])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:main", ("owner/name", "main", "train")),
        ("hub:owner/name:main:train[:10%]", ("owner/name", "main", "train[:10%]")),
        ("hub:short::test", ("short", None, "test")),
    ],
)
def test_hub_names(monkeypatch, name, arguments):
    calls = []

    def load(repository, config, split):
        calls.append((repository, config, split))
        return datasets.Dataset.from_list([{"text": "t"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (record,) = read_records(name)
    assert calls == [arguments]
    assert record.where == f"{name.removeprefix('hub:')}, record 1"


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no network.")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = error_of(read_records, "owner/name")
    assert 'Expected a data set "owner/name" on the hub' in message
    assert "Got: no network. If it is private, log in" in message
    assert "there is none at that path" in message


# Bad input ------------------------------------------------------------------------------------------------------------

GOOD = json.dumps(pair("p", "c"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{oops"], "line 2: Expected one JSON object on a line. Got Expecting property name"),
        ([GOOD, "", '{"prompt": "p"'], "line 3: Expected one JSON object on a line. Got "),
        ([GOOD, '"text"'], "line 2: Expected an object with named fields. Got a string."),
        ([GOOD, "3"], "line 2: Expected an object with named fields. Got the number 3."),
        (['{"promt": "p", "completion": "c"}'], 'line 1: Expected the fields of one shape: "messages" (messages); '
         '"instruction" and "output" (instruction); "prompt" and "completion" (prompt_completion); "text" (text). '
         'Got the fields promt, completion. Did you mean "prompt"?'),
        (['{"conversations": []}'], 'ShareGPT\'s "conversations" become "messages"'),
        (["{}"], "Got no fields."),
        (['{"instruction": "i", "output": null}'], "Got the fields instruction."),
        (['{"prompt": "p", "completion": "c", "messages": []}'], "Got those of messages and prompt_completion: say "
         'which by "format".'),
        ([GOOD, '{"text": "t"}'], 'line 2: Expected "prompt" and "completion" (shape prompt_completion). Got a record '
         "of the shape text. All records of a source have one shape: split the file"),
        ([GOOD, '{"prompt": "p", "answer": "a"}'], 'line 2: Expected "prompt" and "completion" (shape '
         "prompt_completion). Got the fields prompt, answer."),
        (['{"prompt": "p", "completion": 3}'], 'line 1: Expected "completion" to be a string. Got the number 3.'),
        (['{"prompt": ["p"], "completion": "c"}'], 'Expected "prompt" to be a string. Got a list.'),
        (['{"instruction": "i", "input": {}, "output": "o"}'], 'Expected "input" to be a string. Got an object.'),
        (['{"text": true}'], 'Expected "text" to be a string. Got a truth value.'),
        (['{"prompt": "p", "completion": " \\n"}'], 'Expected "completion" to hold text. Got an empty string.'),
        (['{"instruction": "i", "output": ""}'], 'Expected "output" to hold text. Got an empty string.'),
        (['{"instruction": "", "output": "o"}'], 'Expected "instruction" to hold text. Got an empty string.'),
        (['{"text": "a\\ud800"}'], "Expected \"text\" to be Unicode text. Got the lone surrogate '\\ud800'."),
        (['{"messages": "hi"}'], 'Expected "messages" to be a list. Got a string.'),
        (['{"messages": ["hi"]}'], 'Expected message 1 to be an object with "role" and "content". Got a string.'),
        (['{"messages": [{"content": "x"}]}'], 'In message 1: Expected "role" to be a string. Got null.'),
        ([json.dumps(chat(("user", "q")))], 'Expected a message with the role "assistant" to train on. Got user.'),
        (['{"messages": []}'], 'the role "assistant" to train on. Got no messages.'),
        ([json.dumps(chat(("user", "q"), ("assistant", "")))], "Expected message 2, an assistant's, to hold text."),
        ([json.dumps(chat(("assistant", "hi"), ("user", "q"), ("assistant", "a")))],
         "Expected a message before the first answer. Got a conversation that begins with an assistant's."),
        ([json.dumps({**chat(("user", "q"), ("assistant", "a")), "tools": [{"name": "f"}]})],
         'Expected a conversation without "tools", which are not rendered into the prompt.'),
    ],
)  # fmt: skip
def test_a_bad_record(tmp_path, lines, message):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    found = error_of(read_records, path)
    assert message in found
    assert f"{path}, line " in found
    assert "Found 1 fault of " in found


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "d.json"
    path.write_text(content)
    assert f"at least one record in {path}. Got an empty file" in error_of(read_records, path)


def test_many_faults_are_counted_and_the_first_few_shown(tmp_path):
    path = write(tmp_path / "d.jsonl", [pair("p", "c"), *[pair("p", "")] * 9])
    lines = error_of(read_records, path).splitlines()
    assert lines[0] == "Found 9 faults of 10 records:"
    assert [re.search(r"line (\d+)", line)[1] for line in lines[1:6]] == ["2", "3", "4", "5", "6"]
    assert lines[6:] == ["  ... and 4 more.", "Correct or remove them and start again."]


def test_a_format_that_is_named_is_held_to(tmp_path):
    both = [{"prompt": "p", "completion": "c", **chat(("user", "q"), ("assistant", "a"))}]
    assert read_records(both, format="messages")[0].shape == "messages"
    assert 'Expected "text" (shape text). Got a record of the shape' in error_of(read_records, both, format="text")


def test_the_text_column_of_alpaca_does_not_confuse():
    (record,) = read_records([{"instruction": "i", "input": "", "output": "o", "text": "all of it"}])
    assert record.shape == "instruction"


def test_a_bad_array(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('[\n{"text": "a"},\n{"text": }\n]')
    assert f"Expected a JSON array of records at {path}, line 3. Got Expecting value" in error_of(read_records, path)
    path.write_text('[{"text": "a"}, {"text": 1}]')
    assert f"{path}, record 2: Expected" in error_of(read_records, path)


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert f"Expected UTF-8 text at {path}, line 2. Got the byte 0xe9" in error_of(read_records, path)


def test_paths_that_lead_nowhere(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "t"}])
    assert 'Got nothing there. Did you mean "train.jsonl"?' in error_of(read_records, tmp_path / "trian.jsonl")
    assert "Expected a file at nowhere/d.json. Got nothing there." in error_of(read_records, "nowhere/d.json")
    assert f"Got the folder {tmp_path}" in error_of(read_records, tmp_path)
    (tmp_path / "d.csv").write_text("a,b")
    message = error_of(read_records, tmp_path / "d.csv")
    assert 'Expected .json, .jsonl, .parquet. Got the extension ".csv"' in message
    (tmp_path / "d.parquet").write_text("junk")
    assert f"Expected a Parquet file at {tmp_path / 'd.parquet'}" in error_of(read_records, tmp_path / "d.parquet")


@pytest.mark.parametrize(
    ("name", "meant"), [("arithmetc", "arithmetic"), ("mini/mth", "mini/math"), ("commonsense", "mini/commonsense")]
)
def test_names_that_are_almost_right(name, meant):
    message = error_of(read_records, name)
    assert f'a hub name ("owner/name"). Got "{name}". Did you mean "{meant}"?' in message


# Overlap --------------------------------------------------------------------------------------------------------------


def test_questions_are_compared_without_layout():
    assert question_key("How many, in ALL:\n 12?") == question_key("how many in all 12") == "howmanyinall12"
    assert question_key("Œuvre №1") == "œuvre1"


def test_overlap_counts_test_records():
    train = [{"instruction": "A b?", "output": "x"}, pair("C", "y"), chat(("user", "D"), ("assistant", "z")), {"id": 1}]
    test = [{"instruction": "a  B"}, {"instruction": "a  B!"}, {"text": "c"}, pair("d", ""), {"instruction": "e"}, {}]
    assert count_overlap(train, test) == 4
    assert count_overlap([{"instruction": "a", "input": "b"}], [{"instruction": "a"}]) == 0


# What the package carries ---------------------------------------------------------------------------------------------


def test_packaged_training_data_is_sound_and_permissive():
    tasks = {
        "mini/math": {"gsm8k": 800, "AQuA": 300},
        "mini/commonsense": {"winogrande": 300, "social_i_qa": 300, "openbookqa": 300},
        "arithmetic": {"arithmetic": N_ARITHMETIC},
        "comparison": {"comparison": N_COMPARISON},
    }
    for name, expected in tasks.items():
        found = [record.fields["task"] for record in read_records(name)]
        assert {task: found.count(task) for task in set(found)} == expected


def test_packaged_tests():
    rows = read_rows("mini/test")
    assert {row["task"] for row in rows} == PERMISSIVE == set(TEST_TASKS)
    assert len(rows) == 300
    assert all(row["answer"] for row in rows)
    for task in (*TEST_TASKS, "arithmetic", "comparison"):
        assert {row["task"] for row in read_rows(packaged_tests() / f"{task}.jsonl")} == {task}
    assert read_rows("arithmetic/test") == arithmetic(200, split="test")
    assert read_rows("comparison/test") == comparison(200, split="test")
    # Their mathematical records hold no output on purpose, so they cannot be trained on by mistake.
    assert 'Expected "output" to hold text' in error_of(read_records, "mini/test")


def test_no_packaged_test_question_is_in_packaged_training_data():
    train = read_rows(["mini/math", "mini/commonsense", "arithmetic", "comparison"])
    test = read_rows(["mini/test", "arithmetic/test", "comparison/test"])
    assert count_overlap(train, test) == 0
    assert count_overlap(test, test) == len(test)


def test_the_readme_of_the_packaged_data_is_true():
    readme = (ASSETS / "README.md").read_text(encoding="utf-8")
    files = {path.relative_to(ASSETS).as_posix(): path.read_bytes() for path in ASSETS.rglob("*.jsonl")}
    rows = re.findall(r"^\| `(\S+\.jsonl)` \| `(\S+)` \|.* (\d+) \| `([0-9a-f]{64})` \|$", readme, re.MULTILINE)
    assert {file: (int(size), digest) for file, _, size, digest in rows} == {
        file: (len(data), hashlib.sha256(data).hexdigest()) for file, data in files.items()
    }
    assert {name for _, name, _, _ in rows} < set(PACKAGED)


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_arithmetic_answers_follow_from_the_question():
    for record in arithmetic(1000, seed=4):
        *lines, last = record["output"].split("\n")
        values = set(re.findall(r"\d+", record["instruction"]))
        for line in lines:
            left, symbol, right, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", line).groups()
            assert (
                {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[symbol]
                == int(result)
                > 0
            )
            assert {left, right} <= values  # nothing is computed from numbers that are not given or found
            values.add(result)
        assert last == f"The answer is {result}."
        assert record["answer"] == result
        assert "{" not in record["instruction"]


def test_arithmetic_has_many_templates_of_several_kinds():
    assert len({question for _, question in TEMPLATES}) == len(TEMPLATES) >= 25
    assert len({re.sub(r"\w", "", sums) for sums, _ in TEMPLATES}) >= 8
    for sums, question in TEMPLATES:
        assert set(re.findall(r"[abc]", sums)) == set(re.findall(r"{([abc])}", question))


def test_arithmetic_problems_differ_and_are_drawn_by_seed():
    assert len({question_key(record["instruction"]) for record in arithmetic(2000)}) == 2000
    assert arithmetic(20, seed=1) == arithmetic(20, seed=1) == arithmetic(40, seed=1)[:20] != arithmetic(20, seed=2)
    assert {record["task"] for record in arithmetic(5)} == {"arithmetic"}


def test_arithmetic_splits_share_no_question():
    train = [record for seed in range(2) for record in arithmetic(1000, seed)]
    test = [record for seed in range(2) for record in arithmetic(300, seed, "test")]
    assert count_overlap(train, test) == 0


@pytest.mark.parametrize(
    ("arguments", "message"), [((0,), "Got 0."), ((10**6,), "Got 1,000,000."), ((1, 0, "valid"), 'Got "valid"')]
)
def test_arithmetic_refuses(arguments, message):
    assert message in error_of(arithmetic, *arguments)


# Comparison -----------------------------------------------------------------------------------------------------------


def test_comparison_answers_follow_from_the_question():
    records = comparison(1000, seed=4)
    for record in records:
        asked, options = record["instruction"].split("?")
        numbers = [int(number) for number in re.findall(r"Answer\d: (\d+)", options)]
        assert asked.endswith(f", {numbers[0]} or {numbers[1]}")
        right = max(numbers) if "larger" in asked else min(numbers)
        assert ("larger" in asked) != ("smaller" in asked)
        assert record["answer"] == f"answer{1 + numbers.index(right)}"
        assert record["output"] == f"The answer is {right}.\nthe correct answer is {record['answer']}"
    assert 400 < sum(record["answer"] == "answer1" for record in records) < 600


def test_comparison_splits_share_no_question_and_are_drawn_by_seed():
    assert count_overlap(comparison(2000), comparison(500, seed=1, split="test")) == 0
    assert comparison(20, seed=1) == comparison(40, seed=1)[:20] != comparison(20, seed=2)
    assert "Got 0." in error_of(comparison, 0)
    assert len(comparison(1000, seed=3, split="test")) == 1000
    assert "Expected 1 to 1,000 questions. Got 1,001." in error_of(comparison, 1001, 0, "test")
    assert 'Got "valid"' in error_of(comparison, 1, 0, "valid")


# The real tokenizer ---------------------------------------------------------------------------------------------------


def test_smollm2(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    dataset, report = prepare("arithmetic", tokenizer, limit=200)
    for row, record in zip(dataset, read_records("arithmetic", limit=200)):
        answer = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(answer) == record.fields["output"] + tokenizer.eos_token
        prompt = tokenizer.decode(row["input_ids"][: -len(answer)])
        assert prompt == alpaca_prompt(record.fields["instruction"])
        # Training sees the prompt's tokens exactly as generation does.
        assert tokenizer(prompt)["input_ids"] == row["input_ids"][: -len(answer)]
    assert report.n_dropped == 0
    assert max(sum(label != -100 for label in row["labels"]) for row in dataset) <= 48

    turns = chat(("user", "2 + 2?"), ("assistant", "4"), ("user", "And 3?"), ("assistant", "5"))
    row = prepare([turns], tokenizer)[0][0]
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(turns["messages"], tokenize=False)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "4<|im_end|>\n5<|im_end|>\n"
