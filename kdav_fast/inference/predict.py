"""The classes of single images: decoded, resized and normalised as in an evaluation, which gives the same answers."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kdav_fast.config import Config, known_keys
from kdav_fast.data import build_evaluation_loader
from kdav_fast.data.checks.defects import examine
from kdav_fast.data.checks.scan import scan
from kdav_fast.data.image_set import printable
from kdav_fast.data.sources.folder import IMAGE_SUFFIXES, ImageFolder
from kdav_fast.errors import InputError, one_line
from kdav_fast.inference.trained import Trained, inference_config, start_inference
from kdav_fast.runtime.precision import autocast

# Images whose decoding is begun together: where one fails, no more than these are decoded again.
_TOGETHER = 2048


class Guess(NamedTuple):
    """A class and how much speaks for it."""

    name: str
    score: float
    """The network's output for the class."""
    probability: float | None
    """Softmax of the scores, 0..1; None for a network that was not trained to make that a probability."""

    def as_json(self) -> dict[str, Any]:
        return {"class": self.name, "score": self.score, "probability": self.probability}

    def __str__(self) -> str:
        if self.probability is None:
            return f"{self.name} (score {self.score:.4g})"
        return f"{self.name} {100 * self.probability:.2f} %"


class Prediction(NamedTuple):
    """What the network says of one image, or why it cannot."""

    image: str
    """As the user named it, or its path below the folder that was named."""
    guesses: tuple[Guess, ...] = ()
    """The best one first."""
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        if self.problem:
            return {"image": printable(self.image), "error": self.problem}
        return {"image": printable(self.image), "classes": [guess.as_json() for guess in self.guesses]}

    def __str__(self) -> str:
        return f"{printable(self.image)}: {self.problem or ', '.join(map(str, self.guesses))}"


class _DecodingError(Exception):
    """Of a batch; which image is to blame shows when they are decoded by fewer."""


class _Files(ImageFolder):
    """Any image files, by the paths that name them."""

    def _path(self, position: int) -> str:
        return self.paths[position]


def split_arguments(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """What stands behind the network on the command line: files and folders, and `key=value` overrides.

    Raises:
        InputError: an empty word, which would mean the current folder.
    """
    if "" in words:
        raise InputError("the name of an image or folder is empty; give a path, such as . for this folder")
    keys = set(known_keys())
    overrides = [word for word in words if word.partition("=")[0] in keys and not Path(word).exists()]
    return [Path(word) for word in words if word not in overrides], overrides


def predict(
    trained: Trained, paths: Sequence[Path], overrides: list[str] = (), top: int = 5
) -> Iterator[Prediction]:
    """Classify images, in the order given; those of a folder by name.

    Softmax scores are probabilities for networks trained with labels or by KD or SimKD. KDAV's class scores are
    <mu_y, z>: their order is the Bayes classifier's, but their scale is that of |z|, which nothing in training sets.

    Args:
        trained: from `open_trained`.
        paths: files of any name, and folders, whose images at any depth count.
        overrides: as in an evaluation, such as `device=cpu`.
        top: how many classes of each image.

    Raises:
        InputError: an override cannot be used.
    """
    config = inference_config(trained, overrides)
    found = list(_find(paths))
    names = [prediction.image for prediction in found]
    images = _Files(Path(), "predict", trained.card.classes, np.zeros(len(names), np.int64), tuple(names))
    ask = _asker(trained, config)
    with tqdm(total=len(images), desc="predict", unit="image", delay=2, disable=None) as bar:
        for start in range(0, len(images), _TOGETHER):
            part = np.arange(len(images))[start : start + _TOGETHER]
            for position, answer in _answers(
                ask, images.select(part), found[start : start + _TOGETHER], config
            ):
                yield _prediction(names[start + position], answer, trained, top)
                bar.update()


def _find(paths: Sequence[Path]) -> Iterator[Prediction]:
    """Every image, nothing said of it yet, and the folders without any."""
    for path in paths:
        if not path.is_dir():
            yield Prediction(str(path))
            continue
        unlisted: list[str] = []
        below = []
        for folder, folders, names in os.walk(
            path, onerror=lambda error, said=unlisted: said.append(error.strerror)
        ):
            folders[:] = [name for name in folders if name[0] != "."]
            below += [
                os.path.join(folder, name)  # noqa: PTH118 - names may be no UTF-8
                for name in names
                if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES)
            ]
        if unlisted or not below:
            why = (
                f"cannot be read: {unlisted[0]}"
                if unlisted
                else f"holds no images ({', '.join(IMAGE_SUFFIXES)})"
            )
            yield Prediction(str(path), problem=why)
        yield from (Prediction(name) for name in sorted(below))


def _answers(
    ask: Callable[[_Files], Tensor], images: _Files, found: list[Prediction], config: Config
) -> Iterator[tuple[int, Tensor | str]]:
    """K scores of each image, or why there are none, in order."""
    # By default all of each image, as before a run: a decoder may make pixels of a damaged one and say nothing.
    decode = config.data.check == "decode"
    look = partial(examine, images, max_pixels=config.data.max_pixels, decode=decode)
    threads = config.data.workers or len(os.sched_getaffinity(0))
    problems = [
        known.problem or finding.defect
        for known, finding in zip(found, scan(images, look, threads, None, chunk=16), strict=True)
    ]
    sound = np.array([n for n, problem in enumerate(problems) if not problem], np.int64)
    answers: dict[int, Tensor | str] = dict(enumerate(problems))
    for position, answer in zip(sound.tolist(), _decoded(ask, images.select(sound)), strict=True):
        answers[position] = answer
    yield from sorted(answers.items())


def _decoded(ask: Callable[[_Files], Tensor], images: _Files) -> Iterator[Tensor | str]:
    """As `ask` answers; where images cannot be decoded, it is asked by fewer until these are alone."""
    if len(images) == 0:
        return
    try:
        yield from ask(images)
        return
    except _DecodingError as error:
        if len(images) == 1:
            yield examine(images, 0, decode=True).defect or f"cannot be decoded: {error}"
            return
    middle = len(images) // 2
    yield from _decoded(ask, images.select(np.arange(middle)))
    yield from _decoded(ask, images.select(np.arange(middle, len(images))))


def _asker(trained: Trained, config: Config) -> Callable[[_Files], Tensor]:
    """A function from N images to their N x K scores, on the CPU in float64."""
    network, cluster, dtype = start_inference(trained, config)

    @torch.no_grad()
    def ask(images: _Files) -> Tensor:
        loader = build_evaluation_loader(
            config.data,
            images,
            batch_size=min(config.train.batch_size, len(images)),
            device=cluster.device,
            normalization=trained.card.normalization,
        )
        scores = []
        batches = iter(loader)
        while True:
            try:
                batch = next(batches, None)
            except (InputError, RuntimeError, OSError) as error:
                raise _DecodingError(one_line(error)) from None
            if batch is None:
                return torch.cat(scores)
            with autocast(cluster.device, dtype):
                logits = network(batch.images).logits
            scores.append(logits[batch.valid].to("cpu", torch.float64))

    return ask


def _prediction(image: str, answer: Tensor | str, trained: Trained, top: int) -> Prediction:
    if isinstance(answer, str):
        return Prediction(image, problem=answer)
    if not answer.isfinite().all():
        return Prediction(image, problem="its class scores are not finite")
    probabilities = answer.softmax(0) if trained.card.probabilistic else None
    scores, best = answer.topk(min(top, len(answer)))
    return Prediction(
        image,
        tuple(
            Guess(trained.card.classes[n], score, None if probabilities is None else float(probabilities[n]))
            for score, n in zip(scores.tolist(), best.tolist(), strict=True)
        ),
    )
