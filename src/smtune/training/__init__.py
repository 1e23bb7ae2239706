"""Training: a YAML configuration, Hugging Face's Trainer, and a run folder that can be resumed.

As a library:

    config = load_config("examples/smollm2-arithmetic.yaml", ["method=lora"])
    print(dry_run(config))
    result = train(config)
"""

from smtune.training.config import LEARNING_RATES, TrainConfig, load_config, parse_config
from smtune.training.folder import RunFolder, read_metrics
from smtune.training.result import RunResult
from smtune.training.run import WorkPlan, dry_run, select_plan, train
from smtune.training.warmup import dense_warmup

__all__ = [
    "LEARNING_RATES",
    "RunFolder",
    "RunResult",
    "TrainConfig",
    "WorkPlan",
    "dense_warmup",
    "dry_run",
    "load_config",
    "parse_config",
    "read_metrics",
    "select_plan",
    "train",
]
