"""Teacher-free distillation, both variants in both forms, against the authors' code and the paper's equations."""

import pytest
import torch
import torch.nn.functional as F

from kdav_fast.config.loading import load_config
from kdav_fast.config.method import method_section
from kdav_fast.distillers.terms.softened import virtual_teacher_kl
from kdav_fast.errors import InputError
from tests.distillers.golden import Golden, golden_cases
from tests.distillers.small_run import small_facts


@pytest.mark.parametrize("setting", ["", "mobilenetv2_", "paper_"])
@pytest.mark.parametrize("case", [*golden_cases("TFKD_reg"), *golden_cases("TFKD_self")])
def test_it_is_the_authors(case, setting, build, agrees):
    golden, itself = Golden(case, setting), case.startswith("TFKD_self")
    keys = golden.numbers(alpha="alpha", temperature="temperature")
    if setting != "paper_":
        keys |= {"form": "code", **golden.numbers(multiplier="multiplier")}
    variant = "self_training" if itself else "virtual_teacher"
    (student,) = golden.leaves("student_logits")
    teacher = [golden["teacher_logits"]] if itself else None
    losses = golden.losses(build("tfkd", golden.facts, variant=variant, **keys), [student], teacher)
    agrees(losses.parts["cross_entropy"], golden["ce"])
    # The code's mean is over elements, of which a row has K.
    shrunk = 1 if setting == "paper_" else golden.classes
    agrees(losses.parts["teacher_free_kl"] / shrunk, golden["kd"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])


@pytest.mark.parametrize(
    ("variant", "published"), [("virtual_teacher", (0.1, 20.0, 100.0)), ("self_training", (0.95, 6.0, 50.0))]
)
def test_the_published_settings_are_the_defaults(variant, published, batch, build, losses):
    keys = dict(zip(("alpha", "temperature", "multiplier"), published, strict=True))
    given, default = (
        losses(build("tfkd", variant=variant, form="code", **some), batch).total for some in (keys, {})
    )
    assert torch.equal(given, default)


def test_a_teacher_is_needed_in_self_training_alone_and_is_best_the_student(build):
    assert load_config(None, ["distiller.name=tfkd"]).distiller.needs_teacher is False
    with pytest.raises(InputError, match="there is no teacher; set teacher.name"):
        load_config(None, ["distiller.name=tfkd", "distiller.variant=self_training"])
    (remark,) = build("tfkd", variant="self_training").remarks()
    assert "the paper's teacher is the student itself, trained before" in remark


def test_the_paper_s_form_says_that_published_numbers_are_the_code_s(build):
    (remark,) = build("tfkd").remarks()
    assert (
        "teaches next to nothing beside the labels; to repeat published numbers, use distiller.form=code"
        in remark
    )
    assert not build("tfkd", form="code").remarks()
    network = small_facts(method_section({"name": "kd"})).student
    assert not build("tfkd", {"teacher": network}, variant="self_training").remarks()


def test_the_virtual_teacher_s_gradient_in_the_paper_s_form_is_next_to_none():
    """What the remark says: beside that of the labels, at the published settings."""
    logits = torch.randn(
        64, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    labels = torch.arange(64)
    share = {}
    for form, student_temperature in (("paper", 20.0), ("code", 1.0)):
        kl, hard = (
            virtual_teacher_kl(logits, labels, 20.0, student_temperature),
            F.cross_entropy(logits, labels),
        )
        soft, hard = (torch.autograd.grad(loss, logits)[0].norm() for loss in (kl.mean(), hard))
        share[form] = 0.1 * soft / (0.9 * hard)
    assert share["paper"] < 1e-4
    assert share["code"] > 1e-2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["distiller.multiplier=3"], "distiller.multiplier is of the code's form; set distiller.form=code"),
        (["distiller.standardize_logits=true"], "'virtual_teacher', which has no logits; set it to false"),
        (["train.mixup=0.2"], "do not go with distiller.name 'tfkd'; set them to 0"),
    ],
)
def test_what_does_not_go_with_the_virtual_teacher(keys, message):
    with pytest.raises(InputError, match=message):
        load_config(None, ["distiller.name=tfkd", *keys])
