"""What may change where a run's folder goes on, and what may differ among its processes."""

import pytest

from kdav_fast.config import load_config
from kdav_fast.errors import InputError
from kdav_fast.train.folder.config import check_run_folder, config_facts, write_run_config

RUN = ["teacher.name=cifar:resnet8", "distiller.name=kdav", "train.precision=fp32"]


@pytest.fixture
def start(tmp_path):
    """The config of a start in one folder."""
    return lambda *overrides: load_config(None, [f"run_dir={tmp_path}", *RUN, *overrides])


@pytest.mark.parametrize(
    "override",
    [
        "device=cpu",
        "data.root=elsewhere",
        "data.workers=3",
        "data.on_reshard=restart_epoch",
        "teacher.sharded=true",
        "train.zero_stage=2",
        "train.deepspeed=overlap.json",
        "train.keep_best=false",
    ],
)
def test_where_and_how_fast_it_runs_may_change(start, override):
    write_run_config(start())
    assert check_run_folder(start(override)) is None
    write_run_config(start(override))
    assert check_run_folder(start()) is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=0.2", "optimizer.lr is 0.1 there and 0.2 here"),
        ("data.name=stl10", "data.name is 'digits' there and 'stl10' here"),
        ("train.seed=1", "train.seed is 0 there and 1 here"),
        ("teacher.precision=bf16", "teacher.precision is 'train' there and 'bf16' here"),
        ("distiller.kappa_student=9", "distiller.kappa_student is 10.0 there and 9.0 here"),
        ("distiller.impl=chunked", "distiller.impl is 'auto' there and 'chunked' here"),  # rounds otherwise
        ("distiller.name=kd", "distiller.name is 'kdav' there and 'kd' here"),
    ],
)
def test_what_it_computes_may_not(start, override, said):
    write_run_config(start())
    with pytest.raises(InputError, match=f"belongs to another config: {said}; use the same value"):
        check_run_folder(start(override, "data.root=x"))


@pytest.mark.parametrize(
    "override", ["data.workers=3", "data.hw_decoder_load=0.5", "train.keep_freed_memory=false"]
)
def test_a_machine_s_own_may_differ_among_processes(start, override):
    assert config_facts(start(override)) == config_facts(start())


@pytest.mark.parametrize("override", ["data.root=elsewhere", "train.zero_stage=1", "distiller.impl=chunked"])
def test_all_else_must_be_alike(start, override):
    assert config_facts(start(override)) != config_facts(start())
