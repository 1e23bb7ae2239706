"""The tier's own base model: a Llama of 1.1 M parameters, pretrained here from a seed on text and tasks.

It must know something, so that fine-tuning has something to build on, and be bad at what it is fine-tuned on. So it
reads sums and comparisons written as such, told quantities without a question, instructions in the Alpaca prompt (sums
in digits, which of two numbers is larger), and the packaged training texts, but no question of the two tasks that it is
fine-tuned on. Of the packaged texts a tenth is held out, to tell what fine-tuning forgets.

The weights are kept in bf16, as published models' are. They come to the same bits on the same machine and threads. The
package has them; the hash of what was used is in every cell.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler, set_seed

from smtune.data import alpaca_prompt, read_rows
from smtune.data.arithmetic import MAX_FACTOR, MAX_NUMBER, NAMES, THINGS
from smtune.errors import InputError
from smtune.files import write_json
from smtune.models import SOURCE_FILE, cache_folder, quiet
from smtune.training.folder import write_folder

PACKAGED = Path(__file__).parent.parent / "assets" / "mini"
"""The artefact that is part of the package."""

STEPS, BATCH, LENGTH = 3500, 16, 128
LEARNING_RATE, WARMUP = 3e-3, 100
SEED = 0
VOCABULARY = 1024
TOKENIZER_DOCUMENTS = 20_000
MAX_RESULT = 100
HELD_OUT_SHARE = 10
TEXTS = 2
"""Counts up when `documents` changes: another recipe, another model."""

ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
END, PAD = "<end>", "<pad>"

RECIPE = {
    "steps": STEPS,
    "batch": BATCH,
    "length": LENGTH,
    "learning_rate": LEARNING_RATE,
    "warmup": WARMUP,
    "seed": SEED,
    "vocabulary": VOCABULARY,
    "texts": TEXTS,
    "architecture": ARCHITECTURE,
}
Say = Callable[[str], object]


def folder() -> Path:
    """The folder of the model: the one in the user's cache, else the package's.

    Raises:
        InputError: there is none of this recipe.
    """
    found = _found()
    if found is None:
        raise InputError(
            "Expected the model of the tier mini. It has not been made yet: run `smtune reproduce pretrain-mini`."
        )
    return found[0]


def is_made() -> bool:
    return _found() is not None


def is_cut() -> bool:
    """Whether the model there is was pretrained for fewer steps than the recipe says."""
    found = _found()
    return found is not None and found[1]["steps"] < STEPS


def _found() -> tuple[Path, dict[str, Any]] | None:
    """The folder that is used, with what is written beside the model; None where there is none of this recipe."""
    places = ((place, _source(place)) for place in (_cached(), PACKAGED))
    return next(((place, source) for place, source in places if source is not None), None)


def _source(place: Path) -> dict[str, Any] | None:
    """What is written beside a model of this recipe, full or cut; None where there is none."""
    if not (place / "model.safetensors").is_file():
        return None
    source = json.loads((place / SOURCE_FILE).read_text(encoding="utf-8"))
    return source if {**source, **RECIPE, "steps": source["steps"]} == source else None


def _cached() -> Path:
    recipe = hashlib.sha256(json.dumps(RECIPE, sort_keys=True).encode()).hexdigest()[:8]
    return cache_folder() / f"mini-{recipe}"


# What it reads --------------------------------------------------------------------------------------------------------


def text_of(row: Mapping[str, Any]) -> str:
    """A training record as the text that it becomes."""
    return alpaca_prompt(row["instruction"], row.get("input") or "") + row["output"]


def is_held_out(text: str) -> bool:
    """Whether a packaged text is kept from pretraining."""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


def documents(seed: int = SEED) -> Iterator[str]:
    """Texts without end."""
    draw = random.Random(f"mini {seed}")
    packaged = [text_of(row) for row in read_rows(["mini/math", "mini/commonsense"])]
    packaged = [text for text in packaged if not is_held_out(text)]
    kinds = (_sums, _asked_sum, _asked_larger, _told, lambda draw: draw.choice(packaged))
    while True:
        (kind,) = draw.choices(kinds, weights=(25, 25, 15, 10, 25))
        yield kind(draw)


def _sum(draw: random.Random, left: int | None = None) -> tuple[str, int]:
    """A sum such as ("7 + 5", 12), of the sizes that word problems need; its left number may be given."""
    while True:
        symbol = draw.choice("+-*")
        a = draw.randint(1, MAX_FACTOR if symbol == "*" else MAX_RESULT) if left is None else left
        b = draw.randint(2, MAX_FACTOR if symbol == "*" else MAX_NUMBER)
        result = {"+": a + b, "-": a - b, "*": a * b}[symbol]
        if 0 < result <= MAX_RESULT and not (symbol == "*" and a > MAX_FACTOR):
            return f"{a} {symbol} {b}", result


def _sums(draw: random.Random) -> str:
    sums = [_sum(draw) for _ in range(draw.randint(2, 8))]
    return "\n".join(f"{text} = {result}" for text, result in sums)


def _asked_sum(draw: random.Random) -> str:
    text, result = _sum(draw)
    lines, asked = [f"{text} = {result}"], text
    if draw.random() < 0.5:
        second, last = _sum(draw, left=result)
        symbol, right = second.split()[1:]
        lines.append(f"{second} = {last}")
        asked, result = f"{asked}, then {symbol} {right}", last
    return alpaca_prompt(f"What is {asked}?") + "\n".join([*lines, f"The answer is {result}."])


def _asked_larger(draw: random.Random) -> str:
    a, b = draw.sample(range(1, 2 * MAX_NUMBER + 1), 2)
    if draw.random() < 0.5:
        pairs = [draw.sample(range(1, 2 * MAX_NUMBER + 1), 2) for _ in range(6)]
        return "\n".join(f"{a} is {'more' if a > b else 'fewer'} than {b}" for a, b in pairs)
    word = draw.choice(("larger", "smaller"))
    answer = max(a, b) if word == "larger" else min(a, b)
    return alpaca_prompt(f"Which number is {word}, {a} or {b}?") + f"The answer is {answer}."


def _told(draw: random.Random) -> str:
    sentences = []
    for _ in range(draw.randint(2, 5)):
        p, q = draw.sample(NAMES, 2)
        a, b = draw.randint(2, MAX_NUMBER), draw.randint(2, MAX_NUMBER)
        form = draw.choice(
            (
                "{p} has {a} {things} and {q} has {b}.",
                "{p} found {a} {things}.",
                "There are {a} {things} in each of {b} boxes.",
                "{p} gave {a} {things} to {q}, and {b} were left.",
                "{p} bought {a} {things} on Monday and {b} on Tuesday.",
                "{p} needs {a} {things} and has {b} so far.",
            )
        )
        sentences.append(form.format(p=p, q=q, a=a, b=b, things=draw.choice(THINGS)))
    return " ".join(sentences)


def make_tokenizer(n_documents: int = TOKENIZER_DOCUMENTS) -> PreTrainedTokenizerFast:
    """Byte-level BPE of what the model reads; numbers stay apart from what stands around them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(), n_documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


# Pretraining ----------------------------------------------------------------------------------------------------------


def pretrain(steps: int = STEPS, say: Say = print) -> Path:
    """Make the model in the user's cache, and return its folder; one that is there is left as it is.

    It is used in place of the package's; what is said at the end tells whether the two are the same.

    Args:
        steps: fewer than the recipe's make a model that is marked as cut.
        say: told how it goes.
    """
    place = _cached()
    there = _source(place)
    if there is not None and there["steps"] >= STEPS:
        say(f"{place} is there already.")
        return place
    started = time.perf_counter()
    # A cut needs a tokenizer and no good one: most of its time would go there.
    tokenizer: Any = make_tokenizer(TOKENIZER_DOCUMENTS if steps >= STEPS else 2000)
    set_seed(SEED)
    config = LlamaConfig(
        **ARCHITECTURE,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=min(WARMUP, steps // 2), num_training_steps=steps)
    sequences = _sequences(tokenizer)
    for step in range(1, steps + 1):
        ids = torch.tensor(list(islice(sequences, BATCH)))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - started
            say(f"step {step}/{steps}  loss {loss.item():.3f}  {seconds / step * (steps - step) / 60:.1f} minutes left")
    assert math.isfinite(loss.item())
    model.to(torch.bfloat16)

    def fill(path: Path) -> None:
        with quiet():
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
        source = {"model": "mini", **RECIPE, "steps": steps, "loss": loss.item(), "sha256": digest}
        write_json(path / SOURCE_FILE, source | {"torch": torch.__version__, "threads": torch.get_num_threads()})

    write_folder(place, fill)
    say(f"Wrote {place} in {(time.perf_counter() - started) / 60:.1f} minutes")
    made, packaged = _source(place), _source(PACKAGED)
    if made and packaged and steps >= STEPS:
        same = made["sha256"] == packaged["sha256"]
        say("Its weights are the package's, bit for bit." if same else "Its weights are not the package's.")
    return place


def _sequences(tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Rows of LENGTH tokens cut from the documents one after another."""
    tokens: list[int] = []
    for text in documents(SEED + 1):
        tokens += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]  # type: ignore[list-item]
        while len(tokens) >= LENGTH:
            yield tokens[:LENGTH]
            tokens = tokens[LENGTH:]
