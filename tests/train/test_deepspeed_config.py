"""The user's own DeepSpeed settings: merged, refused by name, and in force."""

import json
from pathlib import Path

import pytest
import torch

from kdav_fast.config import TrainConfig
from kdav_fast.errors import InputError
from kdav_fast.train.deepspeed_config import deepspeed_config
from kdav_fast.train.distributed import start_cluster
from kdav_fast.train.loop import run_training
from kdav_fast.train.setup import set_up

PARAMETERS = 1234
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "launch" / "deepspeed").glob("*.json"))


@pytest.fixture
def settings(tmp_path):
    """DeepSpeed's config with a file of the given content."""

    def build(content, **train):
        path = tmp_path / "deepspeed.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return deepspeed_config(TrainConfig(deepspeed=path, **train), 8, None, PARAMETERS)

    return build


def test_what_a_file_adds_stands_beside_what_the_run_decides(settings):
    alone = deepspeed_config(TrainConfig(zero_stage=2), 8, torch.bfloat16, PARAMETERS)
    assert alone["zero_optimization"] == {"stage": 2, "reduce_bucket_size": PARAMETERS}
    assert alone["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    added = {
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5},
        "communication_data_type": "fp32",
    }
    merged = settings(added, zero_stage=2, accumulate=4)
    assert merged["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5}
    assert merged["communication_data_type"] == "fp32"
    assert merged["train_micro_batch_size_per_gpu"] == 8
    assert merged["gradient_accumulation_steps"] == 4


def test_the_same_value_and_auto_are_no_conflict(settings):
    same = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "fp16": "auto",
        "zero_optimization": {"stage": 1},
    }
    assert settings(same, zero_stage=1) == deepspeed_config(TrainConfig(zero_stage=1), 8, None, PARAMETERS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            r"sets zero_optimization\.stage to 2, but train\.zero_stage decides that, which gives 0; remove it",
        ),
        (
            {"train_batch_size": 64},
            r"sets train_batch_size to 64, but train\.batch_size decides that; remove",
        ),
        ({"gradient_clipping": 1.0}, r"train\.clip_grad_norm decides that, which gives 0\.0; remove"),
        ({"bf16": {"enabled": True}}, r"sets bf16 to .*, but train\.precision decides that"),
        ({"optimizer": {"type": "Adam"}}, "the optimizer section decides that"),
        (
            {"zero_optimization": {"overlap_comm": True}},
            r"no effect at train\.zero_stage=0; set train\.zero_stage=1",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r"sets zero_optimization\.offload_optimizer, which needs an optimizer of DeepSpeed's own; remove it",
        ),
        ({"zero_optimisation": {}}, r"sets zero_optimisation, which it may not; .* is zero_optimization"),
        ("{'a': 1}", "is not valid JSON: .*; mend it"),
        ("[1]", "must hold keys and values"),
        ({"zero_optimization": 2}, "must hold keys and values"),
    ],
)
def test_conflicts_and_mistakes_are_refused_by_name(settings, content, message):
    with pytest.raises(InputError, match=message) as error:
        settings(content)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"train\.deepspeed .*none\.json: No such file.*; give the path"):
        deepspeed_config(TrainConfig(deepspeed=tmp_path / "none.json"), 8, None, PARAMETERS)


def test_what_deepspeed_itself_refuses_is_told_in_one_line(small_config, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text('{"zero_optimization": {"overlap_com": true}}')
    with pytest.raises(InputError, match=r"DeepSpeed refuses .*deepspeed\.json.*overlap_com") as error:
        run_training(small_config(tmp_path / "run", train={"deepspeed": str(path), "zero_stage": 1}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_in_force_and_change_no_result(small_config, tmp_path, example):
    students = []
    for name, file in (("plain", None), ("example", str(example))):
        config = small_config(tmp_path / name, train={"zero_stage": 1, "epochs": 1, "deepspeed": file})
        run_training(config)
        students.append((config.run_dir / "student.safetensors").read_bytes())
    assert students[0] == students[1]
    parts = set_up(config, start_cluster("cpu"))
    in_force = parts.engine.config["zero_optimization"]
    for key, value in json.loads(example.read_text())["zero_optimization"].items():
        assert in_force[key] == value
        assert getattr(parts.engine._engine._config.zero_config, key) == value


def test_profilers_and_monitors_write_their_files(small_config, tmp_path):
    flops, monitor = tmp_path / "flops.txt", tmp_path / "csv"
    content = {
        "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": str(flops)},
        "csv_monitor": {"enabled": True, "output_path": str(monitor), "job_name": "run"},
    }
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(content))
    run_training(small_config(tmp_path / "run", train={"epochs": 1, "deepspeed": str(path)}))
    assert "Flops Profiler" in flops.read_text()
    assert len((monitor / "run" / "Train_Samples_lr.csv").read_text().splitlines()) > 2
