"""The user's own DeepSpeed settings: merged, refused by name, and in force."""

import json
import os
from pathlib import Path

import pytest
import torch

from kdav_fast.config import TrainConfig
from kdav_fast.errors import InputError
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.train.engine.settings import deepspeed_config, shows_in_log
from kdav_fast.train.folder.config import config_facts
from kdav_fast.train.loop import run_training
from kdav_fast.train.setup import set_up

PARAMETERS = 1234
EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "launch" / "deepspeed").glob("*.json"))


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


HUGGING_FACE = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": "auto",
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "zero_force_ds_cpu_optimizer": False,
}


def test_a_file_made_for_another_program_is_taken(settings):
    merged = settings(HUGGING_FACE, zero_stage=2)
    own = deepspeed_config(TrainConfig(zero_stage=2), 8, None, PARAMETERS)
    own["zero_optimization"] |= {"overlap_comm": True, "contiguous_gradients": True}
    assert merged == own | {"steps_per_print": 2000}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_number_format_is_taken_if_it_is_the_run_s(tmp_path, kind, enabled, dtype):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({kind: {"enabled": enabled}}))
    config = TrainConfig(deepspeed=path)
    if enabled == (dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]):
        alone = deepspeed_config(TrainConfig(), 8, dtype, PARAMETERS)
        assert deepspeed_config(config, 8, dtype, PARAMETERS) == alone
    else:
        turns = "off" if enabled else "on"
        words = f"sets {kind} to .*{enabled}.*, but train.precision decides that, which turns it {turns}"
        with pytest.raises(InputError, match=words):
            deepspeed_config(config, 8, dtype, PARAMETERS)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"fp16": {"enabled": False, "hysteresis": 2}, "bf16": {"enabled": False}, "amp": {"enabled": False}},
        {"fp16": None, "bf16": {}, "optimizer": {}, "scheduler": None},
        {"torch_autocast": {"enabled": False, "dtype": "bf16"}},
        {"wall_clock_breakdown": False, "memory_breakdown": False, "dump_state": False},
        {"gradient_clipping": 0, "train_batch_size": 128, "gradient_accumulation_steps": 1.0},
        {
            "comms_logger": {"enabled": False, "verbose": True},
            "tensorboard": None,
            "wandb": {"enabled": "auto"},
        },
        {"zero_optimization": {"stage": 0}},
        {
            "zero_optimization": {
                "stage": 0,
                "reduce_bucket_size": "auto",
                "offload_param": {"device": "none"},
            }
        },
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"elasticity": {"enabled": False, "max_train_batch_size": 2000}, "sparse_gradients": False},
        {"zero_allow_untested_optimizer": True, "gradient_allreduce_op": "mean"},
    ],
)
def test_what_is_off_or_agrees_changes_nothing(settings, content):
    alone = deepspeed_config(TrainConfig(), 8, None, PARAMETERS)
    assert settings(content) == alone
    assert not shows_in_log(settings(content))


def test_loss_scaling_is_the_program_s(tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 500}}))
    words = r"sets fp16\.loss_scale_window to 500, but train\.precision decides that, which gives 2000"
    with pytest.raises(InputError, match=words):
        deepspeed_config(TrainConfig(deepspeed=path), 8, torch.float16, PARAMETERS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"zero_optimization": {"overlap_com": True}},
            r"'zero_optimization\.overlap_com'; .* 'zero_optimization\.overlap_comm'",
        ),
        (
            {"zero_optimization": {"zzzz": 1}},
            r"unknown key 'zero_optimization\.zzzz'; allowed in zero_optimization: stage, ",
        ),
        (
            {"zero_optimization": {"overlap_comm": "x"}},
            r"'zero_optimization\.overlap_comm' is 'x'; allowed: true or false",
        ),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "is -1; allowed: a number greater than 0"),
        ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "is 1.5; allowed: a whole number"),
        (
            {"zero_optimization": {"leaf_module": {"x": 1}}},
            r"unknown key 'zero_optimization\.leaf_module\.x'; remove it",
        ),
        (
            {"zero_optimization": {"stage3_max_live_parameters": 5}},
            r"no effect at train\.zero_stage=1; remove it .*zero_stage=3",
        ),
        (
            {"zero_optimization": {"cpu_offload": True}},
            r"sets zero_optimization\.cpu_offload, which needs an optimizer",
        ),
        (
            {"csv_monitor": {"enabled": True, "path": "x"}},
            r"unknown key 'csv_monitor\.path'; allowed in csv_monitor: enabled, ",
        ),
        ({"csv_monitor": True}, "sets csv_monitor to True, but it is a section of keys and values"),
        (
            {"flops_profiler": {"enabeld": True}},
            r"'flops_profiler\.enabeld'; the nearest known one is 'flops_profiler\.enabled'",
        ),
        (
            {"flops_profiler": {"profile_step": "1"}},
            r"'flops_profiler\.profile_step' is '1'; allowed: a whole number",
        ),
        ({"wall_clock_breakdown": "yes"}, "'wall_clock_breakdown' is 'yes'; allowed: true or false"),
        (
            {"communication_data_type": "fp8"},
            "'communication_data_type' is 'fp8'; allowed: 'fp32', 'fp16' or 'bf16'",
        ),
        (
            {"gradient_predivide_factor": 0},
            "'gradient_predivide_factor' is 0; allowed: a number greater than 0",
        ),
        ({"steps_per_print": 0}, "'steps_per_print' is 0; allowed: a number greater than or equal to 1"),
        (
            {"elasticity": {"enabled": True}},
            "sets elasticity, which it may not; this program does not use it, so it must be off",
        ),
        ({"zzzz": False}, "sets zzzz, which it may not; allowed: comet, comms_logger, "),
        ({"x\n" * 5000: 1}, r"sets x\\nx\\n"),
        ('{"dump_state": true, "dump_state": false}', "gives 'dump_state' twice; keep one; mend it"),
        ('{"gradient_predivide_factor": NaN}', "it holds NaN, which is no number there; mend it"),
        ("[" * 50_000, "is nested too deeply"),
    ],
)
def test_inner_mistakes_are_told_in_our_words(settings, content, message):
    with pytest.raises(InputError, match=message) as error:
        settings(content, zero_stage=1)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1600
    assert "pydantic" not in str(error.value)
    assert "Input should" not in str(error.value)


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


def test_a_pipe_is_not_waited_for(small_config, tmp_path):
    """It is read several times: by what compares the processes' settings as well."""
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match=r"train\.deepspeed .*pipe\.json is a pipe or a device; give a file"):
        deepspeed_config(TrainConfig(deepspeed=tmp_path / "pipe.json"), 8, None, PARAMETERS)
    config_facts(small_config(tmp_path / "run", train={"deepspeed": str(tmp_path / "pipe.json")}))


def test_a_monitor_s_folder_that_cannot_be_made_is_told_in_one_line(small_config, tmp_path):
    path = tmp_path / "deepspeed.json"
    monitor = {"enabled": True, "output_path": str(path / "sub")}  # below a file
    path.write_text(json.dumps({"csv_monitor": monitor}))
    with pytest.raises(InputError, match=r"DeepSpeed refuses .*deepspeed\.json: .*Not a directory") as error:
        run_training(small_config(tmp_path / "run", train={"deepspeed": str(path)}))
    assert "\n" not in str(error.value)


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
    run = set_up(config, start_cluster("cpu"))
    run.start_engine()
    in_force = run.engine.config["zero_optimization"]
    for key, value in json.loads(example.read_text())["zero_optimization"].items():
        assert in_force[key] == value
        assert getattr(run.engine._engine._config.zero_config, key) == value


def test_what_is_for_deepspeed_s_log_shows_there(small_config, tmp_path, caplog, capfd):
    import deepspeed

    content = {
        "wall_clock_breakdown": True,
        "dump_state": True,
        "comms_logger": {"enabled": True, "verbose": True},
    }
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(content))
    try:
        run_training(small_config(tmp_path / "run", train={"epochs": 0.25, "deepspeed": str(path)}))
    finally:
        deepspeed.comm.configure(enabled=False)  # of the whole process
    text = caplog.text + capfd.readouterr().out
    for words in ("fwd_microstep: ", "DeepSpeedEngine configuration", "comm op: "):
        assert words in text


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
