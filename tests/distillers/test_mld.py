"""Multi-level distillation against the published formula and the authors' code, in one view and two."""

import pytest
import torch

from kdav_fast.config.loading import load_config
from kdav_fast.data.views import Shuffled, Views
from kdav_fast.distillers.terms.levels import share_up_to_median
from kdav_fast.errors import InputError
from tests.distillers.golden import Golden, golden_cases

SUFFIXES = ("", "_strong")
WEIGHTS = {"weight_label": "ce_weight", "weight_levels": "kd_weight"}


def losses_of(golden, build, suffixes=SUFFIXES, **keys):
    """The losses, and the student's logits of each view."""
    temperatures = golden["temperatures"].tolist()
    distiller = build(
        "mld",
        golden.facts,
        temperatures=temperatures,
        views=len(suffixes),
        **golden.numbers(**WEIGHTS),
        **keys,
    )
    views = golden.leaves(*(f"student_logits{suffix}" for suffix in suffixes))
    return golden.losses(distiller, views, [golden[f"teacher_logits{suffix}"] for suffix in suffixes]), views


def views_of(golden, level):
    return sum(golden[f"{level}_{view}"] for view in ("weak", "strong"))


@pytest.mark.parametrize("setting", ["", "imagenet_"])
@pytest.mark.parametrize("case", golden_cases("MLD"))
def test_it_is_the_published_formula(case, setting, build, agrees):
    golden = Golden(case, setting)
    losses, views = losses_of(golden, build)
    agrees(losses.parts["cross_entropy"], golden["ce"])
    for part, level in (("instance_level", "instance"), ("batch_level", "batch"), ("class_level", "class")):
        agrees(losses.parts[part], views_of(golden, level))
    agrees(losses.total, golden["loss"])
    for logits, suffix in zip(views, SUFFIXES, strict=True):
        agrees(logits.grad, golden[f"grad_student_logits{suffix}"])


@pytest.mark.parametrize("setting", ["", "imagenet_"])
@pytest.mark.parametrize("case", golden_cases("MLD"))
def test_in_one_view_it_is_the_formula_of_the_first(case, setting, build, agrees):
    golden = Golden(case, setting)
    losses, (logits,) = losses_of(golden, build, suffixes=("",))
    agrees(losses.total, golden["single_view_loss"])
    agrees(logits.grad, golden["single_view_grad_student_logits"])


@pytest.mark.parametrize("setting", ["", "imagenet_"])
@pytest.mark.parametrize("case", golden_cases("MLD"))
def test_in_the_code_s_form_it_is_what_the_authors_code_computes(case, setting, build, agrees):
    golden = Golden(case, setting)
    losses, views = losses_of(golden, build, form="code")
    weight_label, weight_levels = (float(golden[name]) for name in WEIGHTS.values())
    agrees(weight_label * losses.parts["cross_entropy"], golden["official_ce"])
    official = {"instance_level": "kd", "batch_level": "bc", "class_level": "cc"}
    for part, name in official.items():
        agrees(weight_levels * losses.parts[part], golden[f"official_{name}"])
    agrees(losses.total, golden["official_loss"])
    for logits, suffix in zip(views, SUFFIXES, strict=True):
        agrees(logits.grad, golden[f"official_grad_student_logits{suffix}"])


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_median_is_of_valid_values_alone(count):
    values = torch.tensor([3.0, 1.0, 7.0, 5.0, 2.0, 7.0, 7.0, 0.5])
    valid = torch.arange(8) < count
    share = share_up_to_median(values.where(valid, torch.nan).nan_to_num(100.0), valid)
    median = torch.quantile(values[:count], 0.5)
    assert share.item() == pytest.approx((values[:count] <= median).double().mean().item())


def test_views_and_forms_that_do_not_go_together(build):
    assert build("mld").order == Views(2)
    assert build("mld", views=1).order == Shuffled()
    taught = ["distiller.name=mld", "teacher.name=cifar:resnet8"]
    for keys, message in (
        (["distiller.form=code", "distiller.views=1"], "distiller.form 'code' is of two views"),
        (["distiller.views=3"], "'distiller.views' is 3; allowed: 1, 2"),
        (["distiller.temperatures=[]"], "distiller.temperatures"),
        (["train.cutmix=1"], "do not go with distiller.name 'mld'; set them to 0"),
    ):
        with pytest.raises(InputError, match=message):
            load_config(None, [*taught, *keys])
    load_config(None, [*taught, "distiller.views=1", "train.cutmix=1"])
