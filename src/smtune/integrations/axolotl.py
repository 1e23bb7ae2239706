"""SMT in Axolotl, as a plug-in.

    plugins: [smtune.integrations.axolotl.SMTPlugin]
    adapter: smt
    smt:
      budget: 0.0084

Axolotl reads the training rows before the model and has no hook that sees both. So the plug-in reads the rows in
Axolotl's stead, with Axolotl's own function, keeps them, and scores the blocks with them where Axolotl asks for the
adapter. The plan goes to `<output_dir>/plan.json`, from where a resumed run takes it; `smt.plan` names a plan made
before, which preference training (`rl`) and streamed rows need. Targets beside the blocks have Axolotl's own keys:
`lora_modules_to_save`, `peft_trainable_token_indices`, `peft_layers_to_transform`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import peft
from accelerate import PartialState
from axolotl.integrations.base import AdapterCapabilities, BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, ConfigDict, Field, model_validator

import smtune
from smtune.data import Collator, batches
from smtune.errors import InputError
from smtune.scoring import DATA_FREE


class SMTOptions(BaseModel):
    """The block `smt:` of an Axolotl configuration. All keys but `plan` and `score_batch_size` are `SMTConfig`'s."""

    model_config = ConfigDict(extra="forbid")

    plan: str | None = Field(default=None, description="A plan made before. Default: made from the training rows.")
    score_batch_size: int | None = Field(default=None, ge=1, description="Rows of a batch. Default: micro_batch_size.")
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    block_size: int | Literal["auto"] = "auto"
    budget: float | int = 0.0084
    criterion: str = "abs_of_sum"
    policy: str = "sampled"
    shares: dict[str, float] | None = None
    max_backward_cost: float | None = None
    warmup_steps: int = 100
    accumulator_device: str | None = None
    accumulator_dtype: str = "float32"
    mode: str = "auto"
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> SMTOptions:
        self.config()
        return self

    def config(self, **others: Any) -> smtune.SMTConfig:
        """The configuration of the adapter, without a plan."""
        return smtune.SMTConfig(**self.model_dump(exclude={"plan", "score_batch_size"}), **others)


class SMTArgs(BaseModel):
    """What the plug-in adds to Axolotl's configuration."""

    smt: SMTOptions = Field(default_factory=SMTOptions)

    @model_validator(mode="after")
    def _dense_base(self) -> SMTArgs:
        asked = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(self, key, None)]
        if asked and getattr(self, "adapter", None) == "smt":
            raise InputError(
                f"Expected a base in 16 or 32 bits: Axolotl quantises for its own adapters alone. Got {asked[0]} with "
                "`adapter: smt`: take it out, or train with Trainer, which takes a quantised base."
            )
        return self


class SMTPlugin(BasePlugin):
    """Provides `adapter: smt`."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: Any = None

    def get_input_args(self) -> str:
        return "smtune.integrations.axolotl.SMTArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="smt")]

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """The training rows as Axolotl reads them, kept for scoring; None, for Axolotl to read, if no use is made."""
        if cfg.adapter != "smt" or preprocess or cfg.rl or _options(cfg).criterion in DATA_FREE or _planned(cfg):
            return None
        from axolotl.common.datasets import load_datasets  # pyright: ignore[reportMissingImports]

        loaded = load_datasets(cfg=cfg)
        self._rows = loaded.train_dataset
        return loaded

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """The model with an adapter, and its configuration. `config_only`: (None, configuration), for TRL to wrap.

        Raises:
            InputError: no plan, and no rows to make it from; or other options than the plan of a resumed run has.
        """
        if cfg.adapter != "smt":
            return None
        if cfg.lora_model_dir:
            if config_only:
                raise InputError(
                    "Expected a new adapter: Axolotl gives TRL a configuration, without the weights of "
                    f"lora_model_dir. Got {cfg.lora_model_dir}: merge it first and take the result as base_model, or "
                    "train with examples/trl_dpo.py."
                )
            adapted = peft.PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return adapted, adapted.peft_config["default"]
        config = _options(cfg).config(
            task_type="CAUSAL_LM",
            modules_to_save=cfg.lora_modules_to_save or None,
            trainable_token_indices=cfg.peft_trainable_token_indices or None,
            layers_to_transform=cfg.peft_layers_to_transform or None,
        )
        config = config.with_plan(self._plan(model, cfg, config))
        if config_only:
            return None, config
        adapted = peft.get_peft_model(model, config)  # type: ignore[arg-type]
        if PartialState().is_main_process:
            adapted.print_trainable_parameters()
        return adapted, config

    def _plan(self, model: Any, cfg: Any, config: smtune.SMTConfig) -> smtune.Plan:
        """The plan given, that of the run that is resumed, or a new one, each process scoring its share."""
        planned = _planned(cfg)
        if planned is not None:
            return planned
        state = PartialState()
        rows = None
        if config.criterion not in DATA_FREE:
            self._check_scorable(model, cfg)
            size = _options(cfg).score_batch_size or cfg.micro_batch_size or 1
            rows = batches(self._rows, Collator(0), size, seed=config.seed, n=config.warmup_steps)
            rows = itertools.islice(rows, state.process_index, None, state.num_processes)
        plan = smtune.make_plan(model, rows, config)
        if state.is_main_process:
            plan.save(Path(cfg.output_dir, PLAN_FILE))
        return plan

    def _check_scorable(self, model: Any, cfg: Any) -> None:
        reason = None
        if cfg.rl:
            reason = f"rows of rl: {cfg.rl} are pairs of answers, which have no loss of their own"
        elif self._rows is None:
            reason = "another plug-in read the training rows, or they were not read before the model"
        elif not hasattr(self._rows, "__len__"):
            reason = "the rows are streamed"
        elif any(parameter.is_meta for parameter in model.parameters()):
            reason = "this process holds no weights (fsdp_config.cpu_ram_efficient_loading)"
        if reason is not None:
            raise InputError(
                f"Expected a plan made before, since {reason}. Got no smt.plan: make one with `smtune select` or "
                "`smtune.make_plan(...).save(...)` and name its file there."
            )


PLAN_FILE = "plan.json"
DECIDED = ("block_size", "budget", "criterion", "policy", "shares", "max_backward_cost", "seed")
"""Options that a plan records."""


def _options(cfg: Any) -> SMTOptions:
    values: Any = cfg.smt or {}
    return SMTOptions.model_validate(values.to_dict() if hasattr(values, "to_dict") else values)


def _planned(cfg: Any) -> smtune.Plan | None:
    """The plan that the run has to take, if there is one: the one given, or that of the run to be resumed.

    Raises:
        InputError: the latter, and the options are others than it was made with.
    """
    options, folder = _options(cfg), Path(cfg.output_dir)
    if options.plan is not None:
        return smtune.Plan.load(options.plan)
    resumed = cfg.resume_from_checkpoint or (cfg.auto_resume_from_checkpoints and any(folder.glob("checkpoint-*")))
    if not resumed or not (folder / PLAN_FILE).is_file():
        return None
    plan = smtune.Plan.load(folder / PLAN_FILE)
    asked = {name: getattr(options, name) for name in DECIDED}
    changed = [name for name, value in asked.items() if value not in ("auto", getattr(plan, name))]
    if changed:
        differences = "; ".join(f"{name} {asked[name]!r}, not {getattr(plan, name)!r}" for name in changed)
        raise InputError(
            f"Expected the options under `smt:` that the plan in {folder} was made with. Got {differences}: put them "
            "back, or take another output_dir."
        )
    return plan
