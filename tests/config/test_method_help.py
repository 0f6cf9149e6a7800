"""What methods there are, told at a terminal."""

import pytest

from kdav_fast.cli import main
from kdav_fast.config.method import method_config, method_names
from kdav_fast.config.method_help import describe_method


def test_the_list_names_every_method_with_its_title(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(method_names())
    assert "dkd       Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang: CVPR 2022)." in lines


def test_one_is_described_with_its_keys(capsys):
    assert main(["methods", "dkd"]) == 0
    said = capsys.readouterr().out
    assert "teacher: yes; labels: yes; feature maps: no; mixup and CutMix: no" in said
    assert (
        "distiller.beta=8.0  (a number of at least 0 and of at most 1e+06)\n    Of the KL among the others."
        in said
    )
    assert "distiller.temperatures=[2.0, 3.0, 4.0, 5.0, 6.0]  (a list, each a number" in "\n".join(
        describe_method("mld")
    )


@pytest.mark.parametrize("name", method_names())
def test_every_key_says_what_it_means(name):
    fields = method_config(name).model_fields
    assert [key for key, field in fields.items() if not field.description] == []


def test_a_method_that_there_is_not(capsys):
    assert main(["methods", "kdd"]) == 2
    assert "there is no method 'kdd'; give one of none, at, cocord" in capsys.readouterr().err
