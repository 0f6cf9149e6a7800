"""Which precision `auto` stands for, and that a run keeps the one it began with."""

import pytest
import torch
import yaml

from kdav_fast.doctor import machine as doctor
from kdav_fast.errors import InputError
from kdav_fast.inference.evaluate import evaluate_file
from kdav_fast.runtime import precision
from kdav_fast.runtime.precision import autocast_dtype, resolve_precision
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.train.folder.beginning import settled_config
from kdav_fast.train.folder.config import write_run_config
from kdav_fast.train.loop import run_training

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def let_cpu_have_bf16(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.parametrize(
    ("has_bf16", "image_size", "expected"),
    [(True, 32, "bf16"), (True, 224, "bf16"), (True, 31, "fp32"), (False, 224, "fp32")],
)
def test_auto_on_a_cpu(monkeypatch, has_bf16, image_size, expected):
    let_cpu_have_bf16(monkeypatch, has_bf16)
    assert resolve_precision("auto", CPU, image_size) == expected
    for given in ("fp32", "bf16", "fp16"):
        assert resolve_precision(given, CPU, image_size) == given


def test_auto_without_onednn(monkeypatch):
    let_cpu_have_bf16(monkeypatch, True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert resolve_precision("auto", CPU, 224) == "fp32"


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_does_not_ask_for_the_size(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert resolve_precision("auto", GPU, 8) == expected


def test_dtypes():
    assert autocast_dtype("fp32", CPU) is None
    assert autocast_dtype("bf16", CPU) is torch.bfloat16
    assert autocast_dtype("fp16", CPU) is torch.float16


def test_a_run_keeps_the_precision_that_it_began_with(monkeypatch, small_config, tmp_path):
    let_cpu_have_bf16(monkeypatch, True)
    config = small_config(tmp_path / "run", train={"epochs": 0.25, "evaluate_every": 0, "save_every": 0})
    monkeypatch.setattr(precision, "SMALLEST_BF16_IMAGE", 8)
    run_training(config)
    assert yaml.safe_load((config.run_dir / "config.yaml").read_text())["train"]["precision"] == "bf16"

    let_cpu_have_bf16(monkeypatch, False)  # continued on another machine
    config, _ = settled_config(config, start_cluster("cpu"), extend=False)
    assert config.train.precision == "bf16"
    explicit = small_config(
        config.run_dir, train={**config.train.model_dump(mode="json"), "precision": "fp32"}
    )
    with pytest.raises(InputError, match=r"train\.precision is 'bf16' there and 'fp32' here"):
        settled_config(explicit, start_cluster("cpu"), extend=False)


def test_an_evaluation_computes_as_its_run_did(monkeypatch, small_config, tmp_path):
    let_cpu_have_bf16(monkeypatch, True)
    monkeypatch.setattr(precision, "SMALLEST_BF16_IMAGE", 8)
    config = small_config(tmp_path / "run", train={"epochs": 0.25, "precision": "fp32", "save_every": 0})
    accuracy = run_training(config)
    same = pytest.approx(accuracy.loss, rel=1e-6)  # batches of another size add up otherwise
    assert evaluate_file(config.run_dir).loss == same
    assert evaluate_file(config.run_dir, ["train.precision=bf16"]).loss != same


def test_a_run_that_did_not_write_down_what_auto_stood_for_is_of_another_version(small_config, tmp_path):
    config = small_config(tmp_path / "run")
    write_run_config(config)  # it says `auto`, as then
    with pytest.raises(
        InputError, match=r"was begun by another version of kdav_fast.*start anew in another run_dir"
    ):
        settled_config(config, start_cluster("cpu"), extend=False)


def test_doctor_says_what_auto_takes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    let_cpu_have_bf16(monkeypatch, True)
    state, detail = doctor.PROBES["hardware", "bf16"]()
    assert state == "on"
    assert "(AVX-512); train.precision=auto takes bf16 for images of 32 pixels or more" in detail
    let_cpu_have_bf16(monkeypatch, False)
    with pytest.raises(doctor.Off, match="no bf16 instructions"):
        doctor.PROBES["hardware", "bf16"]()
