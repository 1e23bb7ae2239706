"""What is saved of a model that no engine has split; tests/distributed has the engines."""

from __future__ import annotations

import copy

import peft
import torch
from torch import nn

import smtune
from smtune import SMTConfig


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4))

    def forward(self, x):
        return self.head(self.q_proj(x))


def test_buffers_of_modules_to_save_are_saved(tmp_path):
    base, x = Headed(), torch.randn(8, 16)
    config = SMTConfig(target_modules=["q_proj"], block_size=8, budget=1, criterion="random", modules_to_save=["head"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.train()(x)  # which moves the statistics
    state = smtune.trained_state_dict(model)
    expected = model.eval()(x)
    model.train()(x)  # which does not move those that were taken
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(x), expected)
