"""The YAML configuration of a training run: its fields, its defaults, and how a faulty one is refused.

All faults are reported together, each by its dotted key, with what was expected, what came and the closest key that
exists. The core never sees this configuration; `smtune.training.run` translates it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from smtune.errors import InputError, did_you_mean
from smtune.scoring import CRITERIA, check_accumulator_dtype, check_criterion
from smtune.selection import check_budget, check_policy

Method = Literal["smt", "lora", "dora", "full"]

LEARNING_RATES: dict[str, float] = {"smt": 2e-4, "lora": 2e-4, "dora": 2e-4, "full": 2e-5}
"""Where `training.learning_rate` is not given: usual starting points, not tuned; SMT's is LoRA's (docs/adr/0019). Sweep
before comparing methods."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _some_text(value: str) -> str:
    if not value.strip():
        raise ValueError("some text")
    return value


def _device(value: str) -> str:
    try:
        torch.device(value)
    except RuntimeError:
        raise ValueError("a device such as cpu or cuda:0") from None
    return value


Text = Annotated[str, AfterValidator(_some_text)]
Device = Annotated[str, AfterValidator(_device)]


class _Section(BaseModel):
    """Unknown keys are faults, nothing is converted ("8" is no number, true is no 1), and values stay put."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class DataConfig(_Section):
    """What to train on.

    Attributes:
        train: a file (.jsonl, .json, .parquet), a packaged name, a hub data set, or a list of these.
        format: the shape of the records, or "auto".
        max_length: tokens of an example, at most.
        train_on: "answer" puts the loss on the answer alone, "all" on every token.
        on_long: what becomes of a longer example: "drop", "truncate_prompt" or "error".
        limit: use this many examples, a sample drawn by the seed; those held out are among them. None: all.
        validation: rows that nothing is trained on, whose loss is taken with every checkpoint and at the end: sources
            as of `train`, or how many examples to keep out of it, drawn by the seed.
    """

    train: Text | Annotated[list[Text], Field(min_length=1)]
    format: Literal["auto", "instruction", "prompt_completion", "messages", "text"] = "auto"
    max_length: Annotated[int, Field(ge=2)] = 512
    train_on: Literal["answer", "all"] = "answer"
    on_long: Literal["drop", "truncate_prompt", "error"] = "drop"
    limit: Count | None = None
    validation: Text | Annotated[list[Text], Field(min_length=1)] | Count | None = None


class SMTSection(_Section):
    """Sparse Matrix Tuning; see `smtune.SMTConfig`.

    Attributes:
        score_batch_size: examples in a warm-up batch. None: `training.batch_size`.
        layers: numbers of the decoder layers to choose blocks from. None: all.
        plan: a plan made before. Then nothing is scored, and the fields that only serve scoring must not be given.
        dense_warmup_steps: steps of full fine-tuning to take first, and keep, as the authors' released code does; their
            gradients score the blocks, in place of `warmup_steps` batches. The whole model is saved, not an adapter.
        dense_warmup_learning_rate: of these steps. None: `training.learning_rate`.
        Others: as in `SMTConfig`.
    """

    target_modules: list[Text] | Text | None = None
    exclude_modules: list[Text] | Text | None = None
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    block_size: Count | Literal["auto"] = "auto"
    budget: int | float = 0.0084
    criterion: str = "abs_of_sum"
    policy: str = "sampled"
    shares: dict[str, float] | None = None
    max_backward_cost: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    warmup_steps: Count = 100
    score_batch_size: Count | None = None
    accumulator_device: Device | None = None
    accumulator_dtype: Literal["float32", "bfloat16"] = "float32"
    mode: Literal["auto", "resident", "additive"] = "auto"
    plan: Text | None = None
    dense_warmup_steps: Count | None = None
    dense_warmup_learning_rate: Positive | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _check_budget(cls, value: Any) -> Any:
        check_budget(value)
        return value

    @field_validator("criterion", mode="before")
    @classmethod
    def _check_criterion(cls, value: Any) -> Any:
        check_criterion(value)
        return value


class LoRASection(_Section):
    """LoRA and DoRA, as PEFT makes them.

    Attributes:
        rank: r. alpha: the scale is alpha / rank; None: 2 · rank.
        target_modules: as in PEFT; "all-linear" is every linear layer but the head.
    """

    rank: Count = 16
    alpha: Positive | None = None
    dropout: Fraction = 0.0
    target_modules: list[Text] | Text = "all-linear"


class TrainingSection(_Section):
    """The recipe, the same for every method.

    Attributes:
        learning_rate: None: by method, see `LEARNING_RATES`.
        epochs, max_steps: how long, by one of the two. Neither: 3 epochs, as in the paper.
        batch_size: examples a device takes at a time; a step takes `gradient_accumulation_steps` of them.
        warmup_ratio, warmup_steps: the learning rate's warm-up, by one of the two.
        schedule: of the learning rate, after warm-up.
        weight_decay: pulls trained values towards zero; for adapters that is towards the base model.
        group_by_length: batches of examples of like length: less padding, a less random order.
        logging_steps, save_steps: steps between two log events and two checkpoints.
        keep_checkpoints: older ones are deleted.
        report_to: trackers, as in Trainer: "none", "tensorboard", "wandb", "trackio", ….
        deepspeed: a DeepSpeed configuration, a JSON file or its keys, as Trainer takes it.
        fsdp: shard the model with FSDP2; the keys of Trainer's `fsdp_config`, {} for its defaults. Neither it nor
            deepspeed: what `accelerate launch` was told, else DDP.
        seed: of the draw of blocks, the data order and sample, the adapter's initial values and dropout.
    """

    learning_rate: Positive | None = None
    epochs: Positive | None = None
    max_steps: Count | None = None
    batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    warmup_ratio: Fraction | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    logging_steps: Count = 10
    save_steps: Count = 100
    keep_checkpoints: Count = 1
    report_to: Text | list[Text] = "none"
    deepspeed: Text | dict[str, Any] | None = None
    fsdp: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class EvaluationSection(_Section):
    """What to evaluate once training is done, as `smtune evaluate` takes it. No tasks: no evaluation.

    Attributes:
        tasks: names of tasks or groups.
        source: a folder or file of test records. None: where the tasks' own data is.
        limit: items of a task, at most.
    """

    tasks: list[Text] = []
    protocol: Literal["generate", "likelihood"] = "generate"
    source: Text | None = None
    limit: Count | None = None
    batch_size: Count = 16


class TrainConfig(_Section):
    """A training run.

    Attributes:
        model: an alias, a folder or a hub id; see `smtune.models`.
        output: the run folder; new or empty, unless the run is resumed.
        method: what is trained: blocks ("smt"), "lora", "dora", or every weight ("full").
        dtype: of the frozen weights. What is trained is fp32 in every method, so with "full" and in a dense warm-up
            the weights stay fp32 and "bfloat16" means that the products are made in it (autocast); those of LoRA and
            DoRA are too, without DeepSpeed or FSDP2.
    Raises:
        ValidationError: from the constructor; `load_config` turns it into an InputError.
    """

    model: Text
    output: Text
    data: DataConfig
    method: Method = "smt"
    dtype: Literal["float32", "bfloat16"] = "float32"
    smt: SMTSection = SMTSection()
    lora: LoRASection = LoRASection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        faults = [f"{key}: {text}" for key, text in _faults_between_fields(self._given())]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _given(self) -> Callable[[str], Any]:
        return _getter(self.model_dump(exclude_unset=True))

    @property
    def has_dense_warmup(self) -> bool:
        """Whether every weight is trained before the blocks are chosen."""
        return self.method == "smt" and self.smt.dense_warmup_steps is not None

    @property
    def saves_whole_model(self) -> bool:
        """Whether the result is a model, since no adapter could express what was trained."""
        return self.method == "full" or self.has_dense_warmup

    def resolved(self) -> TrainConfig:
        """With everything decided that was left to a default that depends on other fields."""
        training, smt, lora = self.training, self.smt, self.lora
        update: dict[str, Any] = {}
        if training.learning_rate is None:
            update["learning_rate"] = LEARNING_RATES[self.method]
        if training.epochs is None and training.max_steps is None:
            update["epochs"] = 3.0
        if training.warmup_ratio is None and training.warmup_steps is None:
            update["warmup_ratio"] = 0.03
        training = training.model_copy(update=update)
        of_smt: dict[str, Any] = {"score_batch_size": smt.score_batch_size or training.batch_size}
        if self.has_dense_warmup:
            of_smt = {"dense_warmup_learning_rate": smt.dense_warmup_learning_rate or training.learning_rate}
        return self.model_copy(
            update={
                "training": training,
                "smt": smt.model_copy(update=of_smt),
                "lora": lora.model_copy(update={"alpha": lora.alpha or 2.0 * lora.rank}),
            }
        )

    def to_yaml(self) -> str:
        """Of what the method uses, every field with its value; `load_config` reads it back."""
        unused = {"smt"} if self.method != "smt" else set()
        unused |= {"lora"} if self.method not in ("lora", "dora") else set()
        values = self.model_dump(exclude=unused, exclude_none=True)
        if self.smt.plan is not None:
            values["smt"] = {key: values["smt"][key] for key in ("mode", "plan")}
        elif self.has_dense_warmup:
            values["smt"] = {key: value for key, value in values["smt"].items() if key not in _WITHOUT_DENSE_WARMUP}
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# Faults that concern several fields ---------------------------------------------------------------------------------

_SCORING_ONLY = (
    "target_modules",
    "exclude_modules",
    "layers",
    "block_size",
    "budget",
    "criterion",
    "policy",
    "shares",
    "max_backward_cost",
    "warmup_steps",
    "score_batch_size",
    "accumulator_device",
    "accumulator_dtype",
)

_WITHOUT_DENSE_WARMUP = ("warmup_steps", "score_batch_size")


def _faults_between_fields(given: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """(key, fault) pairs. `given` maps a dotted key to the value given, or None; values may be faulty themselves."""
    method = given("method") or "smt"
    # The sections of other methods may stand beside, so that `method=lora` is all it takes to compare.
    if given("smt.plan") is not None and method in get_args(Method) and method != "smt":
        yield "smt.plan", f"expected with the method smt only. Got it with {method}: leave it out."
    if given("training.epochs") is not None and given("training.max_steps") is not None:
        yield "training.max_steps", "expected without training.epochs. Got both: leave one out."
    if given("training.deepspeed") is not None and given("training.fsdp") is not None:
        yield "training.fsdp", "expected without training.deepspeed. Got both: leave one out."
    if given("training.warmup_ratio") is not None and given("training.warmup_steps") is not None:
        yield "training.warmup_steps", "expected without training.warmup_ratio. Got both: leave one out."
    if given("smt.dense_warmup_steps") is not None:
        yield from _faults_of_dense_warmup(given, method)
    elif given("smt.dense_warmup_learning_rate") is not None:
        yield "smt.dense_warmup_learning_rate", "expected with smt.dense_warmup_steps only. Got it alone: leave it out."
    if given("smt.plan") is not None:
        for key in _SCORING_ONLY:
            if given(f"smt.{key}") is not None:
                yield f"smt.{key}", "expected without smt.plan, which has decided it. Got both: leave one out."
    else:
        policy, shares = given("smt.policy") or "sampled", given("smt.shares")
        if isinstance(policy, str) and (shares is None or _are_numbers(shares)):  # otherwise a fault of its own
            try:
                check_policy(policy, shares)
            except InputError as error:
                yield "smt.policy", _lower_first(str(error))
        if given("smt.accumulator_dtype") == "bfloat16" and given("smt.criterion") in CRITERIA:
            try:
                check_accumulator_dtype("bfloat16", given("smt.criterion"))
            except InputError as error:
                yield "smt.accumulator_dtype", _lower_first(str(error))


def _faults_of_dense_warmup(given: Callable[[str], Any], method: Any) -> Iterator[tuple[str, str]]:
    key = "smt.dense_warmup_steps"
    if method in get_args(Method) and method != "smt":
        yield key, f"expected with the method smt only. Got it with {method}: leave it out."
    if given("smt.plan") is not None:
        yield key, "expected without smt.plan, which was made for other weights. Got both: leave one out."
    for other in _WITHOUT_DENSE_WARMUP:
        if given(f"smt.{other}") is not None:
            yield f"smt.{other}", f"expected without {key}: its steps are what scores. Got both: leave one out."
    for engine in ("training.deepspeed", "training.fsdp"):
        if given(engine) is not None:
            yield key, f"expected without {engine}: each process trains a whole model. Got both: leave one out."
    if given("smt.criterion") == "activation":
        yield key, "expected a criterion that reads gradients, weight or random. Got activation: choose another."


def _are_numbers(shares: Any) -> bool:
    return isinstance(shares, Mapping) and all(type(share) in (int, float) for share in shares.values())


# Reading --------------------------------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration and check it.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value`, each value in YAML's notation, applied in order over the file.
    Raises:
        InputError: no such file, no YAML (with its line), or every fault of the configuration together.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings)
        raise InputError(f"Expected a configuration at {path}. There is no such file.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Expected a configuration at {path}. It cannot be read: {error}.") from None
    values = _parse_yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys with values, such as `model: smollm2-135m`. Got a {_kind(values)}.")
    faults = [fault for fault in (_override(values, override) for override in overrides) if fault]
    return _validate(values, str(path), faults)


def parse_config(values: Mapping[str, Any], where: str = "configuration") -> TrainConfig:
    """A configuration from plain values. Raises InputError with every fault together; `where` heads the message."""
    return _validate(values, where, [])


def _validate(values: Mapping[str, Any], where: str, faults: list[str]) -> TrainConfig:
    config = None
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        faults = faults + _field_faults(error)
        faults += [f"{key}: {text}" for key, text in _faults_between_fields(_getter(values))]
    if faults or config is None:
        number = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise InputError(f"{where}: {number} in the configuration.\n  " + "\n  ".join(faults))
    return config


def _field_faults(error: ValidationError) -> list[str]:
    """One line per faulty key, in pydantic's order."""
    whole: dict[str, str] = {}  # faults that say what was expected and what came
    expected: dict[str, list[str]] = {}  # alternatives: pydantic reports every branch of a union
    got: dict[str, str] = {}
    for fault in error.errors():
        if not fault["loc"]:  # the faults between fields, which are looked for in any case
            continue
        key, cause = _dotted(fault["loc"]), (fault.get("ctx") or {}).get("error")
        if fault["type"] == "extra_forbidden":
            whole[key] = f"unknown key.{_similar_key(key)}"
        elif fault["type"] == "missing":
            whole[key] = "expected a value. Got none."
        elif isinstance(cause, InputError):
            whole[key] = _lower_first(str(cause))
        else:
            alternatives = expected.setdefault(key, [])
            alternatives += [text for text in [_expected(fault)] if text not in alternatives]
            got[key] = f"Got {_show(fault['input'])}.{_similar_value(fault)}"
    whole |= {key: f"expected {' or '.join(texts)}. {got[key]}" for key, texts in expected.items()}
    return [f"{key}: {text}" for key, text in whole.items()]


_REWORDED = {
    "Input should be ": "",
    "List should have": "a list with",
    " after validation, not 0": "",
    "a valid integer": "an integer",
    "a valid ": "a ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "a number above",
    "less than": "a number below",
}


def _expected(fault: Any) -> str:
    """pydantic's message in our words, to stand behind "expected"."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    if fault["type"] in ("model_type", "dict_type"):
        return "keys with values"
    text = fault["msg"]
    for theirs, ours in _REWORDED.items():
        text = text.replace(theirs, ours)
    return text


def _dotted(place: Sequence[int | str]) -> str:
    """The dotted key of pydantic's place, without the branch of a union ("str") and positions in lists behind it."""
    model: Any = TrainConfig
    parts: list[str] = []
    for part in place:
        if model is None:
            break
        parts.append(str(part))
        field = model.model_fields.get(part)
        annotation = field.annotation if field is not None else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return ".".join(parts)


def _keys() -> list[str]:
    """Every dotted key there is."""
    keys = []
    for name, field in TrainConfig.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{name}.{inner}" for inner in field.annotation.model_fields]
    return keys


_OTHER_NAMES = {
    "lr": "training.learning_rate",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "lr_scheduler_type": "training.schedule",
    "bf16": "dtype",
    "torch_dtype": "dtype",
    "activation_checkpointing": "training.gradient_checkpointing",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "model_name_or_path": "model",
    "output_dir": "output",
    "dataset": "data.train",
    "layers_to_transform": "smt.layers",
}
"""What people type who know other trainers."""


def _similar_key(key: str) -> str:
    section, _, name = key.rpartition(".")
    keys = _keys()
    siblings = [other for other in keys if other.rpartition(".")[0] == section]
    elsewhere = [other for other in keys if other.rpartition(".")[2] == name]
    if name in _OTHER_NAMES:
        return f' Did you mean "{_OTHER_NAMES[name]}"?'
    if elsewhere:
        return f' Did you mean "{elsewhere[0]}"?'
    return did_you_mean(key, siblings) or did_you_mean(key, keys) or did_you_mean(f"training.{name}", keys)


def _similar_value(fault: Any) -> str:
    if fault["type"] != "literal_error" or not isinstance(fault["input"], str):
        return ""
    return did_you_mean(fault["input"], re.findall(r"'([^']*)'", fault["msg"]))


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value) if len(repr(value)) <= 60 else f"a {_kind(value)}"


def _kind(value: Any) -> str:
    return "mapping" if isinstance(value, Mapping) else "list" if isinstance(value, list) else "single value"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _getter(values: Any) -> Callable[[str], Any]:
    def get(key: str) -> Any:
        value = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    return get


def _override(values: dict[str, Any], override: str) -> str | None:
    """Write `dotted.key=value` into `values`. Returns what is wrong with it, if anything."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        return f"{override!r}: expected an override as key=value, such as training.learning_rate=1e-4."
    try:
        value = _parse_yaml(text, key)
    except InputError:
        return f"{key}: expected a value in YAML's notation. Got {text!r}."
    *sections, name = key.split(".")
    inside = values
    for section in sections:
        if inside.get(section) is None:
            inside[section] = {}
        inside = inside[section]
        if not isinstance(inside, dict):
            return f"{key}: expected a section. Got {section}, which has a value."
    inside[name] = value
    return None


class _Loader(yaml.SafeLoader):
    """SafeLoader with two repairs: 1e-4 is a number (YAML 1.1 wants 1.0e-4), and a key given twice is a fault."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key that is a list or a mapping; quote what begins with { or [",
                    problem_mark=key_node.start_mark,
                )
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is given twice, in lines {seen[key]} and {line}",
                    problem_mark=key_node.start_mark,
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would take for a number: the text 1e-4."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that is none
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}{line}: expected YAML. Got a syntax that is not: {problem}.") from None
