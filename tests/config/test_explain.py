"""Every bad config gets one line: the key, what was given, what is allowed."""

import pytest

from kdav_fast.config import Sections, TrainConfig, load_config
from kdav_fast.config.method import method_config, method_names
from kdav_fast.errors import InputError, shown

WRONG = {
    # unknown keys: the right one, wherever it is, or what may stand there
    "lr: 0.1": "unknown key 'lr'; perhaps optimizer.lr",
    "epoch: 3": "unknown key 'epoch'; perhaps train.epochs",
    "kappa_student: 3": "unknown key 'kappa_student'; perhaps distiller.kappa_student",
    "optimiser: {lr: 3}": "unknown key 'optimiser'; the nearest known one is 'optimizer'",
    "train: {epoch: 3}": "unknown key 'train.epoch'; the nearest known one is 'train.epochs'",
    "train: {lr: 0.1}": "unknown key 'train.lr'; perhaps optimizer.lr",
    "data: {batch_size: 3}": "unknown key 'data.batch_size'; perhaps train.batch_size",
    "train: {data: {root: x}}": "unknown key 'train.data'; perhaps data",
    "zzzz: 1": "unknown key 'zzzz'; allowed: run_dir, device, data, model, teacher, ",
    "schedule: {zzzz: 1}": "unknown key 'schedule.zzzz'; allowed in schedule: name, warmup_epochs, ",
    "teacher: {nam: x}": "unknown key 'teacher.nam'; the nearest known one is 'teacher.name'",
    "distiller: {name: none, kappa_student: 3}": "with distiller.name 'none'; it goes with 'kdav'",
    "2020-01-01: 1": "unknown key '2020-01-01'; allowed: ",
    # sections
    "data:": "'data' is empty; give it keys, or leave it out",
    "data: [1]": "'data' is [1], but it is a section, which holds keys and values",
    "model: timm:resnet18": "'model' is 'timm:resnet18', but it is a section, which holds keys and values; "
    "perhaps model.name is meant",
    "distiller: kdav": "perhaps distiller.name is meant",
    "distiller: {name: foo}": "distiller.name is 'foo'; allowed: 'none', ",
    "distiller: {name: [1]}": "distiller.name is [1]; allowed: 'none', ",
    "distiller: {kappa_student: 3}": "distiller.name is missing; allowed: 'none', ",
    "distiller: {}": "distiller.name is missing; allowed: 'none', ",
    "distiller:": "'distiller' is empty; give it keys, or leave it out",
    "distiller: []": "'distiller' is [], but it is a section, which holds keys and values",
    "distiller: {name: 3}": "distiller.name is 3; allowed: 'none', ",
    "distiller: {name: ../kd}": "distiller.name is '../kd'; allowed: 'none', ",
    "distiller: {name: kd.py}": "distiller.name is 'kd.py'; allowed: 'none', ",
    "distiller: {name: KD}": "distiller.name is 'KD'; allowed: 'none', ",
    # files of that folder, but no methods
    "distiller: {name: base}": "distiller.name is 'base'; allowed: 'none', ",
    "distiller: {name: __init__}": "distiller.name is '__init__'; allowed: 'none', ",
    "distiller: {name: memories}": "distiller.name is 'memories'; allowed: 'none', ",
    # the method's own keys
    "distiller: {name: kd, needs_teacher: false}": "unknown key 'distiller.needs_teacher' with distiller.name 'kd'; "
    "allowed in distiller: name, standardize_logits, sample_deviation, temperature, weight_label, weight_kl",
    "distiller: {name: kd, name.x: 3}": "the nearest known one is 'distiller.name'",
    "distiller: {name: kd, weight_kl: {a: {b: 1}}}": "'distiller.weight_kl' is {'a': {'b': 1}}; allowed: a number",
    "distiller: {name: kd, weight_kl: .nan}": "'distiller.weight_kl' is nan; allowed: a number above 0",
    "distiller: {name: kdav, posterior: on}": "'distiller.posterior' is True; allowed: 'dense', 'ids'",
    "distiller: &all {name: kd, weight_kl: *all}": "the alias in line 1 refers to what it stands in",
    "teacher: {}": "'teacher.name' is missing; it must be given",
    # numbers
    "train: {epochs: '3'}": "'train.epochs' is '3', which is text; allowed: a number above 0",
    "train: {epochs: 1:30}": "'train.epochs' is '1:30', which is text; allowed: a number above 0",
    "train: {epochs: }": "'train.epochs' is empty; allowed: a number above 0",
    "train: {epochs: .nan}": "'train.epochs' is nan; allowed: a number above 0, finite",
    "train: {epochs: 1e999}": "'train.epochs' is inf; allowed: a number above 0, finite",
    "train: {epochs: {a: 1}}": "'train.epochs' is {'a': 1}; allowed: a number above 0",
    "train: {batch_size: 1e3}": "'train.batch_size' is 1000.0; allowed: a whole number of at least 1, written without",
    "train: {seed: 2147483648}": "allowed: a whole number of at least 0 and below 2147483648",
    "train: {zero_stage: true}": "'train.zero_stage' is True; allowed: a whole number of at least 0 and of at most 3",
    "train: {zero_stage: 1.0}": "'train.zero_stage' is 1.0; allowed: a whole number of at least 0 and of at most 3",
    "data: {hw_decoder_load: 1.5}": "allowed: null or a number of at least 0 and of at most 1",
    "data: {workers: x}": "'data.workers' is 'x', which is text; allowed: null or a whole number of at least 1",
    # lists
    "data: {mean: 0.5}": "'data.mean' is 0.5; allowed: null or a list of 3, each a number",
    "data: {mean: [0.5, 0.5]}": "'data.mean' is [0.5, 0.5]; allowed: null or a list of 3, each a number",
    "data: {mean: [1, 1, 1, 1]}": "'data.mean' is [1, 1, 1, 1]; allowed: null or a list of 3, each a number",
    "data: {mean: [true, 1, 1]}": "'data.mean[0]' is True; allowed: a number",
    "data: {color_jitter: [0, 0, x, 0]}": "'data.color_jitter[2]' is 'x', which is text; allowed: a number of",
    "data: {color_jitter: [0, 0, 0, 0.9]}": "'data.color_jitter[3]' is 0.9; allowed: a number of at least 0 and of at",
    "data: {color_jitter: a}": "allowed: a list of 4: a number of at least 0; ",
    "schedule: {milestones: 3}": "'schedule.milestones' is 3; allowed: a list, each a number above 0",
    "schedule: {milestones: [1, -2]}": "'schedule.milestones[1]' is -2; allowed: a number above 0",
    # text and paths
    "device: gpu": "'device' is 'gpu'; allowed: 'auto', 'cpu', 'cuda'",
    "device: no": "'device' is False; allowed: 'auto', 'cpu', 'cuda'",
    "data: {flip: maybe}": "'data.flip' is 'maybe'; allowed: true or false",
    "model: {name: 3}": "'model.name' is 3; allowed: text, in quotes if it looks like a number",
    "run_dir: 3": "'run_dir' is 3; allowed: a path, in quotes if it looks like a number",
    "run_dir: ''": "'run_dir' is ''; give a path, '.' for this folder",
    "run_dir: ~nobody-has-this-name/x": "is '~nobody-has-this-name/x'; it has no known home directory",
    'data: {root: "a\\0b"}': "'data.root' is 'a\\x00b'; a path holds no such character",
    f"run_dir: {'x' * 256}": "no file system takes so long a path; shorten it",
    f"data: {{root: {'x/' * 2048}}}": "no file system takes so long a path; shorten it",
    'run_dir: "a\\ud800b"': "a path holds no such character",
    # what float32 cannot draw
    "train: {mixup: 1e-300}": "'train.mixup' is 1e-300; give 0, which is off, or 0.01 to 1000000",
    "train: {cutmix: 1e300}": "'train.cutmix' is 1e+300; give 0, which is off, or 0.01 to 1000000",
    "train: {cutmix: -1}": "'train.cutmix' is -1; give 0, which is off, or 0.01 to 1000000",
    "train: {mixup: .nan}": "'train.mixup' is nan; ",
    # whole files
    "": "is empty; give it keys and values, or {} for the defaults",
    "# later\n---\n": "is empty; give it keys and values, or {} for the defaults",
    "[]": "holds a list; it must hold keys and values",
    "train: {epochs: 3}\ntrain: {seed: 1}": "gives 'train' twice, in line 1 and 2; keep one",
}
OVERRIDES = {
    "train.epochs": "override 'train.epochs' is not of the form key=value",
    "=5": "override '=5' is not of the form key=value",
    "train..epochs=3": "override 'train..epochs=3' is not of the form key=value",
    "train.=3": "override 'train.=3' is not of the form key=value",
    "train.epochs==3": "'train.epochs' is '=3', which is text; allowed",
    "train.epochs=": "'train.epochs' is empty; allowed",
    "train.epochs=[": "override 'train.epochs=[': the value is not valid YAML: line 1, column 2",
    "train.epochs={a: 1, a: 2}": "the value gives 'a' twice",
    "distiller.name=None": "distiller.name is 'None'; allowed: 'none', ",
    "distiller.name.x=3": "distiller.name is {'x': 3}; allowed: 'none', ",
    "distiller.alpha=3": "distiller.name is missing; allowed: 'none', ",
    "distiller.name=kd": "distiller.name is 'kd' but there is no teacher; set teacher.name",
    "data.color_jitter.2=0.5": "'data.color_jitter' is {'2': 0.5}; allowed: a list of 4",
    "train.epochs=\x1b[31m": "the value is not valid YAML: it holds the character U+001B",
    "\x1b[31m=3": r"unknown key '\x1b[31m'",
    "a\nb=3": r"unknown key 'a\nb'",
    "x" * 50_000 + "=3": "unknown key 'xxx",
    "run_dir=[" + "x" * 50_000 + "]": "'run_dir' is ['xxx",
    "train.epochs=" + "x" * 50_000: "'train.epochs' is 'xxx",
    "train.epochs=[" + "x," * 5000 + "]": "'train.epochs' is ['x', 'x'",
}


def refused(path, overrides=()):
    with pytest.raises(InputError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert message.isprintable(), message
    assert len(message) < 1000
    assert not any(word in message for word in ("pydantic", "Input should", "instance of", "DataConfig"))
    return message


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_in_one_line(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert WRONG[text] in refused(path)


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: ascii(text[:30]))
def test_a_wrong_override_in_one_line(override):
    assert OVERRIDES[override] in refused(None, [override])


def test_a_number_too_large_need_not_be_written_otherwise():
    message = refused(
        None, ["distiller.name=nkd", "distiller.temperature=1.0e+7", "teacher.name=cifar:resnet8"]
    )
    assert "'distiller.temperature' is 10000000.0; allowed: a number " in message
    assert "written" not in message


EVERY_KEY = [
    f"{section}.{key}" if inner else section
    for section, field in Sections.model_fields.items()
    for inner in [getattr(type(field.default), "model_fields", {})]
    for key in inner or [""]
]


def says_what_it_takes(key, *overrides):
    for value in ("{a: {b: 1}}", "[[1]]", ".nan", "no such thing"):
        try:
            load_config(None, [*overrides, f"{key}={value}"])
        except InputError:
            assert key.split(".")[-1] in refused(None, [*overrides, f"{key}={value}"])


@pytest.mark.parametrize("key", EVERY_KEY)
def test_every_key_says_what_it_takes(key):
    """Also those that are added later: nothing of pydantic's own language comes through."""
    says_what_it_takes(key)


@pytest.mark.parametrize("method", method_names())
def test_so_does_every_key_of_every_method(method):
    for key in method_config(method).model_fields:
        says_what_it_takes(f"distiller.{key}", "teacher.name=cifar:resnet8", f"distiller.name={method}")


def test_of_an_override_that_is_given_twice_the_last_one_counts():
    assert load_config(None, ["train.epochs=3", "train.epochs=4"]).train.epochs == 4


def test_the_defaults_can_be_asked_for(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("{}")
    assert load_config(path).train == TrainConfig()


def test_sections_from_one_alias_do_not_change_together(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: &net {name: cifar:resnet8}\nteacher: *net\n")
    config = load_config(path, ["model.width=2"])
    assert (config.model.width, config.teacher.width) == (2, 1)


def test_quoted_values_are_short():
    loop = []
    loop.append(loop)
    assert shown("x" * 10**6) == f"'{'x' * 47} ... {'x' * 47}'"
    assert len(shown(list(range(10**5)))) <= 100
    assert shown(10**5000) == "a int"
    assert shown(loop) == "[[...]]"
    assert shown(None) == "None"


def test_an_error_is_one_line_whatever_it_quotes():
    message = str(InputError("a\nb\x1b[31m\udc80 " + "x" * 10**6))
    assert message.startswith(r"a b\x1b[31m\udc80 xxx")
    assert message.isprintable()
    assert len(message) <= 2000
