"""DIST against the authors' code."""

import pytest

from tests.distillers.golden import Golden, golden_cases


@pytest.mark.parametrize("setting", ["", "cifar_"])
@pytest.mark.parametrize("case", golden_cases("DIST"))
def test_it_is_the_authors(case, setting, build, agrees):
    golden = Golden(case, setting)
    keys = golden.numbers(
        temperature="tau", weight_label="ce_weight", weight_inter="beta", weight_intra="gamma"
    )
    for key in ("weight_inter", "weight_intra"):
        keys[key] *= float(golden["kd_weight"])
    (student,) = golden.leaves("student_logits")
    losses = golden.losses(build("dist", golden.facts, **keys), [student], [golden["teacher_logits"]])
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["inter_class"], golden["inter"])
    agrees(losses.parts["intra_class"], golden["intra"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])
