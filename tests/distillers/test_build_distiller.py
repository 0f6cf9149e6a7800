"""A method's file is looked at where it is built."""

import sys
import types

import pytest
import torch
from torch import nn

from kdav_fast.config import MethodConfig
from kdav_fast.distillers import build_distiller
from kdav_fast.distillers.base import Distiller, Learned
from tests.distillers.small_run import small_facts


class Method(Distiller):
    """Trains one module as it should be, and keeps a buffer."""

    def __init__(self, config, facts):
        super().__init__(config, facts)
        self.lend("regressor", nn.Linear(2, 2))
        self.register_buffer("seen", torch.zeros(()))

    def learned(self):
        return {"regressor": Learned(self.regressor)}


class Keeping(Method):
    """Keeps a module of its own, which nobody would train."""

    def __init__(self, config, facts):
        super().__init__(config, facts)
        self.projector = nn.Linear(2, 2, bias=False)


def built(monkeypatch, method):
    file = types.ModuleType("kdav_fast.distillers.mine")
    file.METHOD = method
    monkeypatch.setitem(sys.modules, file.__name__, file)
    config = MethodConfig(name="mine")
    return build_distiller(config, small_facts(config))


def test_what_is_lent_is_none_of_a_distiller_s_own(monkeypatch):
    distiller = built(monkeypatch, Method)
    assert list(distiller.state_dict()) == ["seen"]
    assert distiller.learned()["regressor"].module is distiller.regressor


def test_a_parameter_that_nothing_would_train_is_the_developer_s_mistake(monkeypatch):
    with pytest.raises(TypeError, match=r"'mine' has the parameter projector\.weight, .* in its learned\(\)"):
        built(monkeypatch, Keeping)
