"""Registration with PEFT, which has no plug-in mechanism: its method types are a closed enumeration.

`PeftType` is extended in place with one member; pickling, copying and `PeftType("SMT")` then hold as for the others.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method


def peft_type() -> PeftType:
    """`PeftType.SMT`, added on the first call."""
    if "SMT" not in PeftType.__members__:
        member = str.__new__(PeftType, "SMT")
        member._name_ = "SMT"
        member._value_ = "SMT"
        PeftType._member_map_["SMT"] = member
        PeftType._member_names_.append("SMT")
        PeftType._value2member_map_["SMT"] = member
        type.__setattr__(PeftType, "SMT", member)  # EnumType forbids assignment, not addition
    return PeftType("SMT")


def register() -> None:
    """Make SMT known to PEFT. Does nothing the second time."""
    from smtune.tuner.config import SMTConfig
    from smtune.tuner.model import SMTModel

    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        # transformers derives the prefix from the name, so it has to be "smt_".
        register_peft_method(name="smt", config_cls=SMTConfig, model_cls=SMTModel, prefix="smt_")
