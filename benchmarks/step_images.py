"""The images and the recipe of benchmarks/training_step.py: a tree of class folders, a teacher's file, a config."""

import json
import os
from pathlib import Path

import numpy as np
from data_pipeline import open_set
from PIL import Image, ImageFilter
from random_teacher import write_random_teacher

from kdav_fast.config import Config, apply_overrides, load_config, parse_config

RECIPE = Path(__file__).resolve().parent.parent / "launch" / "imagenet_resnet34_resnet18.yaml"
PHOTOGRAPH = (500, 375)
"""Width and height that most of ImageNet's files have."""


def make_photographs(folder: Path, count: int) -> Path:
    """A class folder of JPEG files of about 110 KiB: smooth shapes with grain, which cost what photographs cost."""
    (folder / "photographs").mkdir(parents=True)
    random = np.random.default_rng(0)
    grain = Image.fromarray(random.integers(0, 256, (*PHOTOGRAPH[::-1], 3), np.uint8))
    grain = 0.6 * (np.asarray(grain.filter(ImageFilter.GaussianBlur(0.8)), np.float32) - 127.5)
    for number in range(count):
        shapes = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
        pixels = np.asarray(shapes.resize(PHOTOGRAPH, Image.Resampling.BICUBIC), np.float32)
        shift = random.integers(0, PHOTOGRAPH[1], 2)
        pixels = (pixels + np.roll(grain, shift, (0, 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / f"{number:05}.jpg", quality=93)
    return folder


def link_tree(tree: Path, root: Path, count: int, classes: int) -> Path:
    """A tree of `classes` folders that links to images of `root`, in turn; returns `tree`.

    What an image shows means nothing to a step's time; the number of classes does.

    Raises:
        InputError: there are no images.
    """
    images = open_set(root, count)
    names = [f"class_{number:05}" for number in range(classes)]
    for split, amount in (("train", max(count, classes)), ("val", classes)):
        for name in names:
            (tree / split / name).mkdir(parents=True)
        for number in range(amount):
            source = Path(images.root, images.paths[number % count])
            link = tree / split / names[number % classes] / f"{number:06}{source.suffix.lower()}"
            link.symlink_to(os.path.abspath(source))  # noqa: PTH100  resolve() would lose a name's suffix
    return tree


def make_recipe(folder: Path, tree: Path, settings: dict[str, object]) -> Config:
    """The ImageNet recipe on that tree, with these sizes, for a teacher whose random weights are written to `folder`.

    Raises:
        InputError: a size or a name that the package does not know.
    """
    weights = folder / "teacher.safetensors"
    values = {
        "run_dir": str(folder / "run"),
        "device": settings["device"],
        "data.root": str(tree),
        "data.image_size": settings["image_size"],
        "data.eval_resize": None,
        "teacher.name": settings["teacher"],
        "teacher.pretrained": False,
        "teacher.checkpoint": str(weights),
        "model.name": settings["student"],
        "distiller.memory_length": settings["memory_length"],
        "distiller.posterior": settings["posterior"],
        "train.batch_size": settings["batch_size"],
        "train.precision": "fp32",
        "schedule.name": "constant",
        "schedule.milestones": [],
    }
    config = load_config(RECIPE, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    write_random_teacher(config.teacher.name, settings["classes"], weights)
    return config


def override_recipe(config: Config, overrides: dict[str, str]) -> Config:
    """The recipe with these keys changed; raises InputError for a key or value that the package does not know."""
    raw = config.model_dump(mode="json")
    apply_overrides(raw, [f"{key}={value}" for key, value in overrides.items()])
    return parse_config(raw)
