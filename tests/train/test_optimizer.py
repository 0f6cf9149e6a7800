"""The optimizers: parameter groups, what apex's are told, what is refused, and what apex's compute on a GPU."""

import copy
import math
import sys
import types

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from kdav_fast.config import OptimizerConfig, load_config
from kdav_fast.errors import InputError
from kdav_fast.runtime.apex import APEX_CLASSES
from kdav_fast.student.trainee import Trainee
from kdav_fast.train.optimizer import build_optimizer

ADAM = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "amsgrad": False, "set_grad_none": True}
APEX_DEFAULTS = {
    "FusedSGD": {
        "lr": None,
        "momentum": 0,
        "dampening": 0,
        "weight_decay": 0,
        "nesterov": False,
        "wd_after_momentum": False,
        "materialize_master_grads": True,  # for apex.amp alone
        "set_grad_none": False,
    },
    "FusedAdam": {
        **ADAM,
        "eps": 1e-8,
        "adam_w_mode": True,
        "weight_decay": 0.0,
        "capturable": False,
        "master_weights": False,
    },
    "FusedLAMB": {
        **ADAM,
        "eps": 1e-6,
        "weight_decay": 0.01,
        "adam_w_mode": True,
        "grad_averaging": True,
        "max_grad_norm": 1.0,
        "use_nvlamb": False,
    },
    "FusedNovoGrad": {
        **ADAM,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "reg_inside_moment": False,
        "grad_averaging": True,
        "norm_type": 2,
        "init_zero": False,
    },
}
"""The constructors' arguments and defaults in NVIDIA apex's source, commit 6424da3."""
EFFECTIVE = {
    "apex_sgd": {"momentum": 0.8, "dampening": 0, "nesterov": True, "wd_after_momentum": False},
    "apex_adam": {"betas": (0.8, 0.999), "eps": 1e-8, "bias_correction": True, "adam_w_mode": True},
    "apex_lamb": {
        "betas": (0.8, 0.999),
        "eps": 1e-6,
        "bias_correction": True,
        "adam_w_mode": True,
        "grad_averaging": True,
        "max_grad_norm": math.inf,
        "use_nvlamb": False,
    },
    "apex_novograd": {
        "betas": (0.8, 0.98),
        "eps": 1e-8,
        "bias_correction": False,
        "reg_inside_moment": True,
        "grad_averaging": False,
        "norm_type": 2,
        "init_zero": False,
    },
}


def recorder(name):
    """A stand-in for a class of apex that keeps the arguments in effect and knows no others."""

    class Recorder:
        def __init__(self, params, **given):
            assert given.keys() <= APEX_DEFAULTS[name].keys()
            self.param_groups = params
            self.arguments = {**APEX_DEFAULTS[name], **given}

    return Recorder


@pytest.fixture
def apex(monkeypatch):
    """A stand-in for `apex.optimizers`, with its kernels."""
    package, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    package.optimizers = optimizers
    for name in APEX_DEFAULTS:
        setattr(optimizers, name, recorder(name))
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    return optimizers


def network(device="cpu"):
    with torch.device(device):
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).requires_grad_(False))


def network_on_gpu():
    """Parameters that say they are on a GPU, wherever the test runs."""
    with FakeTensorMode():
        return network("cuda")


def trained(module):
    """`module` as what a run trains, nothing learned beside it."""
    return Trainee(module, {}, loss=None, device=torch.device("cpu"), dtype=None)


@pytest.mark.parametrize("name", ["sgd", "adamw", *APEX_CLASSES])
@pytest.mark.parametrize("everything", [True, False])
def test_weight_decay_reaches_what_the_config_says(name, everything, apex):
    module = network_on_gpu() if name in APEX_CLASSES else network()
    config = OptimizerConfig(name=name, weight_decay=0.5, decay_norm_and_bias=everything)
    groups = build_optimizer(config, trained(module)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    weight, bias = module[0].weight, module[0].bias
    assert len(decay) == 4  # the frozen layer is left out
    assert decay[id(weight)] == 0.5
    assert decay[id(bias)] == decay[id(module[1].weight)] == (0.5 if everything else 0.0)


@pytest.mark.parametrize("name", APEX_CLASSES)
def test_what_apex_is_told(name, apex):
    config = OptimizerConfig(name=name, lr=0.3, momentum=0.8, nesterov=name == "apex_sgd")
    optimizer = build_optimizer(config, trained(network_on_gpu()))
    assert isinstance(optimizer, getattr(apex, APEX_CLASSES[name]))
    assert {**optimizer.arguments, "lr": 0.3, **EFFECTIVE[name]} == optimizer.arguments


def test_lamb_without_decay_keeps_its_trust_ratio(apex):
    optimizer = build_optimizer(
        OptimizerConfig(name="apex_lamb", weight_decay=0.0), trained(network_on_gpu())
    )
    assert optimizer.arguments["use_nvlamb"]


def refusal(name, module):
    with pytest.raises(InputError) as error:
        build_optimizer(OptimizerConfig(name=name), trained(module))
    assert "\n" not in str(error.value)
    return str(error.value)


BUILD = "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install"


@pytest.mark.parametrize("name", APEX_CLASSES)
def test_apex_is_missing(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    message = refusal(name, network_on_gpu())
    assert message.startswith(
        f"optimizer.name is '{name}', but apex's {APEX_CLASSES[name]} cannot be imported ("
    )
    assert "use optimizer.name=sgd or adamw, or install apex on a machine with nvcc" in message
    assert BUILD in message
    assert "device" not in message


def test_apex_is_broken(apex, monkeypatch, tmp_path):
    (tmp_path / "amp_C.py").write_text("raise ImportError('amp_C.so:\\n undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "amp_C")
    message = refusal("apex_lamb", network_on_gpu())
    assert "FusedLAMB cannot be imported (amp_C.so: undefined symbol: _ZN3c10)" in message
    assert BUILD in message


def test_apex_lacks_the_optimizer(apex):
    del apex.FusedNovoGrad
    message = refusal("apex_novograd", network_on_gpu())
    assert "has no attribute 'FusedNovoGrad'" in message
    assert BUILD in message


def test_apex_on_a_cpu(apex, monkeypatch):
    need = "optimizer.name is 'apex_adam', but apex's optimizers need a GPU and the device is 'cpu'"
    assert refusal("apex_adam", network()) == f"{need}; use optimizer.name=sgd or adamw, or set device=cuda"
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    message = refusal("apex_adam", network())
    assert message.startswith(f"{need}, and apex's FusedAdam cannot be imported (")
    assert "or set device=cuda and install apex on a machine" in message
    assert BUILD in message


@pytest.mark.parametrize(
    ("name", "stages"), [("apex_lamb", (1, 2, 3)), ("apex_novograd", (1, 2, 3)), ("apex_adam", (3,))]
)
def test_what_does_not_go_with_zero_is_refused(name, stages):
    for stage in (0, 1, 2, 3):
        given = [f"optimizer.name={name}", f"train.zero_stage={stage}"]
        if stage not in stages:
            assert load_config(None, given).optimizer.name == name
            continue
        with pytest.raises(InputError) as error:
            load_config(None, given)
        assert f"optimizer.name is '{name}' but train.zero_stage is {stage}: it " in str(error.value)
        assert "train.zero_stage=0" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "momentum"),
    [("adamw", 0.9), ("apex_adam", 0.9), ("apex_lamb", 0.9), ("apex_novograd", 0.9), ("sgd", 0.0)],
)
def test_nesterov_without_effect_is_refused(name, momentum):
    given = [f"optimizer.name={name}", f"optimizer.momentum={momentum}", "optimizer.nesterov=true"]
    words = f"optimizer.nesterov is true with optimizer.name '{name}' and optimizer.momentum {momentum:g}"
    with pytest.raises(InputError, match=words):
        load_config(None, given)
    assert not load_config(None, given[:2]).optimizer.nesterov


def test_nesterov_reaches_sgd():
    [group] = build_optimizer(OptimizerConfig(nesterov=True), trained(network())).param_groups
    assert group["nesterov"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_torch_is_fused_on_a_gpu(name):
    assert build_optimizer(OptimizerConfig(name=name), trained(network("cuda"))).defaults["fused"]


class PaperOptimizer:
    """LAMB (You et al. 2020, algorithm 2) and NovoGrad (Ginsburg et al. 2019, algorithm 1), as published."""

    def __init__(self, config, module):
        self.config, self.parameters, self.taken = config, list(module.parameters()), 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self):
        self.taken += 1
        update = self.lamb if self.config.name == "apex_lamb" else self.novograd
        for i, parameter in enumerate(self.parameters):
            parameter -= self.config.lr * update(i, parameter, parameter.grad)

    def lamb(self, i, x, g):
        beta, t = self.config.momentum, self.taken
        self.m[i] = beta * self.m[i] + (1 - beta) * g
        self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
        ratio = self.m[i] / (1 - beta**t) / ((self.v[i] / (1 - 0.999**t)).sqrt() + 1e-6)
        step = ratio + self.config.weight_decay * x
        return step * x.norm() / step.norm()

    def novograd(self, i, x, g):
        self.v[i] = g.norm() ** 2 if self.taken == 1 else 0.98 * self.v[i] + 0.02 * g.norm() ** 2
        scaled = g / (self.v[i].sqrt() + 1e-8) + self.config.weight_decay * x
        self.m[i] = self.config.momentum * self.m[i] + scaled
        return self.m[i]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "nesterov"),
    [
        ("apex_sgd", False),
        ("apex_sgd", True),
        ("apex_adam", False),
        ("apex_lamb", False),
        ("apex_novograd", False),
    ],
)
def test_apex_takes_the_steps_of_torch_and_the_papers(name, nesterov):
    """Three steps in float32 against float64; gradients far above norm 1, each larger than the last."""
    pytest.importorskip("amp_C")
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1)).double()
    module = copy.deepcopy(exact).float().to("cuda", memory_format=torch.channels_last)
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.1, nesterov=nesterov)
    optimizer = build_optimizer(config, trained(module))
    torch_name = {"apex_sgd": "sgd", "apex_adam": "adamw"}.get(name)
    if torch_name:
        expected = build_optimizer(config.model_copy(update={"name": torch_name}), trained(exact))
    else:
        expected = PaperOptimizer(config, exact)
    for scale in (1, 10, 100):
        for ours, theirs in zip(module.parameters(), exact.parameters(), strict=True):
            theirs.grad = scale * torch.randn_like(theirs)
            ours.grad = torch.empty_like(ours).copy_(theirs.grad)  # strides are the parameter's
        optimizer.step()
        expected.step()
    for ours, theirs in zip(module.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=1e-5, atol=1e-5)
