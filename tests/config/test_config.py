"""The schema: what it accepts, what it refuses and in which words."""

import itertools

import pytest

from kdav_fast.config import Config, dump_config, load_config, parse_config
from kdav_fast.distillers.kdav import KDAV
from kdav_fast.errors import InputError

TEACHER = ["teacher.name=cifar:resnet14", "teacher.checkpoint=teacher"]


def test_dump_and_load_are_inverse(tmp_path):
    config = load_config(
        None, [*TEACHER, "distiller.name=kdav", "data.mean=[0.1,0.2,0.3]", "data.std=[1,1,1]"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_keys_are_dumped_in_the_order_of_the_schema():
    lines = dump_config(load_config(None, [*TEACHER, "distiller.name=kd"])).splitlines()
    sections = [line.partition(":")[0] for line in lines if not line.startswith((" ", "-"))]
    assert sections == [
        "run_dir",
        "device",
        "data",
        "model",
        "teacher",
        "distiller",
        "optimizer",
        "schedule",
        "train",
    ]
    assert lines[lines.index("distiller:") + 1 :][:3] == [
        "  name: kd",
        "  standardize_logits: false",
        "  sample_deviation: false",
    ]


def test_overrides_take_yaml_values():
    config = load_config(
        None, ["train.epochs=2.5", "data.flip=false", "schedule={name: constant}", "data.workers=null"]
    )
    assert config.train.epochs == 2.5
    assert config.data.flip is False
    assert config.data.workers is None
    assert config.schedule.name == "constant"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".1e-2"])
def test_numbers_may_be_written_as_one_writes_them(text):
    assert load_config(None, [f"optimizer.lr={text}"]).optimizer.lr == 0.001


def test_another_distiller_drops_the_keys_of_the_first(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("teacher: {name: a, checkpoint: b}\ndistiller: {name: kdav, kappa_student: 3}\n")
    assert load_config(file, ["distiller.kappa_teacher=4"]).distiller == KDAV.Config(
        name="kdav", kappa_student=3, kappa_teacher=4
    )
    for overrides in itertools.permutations(["distiller.name=kd", "distiller.weight_kl=0.5"]):
        assert load_config(file, list(overrides)).distiller.weight_kl == 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distiller.name=kdav"], "distiller.name is 'kdav' but there is no teacher; set teacher.name"),
        (
            [*TEACHER, "distiller.name=kdav", "distiller.kapa_student=3"],
            "nearest known one is 'distiller.kappa_student'",
        ),
        (
            [*TEACHER, "distiller.name=kd", "distiller.kappa_student=3"],
            "unknown key 'distiller.kappa_student'",
        ),
        (
            [
                *TEACHER,
                "distiller.name=kdav",
                "distiller.weight_membership=0",
                "distiller.weight_prediction=0",
            ],
            "are both 0",
        ),
        (
            [*TEACHER, "distiller.name=kdav", "distiller.prototypes=running", "train.mixup=0.2"],
            "prototypes=measured",
        ),
        ([*TEACHER, "distiller.name=kdav", "train.label_smoothing=0.1"], "which uses no labels"),
        (
            [*TEACHER, "distiller.name=kdav", "train.label_smoothing=0.1"],
            "or, with kdav, distiller.weight_label above 0",
        ),
        ([*TEACHER, "teacher.precision=fp8"], "'teacher.precision'"),
        ([*TEACHER, "distiller.name=kdav", "distiller.weight_label=-1"], "'distiller.weight_label'"),
        ([*TEACHER, "distiller.name=simkd", "train.label_smoothing=0.1"], "'simkd', which uses no labels"),
        (["distiller.name=simkd"], "distiller.name is 'simkd' but there is no teacher; set teacher.name"),
        (
            [*TEACHER, "distiller.name=simkd", "distiller.weight_feature=0"],
            "distiller.weight_feature and distiller.weight_kl are both 0; raise one",
        ),
        (
            [*TEACHER, "distiller.name=simkd", "distiller.temperature=0"],
            "'distiller.temperature' is 0",
        ),
        (
            [*TEACHER, "distiller.name=simkd", "distiller.weight_feat=3"],
            "nearest known one is 'distiller.weight_feature'",
        ),
        (["data.name=folder"], "data.root is needed"),
        (["data.crop_area=[0.9,0.1]"], "data.crop_area is [0.9, 0.1]; the first must not exceed the second"),
        (["data.crop_area=[0.9,1.1]"], "at most 1"),
        (["data.mean=[0.5,0.5,0.5]"], "data.mean and data.std belong together"),
        (["data.mean=[0,0,0]", "data.std=[0,1,1]"], "every value must be above 0"),
        (
            ["data.image_size=32", "data.eval_resize=16"],
            "data.eval_resize is 16; it must be at least data.image_size (32)",
        ),
        (["data.image_size=1"], "data.image_size"),
        (["data.views=0"], "'data.views' is 0"),
        (
            ["data.crop=none", "data.views=3"],
            "data.views is 3; with data.crop 'none' and neither automatic augmentation nor colour jitter an image has "
            "two views, as it is and mirrored; give 2, drop data.views, or augment more",
        ),
        (["data.crop=none", "data.flip=false", "data.views=2"], "has no other view than itself; give 1"),
        (
            [
                "teacher.name=cifar:resnet8",
                "distiller.name=kdav",
                "distiller.memory_length=31",
                "train.batch_size=32",
            ],
            "distiller.memory_length is 31, but 32 images enter the memory at once",
        ),
        (["schedule.name=step"], "schedule.milestones is empty"),
        (["schedule.name=step", "schedule.milestones=[5,3]"], "rising order"),
        (["schedule.name=one_cycle", "schedule.warmup_epochs=1"], "does not go with 'one_cycle'"),
        (
            ["model.pretrained=true", "model.checkpoint=x"],
            "model: checkpoint and pretrained exclude each other",
        ),
        (
            ["model.init=torch", "model.checkpoint=x"],
            "init 'torch' has no effect on weights from checkpoint or pretrained; drop one of them",
        ),
        (["model.init=he"], "'model.init' is 'he'"),
        (["train.epochs=.nan"], "'train.epochs'"),
        (["train.epochs=true"], "'train.epochs' is True"),
        (["train.batch_size=1.5"], "'train.batch_size' is 1.5"),
        (["data.flip=3"], "'data.flip' is 3"),
        (["data=5"], "'data' is 5"),
        (["run_dir.x=5"], "'run_dir'"),
    ],
)
def test_refusals(overrides, message):
    with pytest.raises(InputError) as error:
        load_config(None, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_default_is_valid():
    assert parse_config({}) == Config()
