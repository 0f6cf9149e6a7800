"""Images in memory, and the teacher's answers to each of them and to its mirror image: all that a student needs."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from kdav_fast.config import Config, MethodConfig
from kdav_fast.data import Batch, Splits, decode_images, open_images
from kdav_fast.data.image_set import ImageSet, take_subset
from kdav_fast.data.rotation import rotations
from kdav_fast.data.views import Order, Rotations, Shuffled
from kdav_fast.distillers.base import Facts, Shapes
from kdav_fast.models import ImageClassifier, Normalization, renormalization
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.file import find_student_file
from kdav_fast.teachers.frozen import FrozenTeacher
from kdav_fast.train.networks import build_network, shapes_of

HELD_OUT = 10_000
"""At most so many training images that no student is trained on; settings are chosen by them."""
TURNS = 4
"""Quarters that an image can be turned by."""
_BATCH = 256


@dataclass(frozen=True)
class StudyData:
    """What every student of the comparison is trained and evaluated on."""

    train_pixels: Tensor
    """N x S x S x 3, uint8."""
    train_labels: Tensor
    evaluation_pixels: Tensor
    evaluation_labels: Tensor
    held_out_pixels: Tensor
    """Of M training images outside `data.train_subset`; none where that leaves none."""
    held_out_labels: Tensor
    features: Tensor
    """2 x N x d, of the teacher: of each training image, and of its mirror image. With the answers to turned images,
    8 x N x d: both sides as they are, then turned by a quarter, by two and by three."""
    logits: Tensor
    """2 x N x K, or 8, alike."""
    classifier_weight: Tensor
    """K x d: the teacher's last layer."""
    classifier_bias: Tensor
    mean: Tensor
    """3 values in 0..1, and so is `std`: what images are normalised by."""
    std: Tensor
    teacher_correct: Tensor
    """How many evaluation images the teacher classifies right."""
    maps: tuple[np.ndarray, ...] = field(default=())
    """2 x N x C x H x W each, float16, on the disk: the teacher's feature maps before their last activation."""

    @property
    def classes(self) -> int:
        return self.logits.shape[2]

    @property
    def teacher_top1(self) -> float:
        return 100 * self.teacher_correct.item() / len(self.evaluation_labels)

    def facts(self, network: ImageClassifier, method: MethodConfig) -> Facts:
        """For the method that trains this student."""
        width = self.features.shape[2]
        teacher = classifier = None
        if method.needs_teacher:
            teacher = Shapes("teacher", width, tuple(each.shape[2:] for each in self.maps))
            classifier = nn.Linear(width, self.classes)
            with torch.no_grad():
                classifier.weight.copy_(self.classifier_weight)
                classifier.bias.copy_(self.classifier_bias)
        return Facts(
            student=shapes_of(network, method, self.train_pixels.shape[1]),
            teacher=teacher,
            teacher_classifier=classifier,
            labels=self.train_labels.cpu().numpy(),
            classes=self.classes,
            label_smoothing=0.0,
            seed=0,
            dtype=torch.float32,
            device=self.train_labels.device,
        )

    def batch(
        self, index: Tensor, mirrored: Tensor, order: Order = Shuffled(), valid: Tensor | None = None
    ) -> tuple[Batch, Outputs]:
        """Training images, each as it is or mirrored, and the teacher's answers to them.

        Args:
            index: positions of the images to load, of B in each view that `order` loads, view-major.
            mirrored: whether to mirror each of them.
            order: the views of the batch.
            valid: of the first view, B; None for all.
        """
        images = len(index) // order.loaded
        pixels = self.train_pixels[index]
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
        shown, first = self.normalize(pixels), index[:images]
        side, place = mirrored.long(), index
        if isinstance(order, Rotations):
            shown = rotations(shown, order.count)
            side = torch.cat([2 * quarters + side for quarters in range(order.count)])
            place = index.repeat(order.count)
        if valid is None:
            valid = torch.ones_like(first, dtype=torch.bool)
        batch = Batch(shown, self.train_labels[first], valid, first, views=order.count)
        return batch, Outputs(self.features[side, place], self.logits[side, place], **self._maps(side, place))

    def _maps(self, side: Tensor, place: Tensor) -> dict[str, tuple[Tensor, ...]]:
        where = side.cpu().numpy(), place.cpu().numpy()
        found = [torch.from_numpy(each[where]).to(side.device).float() for each in self.maps]
        before = tuple(each.contiguous(memory_format=torch.channels_last) for each in found)
        return {"stages": tuple(each.relu() for each in before), "preactivations": before}

    def normalize(self, pixels: Tensor) -> Tensor:
        """B x S x S x 3 bytes to B x 3 x S x S float32 in channels_last order."""
        return pixels.float().div(255).sub(self.mean).div(self.std).permute(0, 3, 1, 2)


def prepare(config: Config, device: torch.device, folder: Path, *, everything: bool = False) -> Path:
    """Decode the images and ask the teacher, once; the file of it in `folder`, named by its content.

    Args:
        config: the images and the teacher.
        device: where the teacher answers.
        folder: of the file.
        everything: ask it for its feature maps too, and about turned images: for `load` with `maps` and `turned`.

    Raises:
        InputError: images or the teacher's weights cannot be used.
    """
    every = open_images(config.data.model_copy(update={"train_subset": None}), config.train.seed)
    images = _split(every, config.data.train_subset, config.train.seed)
    weights = find_student_file(config.teacher.checkpoint)
    identity = f"{[split.digest for split in images.values()]} {config.data.model_dump(exclude={'root'})} "
    identity += hashlib.sha256(weights.read_bytes()).hexdigest()
    file = folder / f"data-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    if file.exists() and not (everything and not _turned_file(file).exists()):
        return file
    folder.mkdir(parents=True, exist_ok=True)
    network, known = build_network(config.teacher, every.train.classes, "teacher", config.data.image_size)
    normalization = Normalization(config.data.mean, config.data.std)
    network.to(device, memory_format=torch.channels_last)
    classifier = network.linear_classifier()
    renormalize = renormalization(normalization, known or normalization)
    pixels = {name: decode_images(config.data, split, device).pixels for name, split in images.items()}
    if everything:
        network.take_stages(preactivations=True)
    ask = _Asker(FrozenTeacher(network, renormalize, device, None), normalization)
    sides = pixels["train"], pixels["train"].flip(2)
    if not file.exists():
        answers = [ask(side) for side in sides]
        guesses = ask(pixels["evaluation"]).logits.argmax(1).cpu()
        labels = {name: torch.from_numpy(split.labels) for name, split in images.items()}
        data = {
            **{f"{name}_pixels": pixels[name] for name in images},
            **{f"{name}_labels": labels[name] for name in images},
            "classifier_weight": classifier.weight.detach(),
            "classifier_bias": classifier.bias.detach(),
            "mean": torch.tensor(normalization.mean),
            "std": torch.tensor(normalization.std),
            **_stacked(answers),
            "teacher_correct": (guesses == labels["evaluation"]).sum(),
        }
        _save(data, file)
    if everything:
        _write_maps(file, sides, ask)
        turned = [ask(side.rot90(quarters, (1, 2))) for quarters in range(1, TURNS) for side in sides]
        _save(_stacked(turned), _turned_file(file))
    return file


def load(file: Path, device: torch.device, *, maps: bool = False, turned: bool = False) -> StudyData:
    """What `prepare` wrote, on a device, but for maps.

    Args:
        file: of `prepare`, which must have been asked for everything if there are to be `maps` or `turned`.
        device: where the data are held.
        maps: with the teacher's maps, which stay on the disk.
        turned: with its answers to turned images.
    """
    data = StudyData(**load_file(file, device=str(device)))
    if turned:
        more = load_file(_turned_file(file), device=str(device))
        data = replace(data, **{name: torch.cat([getattr(data, name), more[name]]) for name in more})
    if maps:
        found = sorted(file.parent.glob(f"{file.stem}-map*.npy"))
        data = replace(data, maps=tuple(np.load(each, mmap_mode="r") for each in found))
    return data


def _turned_file(file: Path) -> Path:
    """Written last: where it is, everything is."""
    return file.with_name(f"{file.stem}-turned.safetensors")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    partial = file.with_suffix(".partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(file)


def _stacked(answers: Iterable[Outputs]) -> dict[str, Tensor]:
    return {name: torch.stack([getattr(each, name) for each in answers]) for name in ("features", "logits")}


def _write_maps(file: Path, sides: tuple[Tensor, Tensor], ask: "_Asker") -> None:
    """A file each, of both sides."""
    written: list[np.memmap] = []
    for number, side in enumerate(sides):
        for start, answers in ask.in_batches(side):
            for stage, (after, before) in enumerate(zip(answers.stages, answers.preactivations, strict=True)):
                if not torch.equal(after, before.relu()):
                    raise ValueError(
                        "the teacher's maps do not end in a ReLU, by which they are made of what is kept"
                    )
                if len(written) == stage:
                    path = file.with_name(f"{file.stem}-map{stage}.npy")
                    shape = (2, len(side), *before.shape[1:])
                    written.append(np.lib.format.open_memmap(path, "w+", np.float16, shape))
                written[stage][number, start : start + len(before)] = before.half().cpu().numpy()
    for each in written:
        each.flush()


class _Asker:
    """Asks a teacher about N x S x S x 3 bytes."""

    def __init__(self, teacher: FrozenTeacher, normalization: Normalization) -> None:
        self._teacher, self._normalization = teacher, normalization

    def __call__(self, pixels: Tensor) -> Outputs:
        """Features and logits, on the CPU."""
        parts = [(each.features.cpu(), each.logits.cpu()) for _, each in self.in_batches(pixels)]
        return Outputs(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def in_batches(self, pixels: Tensor) -> Iterator[tuple[int, Outputs]]:
        """All answers, batch by batch, each with the position of its first image."""
        mean, std = (torch.tensor(values, device=pixels.device) for values in self._normalization)
        for number, batch in enumerate(tqdm(pixels.split(_BATCH), "ask the teacher")):
            images = batch.float().div(255).sub(mean).div(std).permute(0, 3, 1, 2)
            yield number * _BATCH, self._teacher.answer(images, None)


def _split(every: Splits, subset: int | None, seed: int) -> dict[str, ImageSet]:
    """The images to train on, to evaluate on and held out, by name."""
    train = every.train if subset is None else take_subset(every.train, subset, seed)
    left = len(every.train) - len(train)
    held_out = take_subset(every.train, min(left, HELD_OUT), seed, after=len(train))
    return {"train": train, "evaluation": every.evaluation, "held_out": held_out}
