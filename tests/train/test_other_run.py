"""A run that is continued with something else than it began with is refused in one line, whatever its files say."""

import json

import pytest
import torch
from safetensors.torch import load_file, save

from kdav_fast.checkpoint.manifest import record_of
from kdav_fast.cli import BAD_INPUT
from kdav_fast.data.views import Views
from kdav_fast.distillers.kd import KD
from kdav_fast.errors import InputError
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.train.setup import set_up
from tests.train.stopped_run import change_manifest, error_line, kdav


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"distiller": "dkd", "config": "0" * 16},
            "is of another run, with distiller.name 'dkd' or other settings",
        ),
        ({"config": "0" * 16}, "is of another run"),
        (
            {"teacher": "0" * 16},
            "was written with another teacher than the weights in teacher.checkpoint are now",
        ),
    ],
)
def test_a_checkpoint_of_another_run(config, newest, capsys, change, said):
    change_manifest(newest, lambda manifest: manifest.update(change))
    assert kdav(config) == BAD_INPUT
    assert said in error_line(capsys)


def test_a_teacher_that_has_changed_since(config, newest, capsys):
    begun_with = json.loads((newest / "manifest.json").read_text())["teacher"]
    change_manifest(newest, lambda manifest: manifest.update(teacher=begun_with[::-1]))
    assert kdav(config) == BAD_INPUT
    assert f"checksum {begun_with[::-1]} there, {begun_with} here" in error_line(capsys)


@pytest.mark.parametrize("change", ["shape", "more", "fewer"])
def test_a_memory_of_another_form(config, newest, capsys, change):
    file = newest / "distiller.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    if change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif change == "more":
        tensors["another"] = torch.zeros(1)
    else:
        del tensors[name]
    file.write_bytes(save(tensors))
    record = record_of(file.read_bytes())
    change_manifest(newest, lambda manifest: manifest["files"].update({file.name: record}))
    assert kdav(config) == BAD_INPUT
    assert "distiller.safetensors is of another form than what distiller.name 'kdav' keeps now" in error_line(
        capsys
    )


def test_several_views_are_not_mixed(small_config, teacher_run, tmp_path, monkeypatch):
    monkeypatch.setattr(KD, "order", Views(2))
    teacher = {"name": "cifar:resnet8", "checkpoint": str(teacher_run)}
    config = small_config(tmp_path / "run", teacher=teacher, distiller={"name": "kd"}, train={"mixup": 0.2})
    with pytest.raises(
        InputError, match=r"do not go with distiller.name 'kd', which sees each image in 2 views"
    ):
        set_up(config, start_cluster("cpu"))
