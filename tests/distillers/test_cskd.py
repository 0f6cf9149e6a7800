"""Class-wise self-distillation against the authors' code."""

import pytest

from kdav_fast.config.loading import load_config
from kdav_fast.data.views import ClassPairs
from kdav_fast.errors import InputError
from tests.distillers.golden import Golden, golden_cases


@pytest.mark.parametrize("setting", ["", "finegrained_"])
@pytest.mark.parametrize("case", golden_cases("CSKD"))
def test_it_is_the_authors(case, setting, build, agrees):
    golden = Golden(case, setting)
    distiller = build("cskd", golden.facts, **golden.numbers(temperature="temperature", weight_kl="lamda"))
    student, paired = golden.leaves("student_logits", "paired_logits")
    losses = golden.losses(distiller, [student, paired])
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["paired_kl"], golden["kd"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])
    agrees(paired.grad, golden["grad_paired_logits"])


def test_it_asks_for_pairs_and_no_teacher_and_refuses_mixed_images(build):
    assert build("cskd").order == ClassPairs()
    assert load_config(None, ["distiller.name=cskd"]).teacher is None
    with pytest.raises(InputError, match="do not go with distiller.name 'cskd'; set them to 0"):
        load_config(None, ["distiller.name=cskd", "train.mixup=0.2"])
