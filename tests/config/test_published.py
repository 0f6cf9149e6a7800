"""A recipe's `published` block: laid over the recipe for the method that is chosen, under what overrides give."""

import pytest

from kdav_fast.config import load_config, read_config
from kdav_fast.errors import InputError

RECIPE = """
teacher: {name: "cifar:resnet8"}
distiller: {name: kdav, memory_length: 128}
optimizer: {lr: 0.05, momentum: 0.8}
published:
  kd: {}
  dkd:
    distiller: {beta: 2.0}
    optimizer: {lr: 0.2}
    train: {epochs: 100}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_the_chosen_method_s_settings_are_laid_over_the_recipe(recipe):
    config = load_config(recipe, ["distiller.name=dkd"])
    assert (config.distiller.beta, config.distiller.alpha) == (2.0, 1.0)
    assert (config.optimizer.lr, config.optimizer.momentum, config.train.epochs) == (0.2, 0.8, 100)


@pytest.mark.parametrize("overrides", [[], ["distiller.name=kd"], ["distiller.name=dkd", "published=null"]])
def test_else_the_recipe_is_as_it_stands(recipe, overrides):
    said = []
    raw = read_config(recipe, overrides, said.append)
    assert raw["optimizer"] == {"lr": 0.05, "momentum": 0.8}
    assert raw.keys() == {"teacher", "distiller", "optimizer"}
    assert said == []


def test_overrides_come_on_top_in_whatever_order(recipe):
    said = []
    overrides = ["optimizer.lr=0.3", "distiller.beta=6", "distiller.name=kd", "distiller.name=dkd"]
    raw = read_config(recipe, overrides, said.append)
    assert raw["distiller"] == {"name": "dkd", "beta": 6}
    assert raw["optimizer"] == {"lr": 0.3, "momentum": 0.8}
    assert said == [
        "as published for 'dkd': distiller.beta=2.0, optimizer.lr=0.2, train.epochs=100 (published=null leaves it out)"
    ]


def test_labels_only_is_what_a_recipe_without_a_method_means(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("published: {none: {train: {epochs: 7}}}\n")
    assert load_config(path).train.epochs == 7


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("published: 3", "'published' is 3; give methods"),
        ("published: {kdd: {}}", "'published.kdd' is of no method; allowed: 'none', 'at'"),
        ("published: {kd: 0.1}", "'published.kd' is 0.1; give the sections that differ"),
        ("published: {kd: {optimizer: {lrr: 1}}}", "unknown key 'optimizer.lrr'; the nearest"),
        ("published: {kd: {lr: 1}}", "'published.kd.lr' is no section; allowed: data, model, teacher"),
        ("published: {kd: {run_dir: a}}", "'published.kd.run_dir' is no section"),
        ("published: {at: {train: null}}", "'published.at.train' is None; give the keys that differ"),
        ("published: {kd: {distiller: {name: dkd}}}", "'published.kd.distiller.name' is of no use"),
    ],
)
def test_a_block_that_says_nothing_known(tmp_path, block, reason):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"distiller: {{name: kd}}\nteacher: {{name: 'cifar:resnet8'}}\n{block}\n")
    with pytest.raises(InputError) as error:
        load_config(path)
    assert reason in str(error.value)
