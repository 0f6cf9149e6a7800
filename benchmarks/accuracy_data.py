"""Images in memory, and the teacher's answers to each of them and to its mirror image: all that a student needs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from kdav_fast.config import Config
from kdav_fast.data import Batch, Splits, decode_images, open_images
from kdav_fast.data.image_set import ImageSet, take_subset
from kdav_fast.distillers.base import Facts, Shapes
from kdav_fast.models import ImageClassifier, Normalization, renormalization
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.file import find_student_file
from kdav_fast.teachers.frozen import FrozenTeacher
from kdav_fast.train.networks import build_network

HELD_OUT = 10_000
"""At most so many training images that no student is trained on; settings are chosen by them."""
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
    """2 x N x d, of the teacher: of each training image, and of its mirror image."""
    logits: Tensor
    """2 x N x K, alike."""
    classifier_weight: Tensor
    """K x d: the teacher's last layer."""
    classifier_bias: Tensor
    mean: Tensor
    """3 values in 0..1, and so is `std`: what images are normalised by."""
    std: Tensor
    teacher_correct: Tensor
    """How many evaluation images the teacher classifies right."""

    @property
    def classes(self) -> int:
        return self.logits.shape[2]

    @property
    def teacher_top1(self) -> float:
        return 100 * self.teacher_correct.item() / len(self.evaluation_labels)

    def facts(self, network: ImageClassifier) -> Facts:
        """For the method that trains this student."""
        width = self.features.shape[2]
        classifier = nn.Linear(width, self.classes)
        with torch.no_grad():
            classifier.weight.copy_(self.classifier_weight)
            classifier.bias.copy_(self.classifier_bias)
        return Facts(
            student=Shapes(network.name, network.feature_width),
            teacher=Shapes("teacher", width),
            teacher_classifier=classifier,
            labels=self.train_labels.cpu().numpy(),
            classes=self.classes,
            label_smoothing=0.0,
            seed=0,
            dtype=torch.float32,
            device=self.train_labels.device,
        )

    def batch(self, index: Tensor, mirrored: Tensor) -> tuple[Batch, Outputs]:
        """B training images by position, each as it is or mirrored, and the teacher's answers to them."""
        pixels = self.train_pixels[index]
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
        side, valid = mirrored.long(), torch.ones_like(mirrored)
        batch = Batch(self.normalize(pixels), self.train_labels[index], valid, index)
        return batch, Outputs(self.features[side, index], self.logits[side, index])

    def normalize(self, pixels: Tensor) -> Tensor:
        """B x S x S x 3 bytes to B x 3 x S x S float32 in channels_last order."""
        return pixels.float().div(255).sub(self.mean).div(self.std).permute(0, 3, 1, 2)


def prepare(config: Config, device: torch.device, folder: Path) -> Path:
    """Decode the images and ask the teacher, once; the file of it in `folder`, named by its content.

    Args:
        config: the images and the teacher.
        device: where the teacher answers.
        folder: of the file.

    Raises:
        InputError: images or the teacher's weights cannot be used.
    """
    every = open_images(config.data.model_copy(update={"train_subset": None}), config.train.seed)
    images = _split(every, config.data.train_subset, config.train.seed)
    network, known = build_network(config.teacher, every.train.classes, "teacher", config.data.image_size)
    weights = find_student_file(config.teacher.checkpoint)
    identity = f"{[split.digest for split in images.values()]} {config.data.model_dump(exclude={'root'})} "
    identity += hashlib.sha256(weights.read_bytes()).hexdigest()
    file = folder / f"data-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    if file.exists():
        return file
    normalization = Normalization(config.data.mean, config.data.std)
    network.to(device, memory_format=torch.channels_last)
    renormalize = renormalization(normalization, known or normalization)
    teacher = FrozenTeacher(network, renormalize, device, None)
    pixels = {name: decode_images(config.data, split, device).pixels for name, split in images.items()}
    data = {
        **{f"{name}_pixels": pixels[name] for name in images},
        **{f"{name}_labels": torch.from_numpy(split.labels) for name, split in images.items()},
        "classifier_weight": network.classifier.weight.detach(),
        "classifier_bias": network.classifier.bias.detach(),
        "mean": torch.tensor(normalization.mean),
        "std": torch.tensor(normalization.std),
    }
    sides = [_ask(teacher, side, normalization) for side in (pixels["train"], pixels["train"].flip(2))]
    data["features"] = torch.stack([side.features for side in sides])
    data["logits"] = torch.stack([side.logits for side in sides])
    guesses = _ask(teacher, pixels["evaluation"], normalization).logits.argmax(1)
    data["teacher_correct"] = (guesses == data["evaluation_labels"]).sum()
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in data.items()}, partial)
    partial.replace(file)
    return file


def _split(every: Splits, subset: int | None, seed: int) -> dict[str, ImageSet]:
    """The images to train on, to evaluate on and held out, by name."""
    train = every.train if subset is None else take_subset(every.train, subset, seed)
    left = len(every.train) - len(train)
    held_out = take_subset(every.train, min(left, HELD_OUT), seed, after=len(train))
    return {"train": train, "evaluation": every.evaluation, "held_out": held_out}


def load(file: Path, device: torch.device) -> StudyData:
    """What `prepare` wrote, on a device."""
    return StudyData(**load_file(file, device=str(device)))


def _ask(teacher: FrozenTeacher, pixels: Tensor, normalization: Normalization) -> Outputs:
    """The teacher's outputs, on the CPU, for N x S x S x 3 bytes."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in normalization)
    answers = []
    for batch in tqdm(pixels.split(_BATCH), "ask the teacher"):
        images = batch.float().div(255).sub(mean).div(std).permute(0, 3, 1, 2)
        outputs = teacher.answer(images, None)
        answers.append(Outputs(outputs.features.cpu(), outputs.logits.cpu()))
    return Outputs(torch.cat([a.features for a in answers]), torch.cat([a.logits for a in answers]))
