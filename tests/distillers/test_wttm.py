"""Transformed teacher matching, weighted and not, against the authors' code."""

import pytest

from kdav_fast.distillers.wttm import transformed_teacher_kl
from tests.distillers.golden import Golden, golden_cases


@pytest.mark.parametrize("case", [*golden_cases("TTM"), *golden_cases("WTTM")])
def test_it_is_the_authors(case, build, agrees):
    golden, weighted = Golden(case), case.startswith("W")
    keys = golden.numbers(exponent="exponent", weight_label="ce_weight", weight_kl="kd_weight")
    (student,) = golden.leaves("student_logits")
    losses = golden.losses(
        build("wttm", golden.facts, weighted=weighted, **keys), [student], [golden["teacher_logits"]]
    )
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["transformed_kl"], golden["kd"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])
    if weighted:
        _, weight = transformed_teacher_kl(student, golden["teacher_logits"], keys["exponent"])
        agrees(weight, golden["weight"])
