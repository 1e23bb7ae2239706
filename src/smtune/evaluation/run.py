"""Evaluate a causal language model: batched, longest first, resumable.

Two protocols. `generate` is LLM-Adapters': the Alpaca prompt of training, a completion (greedy, or by beam search), the
answer read from it. `likelihood` picks the option whose text the model finds likeliest after the same prompt, so it
needs no format to be learnt; `tasks.Choice` says what is scored, and `harness` scores it a second way.

Shapes: B prompts in a batch, S sequences (one per option), T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from smtune.data.encoding import leading_bos
from smtune.errors import InputError, did_you_mean
from smtune.evaluation import harness
from smtune.evaluation import results as results_
from smtune.evaluation.answers import Answer, extract_answer, is_correct
from smtune.evaluation.results import ItemResult, Summary
from smtune.evaluation.tasks import Choice, Item, choices

Protocol = Literal["generate", "likelihood"]
Backend = Literal["smtune", "lm-eval"]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns: `results` in the order of the items, and their `summary`."""

    results: list[ItemResult]
    summary: Summary


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    protocol: Protocol = "generate",
    model_id: str,
    out_dir: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    beams: int = 1,
    backend: Backend = "smtune",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a model on items of one or several tasks.

    The model and the tokenizer are left as found, whatever happens.

    Args:
        model: a Hugging Face causal language model, or a PeftModel around one, on its device.
        items: from `load_items`.
        model_id: names the weights; results of other weights are not mixed in. Two that end in the same hash, as
            `smtune.models.fingerprint` gives it, name the same.
        out_dir: folder for `items.jsonl` and `summary.json`. Items already there are not run again, so a call
            that was cut short goes on, and more tasks may be added. None: nothing is written.
        batch_size: prompts at a time; under likelihood each is a sequence per option (with "lm-eval", sequences),
            and with beams it is so many.
        max_new_tokens: tokens a completion may have; None for each task's own.
        beams: of the search for a completion, as transformers' `num_beams`; 1 is greedy. LLM-Adapters takes 4.
        backend: who computes the likelihood: this module, or EleutherAI's `lm_eval` (`harness`).
        progress: called with (items done, items in all) after each batch.
    Returns:
        The same to rounding at any batch size. The summary's `run` names beams and backend that are not the default.
    Raises:
        InputError: a task without options under likelihood, a setting that is not the protocol's, `lm_eval` that is not
            installed, or an `out_dir` that holds another run.
    """
    check(items, protocol, batch_size, max_new_tokens, beams, backend)
    dtype = str(model.dtype).removeprefix("torch.")
    run = _header(protocol, model_id, dtype, max_new_tokens, beams, backend)
    folder = Path(out_dir) if out_dir is not None else None
    kept = results_.resume(folder, run, items) if folder else []
    done = {result.key: result for result in kept}

    bos = leading_bos(tokenizer)
    if protocol == "generate":
        requests = [_completion_request(item, tokenizer, bos) for item in items if item.key not in done]
    else:
        requests = [_choice_request(item, tokenizer, bos) for item in items if item.key not in done]
    n_done = len(items) - len(requests)
    with _borrowed(model, tokenizer, beams):
        lm = harness.load(model, tokenizer, batch_size) if requests and backend == "lm-eval" else None
        for batch in _batches(requests, batch_size):
            if protocol == "generate":
                budget = max_new_tokens or batch[0].item.task.max_new_tokens
                answered = _generate(model, tokenizer, batch, budget)
            elif lm is not None:
                answered = _choose(batch, harness.log_probs(lm, [choice for one in batch for choice in one.choices]))
            else:
                answered = _choose(batch, _log_probs(model, tokenizer, batch))
            if folder:
                results_.append(folder, answered)
            done |= {result.key: result for result in answered}
            n_done += len(batch)
            if progress:
                progress(n_done, len(items))

    ordered = [done[item.key] for item in items]
    summary = results_.summarise(ordered, run)
    if folder:  # whose summary speaks of everything in it, other tasks of earlier calls included
        results_.write_summary(folder, results_.summarise(done.values(), run))
    return Evaluation(ordered, summary)


def check(
    items: Sequence[Item],
    protocol: str = "generate",
    batch_size: int = 1,
    max_new_tokens: int | None = None,
    beams: int = 1,
    backend: str = "smtune",
) -> None:
    """Raises InputError for what `evaluate` would refuse, so that it can be known before a model is trained."""
    if protocol not in get_args(Protocol):
        hint = did_you_mean(protocol, get_args(Protocol))
        raise InputError(f'Expected a protocol, "generate" or "likelihood". Got "{protocol}".{hint}')
    if backend not in get_args(Backend):
        hint = did_you_mean(backend, get_args(Backend))
        raise InputError(f'Expected a backend, "smtune" or "lm-eval". Got "{backend}".{hint}')
    if backend == "lm-eval":
        if protocol != "likelihood":
            raise InputError(f'Expected the protocol "likelihood": it is what "lm-eval" serves. Got "{protocol}".')
        harness.require()
    if beams < 1 or (beams > 1 and protocol != "generate"):
        raise InputError(f'Expected at least 1 beam, and more only to "generate". Got {beams} under "{protocol}".')
    if not items:
        raise InputError("Expected at least one item to evaluate. Got none.")
    if batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise InputError(
            f"Expected batch_size and max_new_tokens of at least 1. Got {batch_size} and {max_new_tokens}."
        )
    if protocol == "likelihood":
        without = sorted({item.task.name for item in items if not item.task.has_options})
        if without:
            raise InputError(f'Expected tasks with options for "likelihood". Got {", ".join(without)}: use "generate".')
        for item in items:
            labels = [choice.label for choice in choices(item)]
            if item.answer.lower() not in map(str.lower, labels):
                raise InputError(
                    f"Expected the answer of {item.task.name}, record {item.index + 1}, to be among its options, "
                    f"{', '.join(labels)}. Got {item.answer!r}."
                )
    keys = {item.key for item in items}
    if len(keys) != len(items):
        raise InputError(f"Expected distinct items. Got {len(items) - len(keys)} repeated ones.")


def check_folder(
    out_dir: str | Path,
    items: Sequence[Item],
    *,
    protocol: str,
    model_id: str,
    dtype: str,
    beams: int = 1,
    backend: str = "smtune",
) -> None:
    """Raises InputError for a folder that `evaluate` would refuse, so that it can be known before a model is loaded."""
    results_.kept_results(Path(out_dir), _header(protocol, model_id, dtype, None, beams, backend), items)


def _header(
    protocol: str, model_id: str, dtype: str, max_new_tokens: int | None, beams: int, backend: str
) -> dict[str, Any]:
    """What identifies a run, for `results`."""
    run: dict[str, Any] = {"protocol": protocol, "model": model_id, "dtype": dtype}
    if protocol == "generate":
        run["max_new_tokens"] = max_new_tokens or "by task"
    if beams > 1:
        run["beams"] = beams
    if backend == "lm-eval":
        run["backend"] = f"lm_eval {harness.version()}"
    return run


# -- what goes to the model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sequence:
    """Token ids; under likelihood those from `start` on are scored."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class _Request:
    """An item with its sequences: the prompt alone, or one per option."""

    item: Item
    choices: list[Choice]
    sequences: list[_Sequence]

    @property
    def length(self) -> int:
        return max(len(sequence.ids) for sequence in self.sequences)


def _completion_request(item: Item, tokenizer: PreTrainedTokenizerBase, bos: list[int]) -> _Request:
    ids = bos + _ids(item.prompt, tokenizer)
    return _Request(item, [], [_Sequence(ids, len(ids))])


def _choice_request(item: Item, tokenizer: PreTrainedTokenizerBase, bos: list[int]) -> _Request:
    options = choices(item)
    return _Request(item, options, [_choice_sequence(choice, tokenizer, bos) for choice in options])


def _choice_sequence(choice: Choice, tokenizer: PreTrainedTokenizerBase, bos: list[int]) -> _Sequence:
    prompt = bos + _ids(choice.prompt, tokenizer)
    opening, answer = _ids(choice.opening, tokenizer), _ids(choice.opening + choice.scored, tokenizer)
    # A token that spans the border belongs to what is scored: that begins where the two first differ.
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(opening, answer))
    return _Sequence(prompt + answer, len(prompt) + sum(1 for _ in same))


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _batches(requests: Sequence[_Request], batch_size: int) -> Iterator[list[_Request]]:
    """Batches of one task each, in the tasks' order; longest first, so memory runs out at once or never."""
    for _, group in itertools.groupby(requests, key=lambda request: request.item.task):
        by_length = sorted(group, key=lambda request: request.length, reverse=True)
        for start in range(0, len(by_length), batch_size):
            yield by_length[start : start + batch_size]


def _pad(sequences: Sequence[list[int]], side: Literal["left", "right"], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (S, T) int64; the mask is 0 on padding."""
    n_tokens = max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        padding = n_tokens - len(sequence)
        before, after = (padding, 0) if side == "left" else (0, padding)
        ids.append([pad_id] * before + sequence + [pad_id] * after)
        mask.append([0] * before + [1] * len(sequence) + [0] * after)
    return torch.tensor(ids), torch.tensor(mask)


# -- the two protocols -------------------------------------------------------------------------------------------


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, batch: Sequence[_Request], max_new_tokens: int
) -> list[ItemResult]:
    """The completions. The prompts are padded on the left, so that each is followed by its completion."""
    stops = _stop_ids(model, tokenizer)
    ids, mask = _pad([request.sequences[0].ids for request in batch], "left", _pad_id(tokenizer))
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens
    )
    answered = []
    for request, row in zip(batch, output[:, ids.shape[1] :].tolist()):
        completion_ids = list(itertools.takewhile(lambda token: token not in stops, row))
        completion = str(tokenizer.decode(completion_ids, skip_special_tokens=True))
        answered.append(
            _result(
                request.item,
                extract_answer(request.item.task, completion),
                completion=completion,
                truncated=len(completion_ids) == max_new_tokens,
            )
        )
    return answered


def _log_probs(model: Any, tokenizer: PreTrainedTokenizerBase, batch: Sequence[_Request]) -> list[float]:
    """Log-probability of every option, request by request. Padded on the right, where a causal model does not look."""
    sequences = [sequence for request in batch for sequence in request.sequences]
    ids_ST, mask_ST = _pad([sequence.ids for sequence in sequences], "right", _pad_id(tokenizer))
    ids_ST = ids_ST.to(model.device)
    # Token t is predicted at t - 1. Positions before the first one scored need no logits.
    first = min(sequence.start for sequence in sequences) - 1
    logits_SKV = model(
        input_ids=ids_ST,
        attention_mask=mask_ST.to(model.device),
        use_cache=False,
        logits_to_keep=ids_ST.shape[1] - first,
    ).logits

    log_probs = []
    # Row by row: the fp32 copy of all logits at once would be the peak of memory.
    for sequence, row_ids, logits_KV in zip(sequences, ids_ST, logits_SKV):
        end = len(sequence.ids)
        logits = logits_KV[sequence.start - 1 - first : end - 1 - first].float()
        targets = row_ids[sequence.start : end]
        log_probs.append(-torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item())
    return log_probs


def _choose(batch: Sequence[_Request], log_probs: Iterable[float]) -> list[ItemResult]:
    """The likeliest option of each request."""
    answered, rest = [], iter(log_probs)
    for request in batch:
        scores = {choice.label: value for choice, value in zip(request.choices, rest)}
        characters = {choice.label: len(choice.scored.strip()) for choice in request.choices}
        best = results_.likeliest(scores, characters, request.item.task.per_character)
        answered.append(_result(request.item, best, log_probs=scores, characters=characters))
    return answered


def _result(item: Item, prediction: Answer | None, **detail: Any) -> ItemResult:
    correct = is_correct(item.task, prediction, item.answer)
    return ItemResult(item.key, item.task.name, item.index, item.answer, prediction, correct, **detail)


# -- the model, borrowed -----------------------------------------------------------------------------------------


@contextmanager
def _borrowed(model: Any, tokenizer: PreTrainedTokenizerBase, beams: int) -> Iterator[None]:
    """Evaluation mode, no gradients and plain decoding without sampling inside; everything as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    # `generate` fills whatever a call leaves open from the model's own settings, sampling flags and penalties
    # included: those are put aside. A PeftModel may hold settings of its own beside its base model's.
    owners = [owner for owner in (model, getattr(model, "get_base_model", lambda: None)()) if owner is not None]
    owners = [owner for owner in owners if "generation_config" in vars(owner)]
    settings = [owner.generation_config for owner in owners]
    plain = GenerationConfig(
        do_sample=False,
        num_beams=beams,
        use_cache=True,
        eos_token_id=sorted(_stop_ids(model, tokenizer)) or None,
        pad_token_id=_pad_id(tokenizer),
    )
    try:
        model.eval()
        for owner in owners:
            owner.generation_config = plain
        # Not inference_mode: what a module caches in it could never be trained through again.
        with torch.no_grad():
            yield
    finally:
        for owner, setting in zip(owners, settings):
            owner.generation_config = setting
        for module in training:
            module.training = True


def _stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ends of text of the tokenizer and of the model: one may know more of them than the other."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return {token for token in [*of_model, tokenizer.eos_token_id] if token is not None}


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token will do: the attention mask hides it."""
    candidates: tuple[Any, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)
