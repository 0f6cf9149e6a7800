"""Every recipe in launch/ is a valid config whose networks exist and fit each other."""

from pathlib import Path

import pytest

from kdav_fast.config import load_config
from kdav_fast.models import build_classifier

RECIPES = sorted((Path(__file__).resolve().parents[1] / "launch").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    config = load_config(recipe)
    student = build_classifier(config.model.name, 10, width=config.model.width)
    size = sum(p.numel() for p in student.parameters())
    if config.teacher is not None:
        teacher = build_classifier(config.teacher.name, 10, width=config.teacher.width)
        assert size < sum(p.numel() for p in teacher.parameters())
        assert config.teacher.pretrained or config.teacher.checkpoint is not None
    else:
        assert config.distiller.name == "none"


def test_the_issue_s_recipes_are_there():
    names = {recipe.stem for recipe in RECIPES}
    assert {"digits", "cifar10", "cifar10_teacher", "cifar100_resnet32x4_resnet8x4"} <= names
    assert {"imagenet_resnet34_resnet18", "imagenet_resnet50_mobilenet"} <= names


def test_the_settings_of_the_paper():
    config = load_config(next(r for r in RECIPES if r.stem.startswith("cifar100")))
    assert (config.train.batch_size, config.train.epochs, config.optimizer.lr) == (64, 240, 0.05)
    assert config.schedule.milestones == (150, 180, 210)
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 5e-4)
