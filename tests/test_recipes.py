"""Every recipe in launch/ is a valid config whose networks exist and fit each other, by whatever method."""

import re
from functools import cache
from pathlib import Path

import pytest

from kdav_fast.config import load_config
from kdav_fast.config.documents import parse_yaml
from kdav_fast.config.method import method_names
from kdav_fast.distillers import build_distiller
from kdav_fast.distillers.base import Shapes
from kdav_fast.errors import InputError
from kdav_fast.models import ImageClassifier, build_classifier
from kdav_fast.student.student import Student
from tests.distillers.small_run import CLASSES, small_facts

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = {recipe.stem: recipe for recipe in sorted((REPOSITORY / "launch").glob("*.yaml"))}
CIFAR = "cifar100_resnet32x4_resnet8x4"
TO_RESNET, TO_MOBILENET = "imagenet_resnet34_resnet18", "imagenet_resnet50_mobilenet"
COLUMN = {"CIFAR-100": CIFAR, "R34": TO_RESNET, "R50": TO_MOBILENET}
"""What docs/methods.md calls the recipes that say what is published."""


@cache
def network(name: str, width: float, image_size: int) -> ImageClassifier:
    """One that gives its feature maps, of images that are at most 64 pixels wide."""
    built = build_classifier(name, CLASSES, width=width, image_size=min(image_size, 64))
    built.take_stages(preactivations=True)
    return built


@cache
def shapes(of: ImageClassifier) -> Shapes:
    return Shapes(of.name, of.feature_width, of.stage_shapes())


@pytest.mark.parametrize("recipe", RECIPES)
def test_its_networks_fit_each_other(recipe):
    config = load_config(RECIPES[recipe])
    student = network(config.model.name, config.model.width, config.data.image_size)
    if config.teacher is None:
        assert config.distiller.name == "none"
        return
    teacher = network(config.teacher.name, config.teacher.width, config.data.image_size)
    assert size(student) < size(teacher)
    assert config.teacher.pretrained or config.teacher.checkpoint is not None


def size(of: ImageClassifier) -> int:
    return sum(parameter.numel() for parameter in of.parameters())


REFUSED = {
    (recipe, "sskd"): "data.crop_area begins at 0.08 with distiller.name 'sskd'"
    for recipe in (TO_RESNET, TO_MOBILENET)
}


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - {"cifar10_teacher"}))
def test_every_method_starts_from_it(recipe):
    said = {(recipe, method): refusal(recipe, method) for method in method_names()}
    refused = {case: reason for case, reason in said.items() if reason}
    wanted = {case: reason for case, reason in REFUSED.items() if case[0] == recipe}
    assert refused.keys() == wanted.keys(), refused
    assert all(wanted[case] in refused[case] for case in wanted), refused


def refusal(recipe: str, method: str) -> str:
    """What a start of the method says that needs neither images nor weights; "" where it goes on."""
    try:
        config = load_config(RECIPES[recipe], [f"distiller.name={method}"])
        pair = [
            network(one.name, one.width, config.data.image_size) for one in (config.model, config.teacher)
        ]
        section = config.distiller
        staged = section.needs_stages or section.needs_preactivations
        student, teacher = (shapes(one) if staged else shapes(one)._replace(stages=()) for one in pair)
        facts = small_facts(section)._replace(student=student)
        if section.needs_teacher:
            facts = facts._replace(teacher=teacher, teacher_classifier=pair[1].linear_classifier())
        Student(pair[0], build_distiller(section, facts).head())
    except InputError as error:
        return str(error)
    return ""


def test_the_settings_of_the_paper():
    config = load_config(RECIPES[CIFAR])
    assert (config.train.batch_size, config.train.epochs, config.optimizer.lr) == (64, 240, 0.05)
    assert config.schedule.milestones == (150, 180, 210)
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 5e-4)


@pytest.mark.parametrize(
    ("recipe", "method", "batch", "epochs", "lr", "milestones", "own"),
    [
        (CIFAR, "kd", 64, 240, 0.05, (150, 180, 210), {"temperature": 4.0, "weight_kl": 0.9}),
        (CIFAR, "mld", 64, 240, 0.025, (150, 180, 210), {"form": "code", "views": 2}),
        (CIFAR, "reviewkd", 128, 240, 0.1, (150, 180, 210), {"weight_feature": 5.0, "warmup_epochs": 20.0}),
        (CIFAR, "pskd", 128, 300, 0.1, (150, 225), {"alpha": 0.8}),
        (TO_RESNET, "kd", 512, 100, 0.2, (30, 60, 90), {"temperature": 1.0, "weight_label": 0.5}),
        (TO_RESNET, "simkd", 256, 120, 0.1, (30, 60, 90), {}),
        (TO_RESNET, "wsld", 256, 100, 0.1, (30, 60, 90), {"temperature": 2.0, "alpha": 2.5}),
        (TO_MOBILENET, "dkd", 512, 100, 0.2, (30, 60, 90), {"alpha": 1.0, "beta": 2.0, "warmup_epochs": 1.0}),
        (TO_MOBILENET, "kdav", 256, 90, 0.1, (30, 60), {"posterior": "ids"}),
    ],
)
def test_published_runs(recipe, method, batch, epochs, lr, milestones, own):
    config = load_config(RECIPES[recipe], [f"distiller.name={method}"])
    assert (config.train.batch_size, config.train.epochs, config.optimizer.lr) == (batch, epochs, lr)
    assert config.schedule.milestones == milestones
    assert own.items() <= config.distiller.model_dump().items()


def test_the_docs_name_the_recipes_that_have_a_method_s_published_run():
    listed = {
        recipe: set(parse_yaml(RECIPES[recipe].read_text("utf-8"))["published"]) for recipe in COLUMN.values()
    }
    text = (REPOSITORY / "docs" / "methods.md").read_text("utf-8")
    rows, column = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "published runs" in cells:
            column = cells.index("published runs")
        elif not cells:
            column = None
        elif column is not None and (method := re.fullmatch(r"`(\w+)`", cells[0])):
            rows[method[1]] = {
                recipe for label, recipe in COLUMN.items() if re.search(rf"\b{label}\b", cells[column])
            }
    assert set(rows) == set(method_names()) - {"none", "kdav"}
    for method, recipes in rows.items():
        assert recipes == {recipe for recipe, methods in listed.items() if method in methods}, method
