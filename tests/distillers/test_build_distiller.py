"""A method's file is looked at where it is built."""

import sys
import types

import pytest
import torch
from torch import nn

from kdav_fast.config import MethodConfig
from kdav_fast.distillers import build_distiller
from kdav_fast.distillers.base import Distiller, Learned
from kdav_fast.distillers.phases import Fit, Measure
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
    with pytest.raises(
        TypeError, match=r"'mine': it has the parameter projector\.weight, .* in its learned\(\)"
    ):
        built(monkeypatch, Keeping)


def giving(**answers):
    """A method whose parts are these."""
    methods = {
        name: (lambda self, answer=answer: answer) for name, answer in answers.items() if name != "order"
    }
    return type("Giving", (Method,), methods | {name: answers[name] for name in answers if name == "order"})


LINEAR = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (giving(order="views"), "its order is 'views'"),
        (giving(head=LINEAR), "a Linear; give a FoldableHead"),
        (giving(learned={"a": LINEAR}), r"a Linear for 'a'; give Learned\(module\)"),
        (giving(learned={"keys": Learned(LINEAR)}), "the name 'keys'"),
        (giving(learned={"a.b": Learned(LINEAR)}), "the name 'a.b'"),
        (giving(learned={"a": Learned(LINEAR), "b": Learned(LINEAR)}), "a parameter of 'a' again in 'b'"),
        (giving(phases=Measure("x", print)), "a Measure; give a tuple"),
        (giving(phases=("x",)), "hold a str"),
        (
            giving(phases=(Fit("x", ("nope",), print, 1, 0.1),)),
            r"trains 'nope', which is not .* \(regressor\)",
        ),
        (giving(phases=(Fit("x", "regressor", print, 1, 0.1),)), "trains the text 'regressor'"),
    ],
)
def test_what_a_method_gives_is_looked_at_before_the_run(monkeypatch, method, said):
    with pytest.raises(TypeError, match=f"distiller 'mine': .*{said}"):
        built(monkeypatch, method)
