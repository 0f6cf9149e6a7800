"""Images in memory, and the teacher's answers to each of them and to its mirror image: all that a student needs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from kdav_fast.config import Config
from kdav_fast.data import build_loaders, open_images
from kdav_fast.data.image_set import ImageSet, take_subset
from kdav_fast.errors import InputError
from kdav_fast.models import Normalization, renormalization
from kdav_fast.outputs import Outputs
from kdav_fast.student_file import find_student_file
from kdav_fast.train.setup import build_network
from kdav_fast.train.teacher import FrozenTeacher

_BATCH = 256


@dataclass(frozen=True)
class StudyData:
    """What every student of the comparison is trained and evaluated on."""

    pixels: Tensor
    """N x S x S x 3 training images, uint8."""
    labels: Tensor
    evaluation_pixels: Tensor
    evaluation_labels: Tensor
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

    def teacher_classifier(self) -> nn.Linear:
        """A copy of the teacher's last layer."""
        classifier = nn.Linear(self.features.shape[2], self.classes)
        with torch.no_grad():
            classifier.weight.copy_(self.classifier_weight)
            classifier.bias.copy_(self.classifier_bias)
        return classifier

    def answers(self, index: Tensor, mirrored: Tensor) -> Outputs:
        """The teacher's, to B images by position, each as it is or mirrored."""
        side = mirrored.long()
        return Outputs(self.features[side, index], self.logits[side, index])

    def normalize(self, pixels: Tensor) -> Tensor:
        """B x S x S x 3 bytes to B x 3 x S x S float32 in channels_last order."""
        return pixels.float().div(255).sub(self.mean).div(self.std).permute(0, 3, 1, 2)


def prepare(config: Config, device: torch.device, folder: Path, holdout: int | None = None) -> Path:
    """Decode the images and ask the teacher, once; the file of it in `folder`, named by its content.

    Args:
        config: the images and the teacher.
        device: where the teacher answers.
        folder: of the file.
        holdout: so many training images outside `data.train_subset` take the place of the evaluation images.

    Raises:
        InputError: images or the teacher's weights cannot be used.
    """
    images = open_images(config.data, config.train.seed)
    if holdout is not None:
        images = images._replace(evaluation=_held_out(config, holdout))
    network, known = build_network(config.teacher, images.train.classes, "teacher")
    weights = find_student_file(config.teacher.checkpoint)
    identity = f"{images.train.digest} {images.evaluation.digest} {config.data.model_dump(exclude={'root'})} "
    identity += hashlib.sha256(weights.read_bytes()).hexdigest()
    file = folder / f"data-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    if file.exists():
        return file
    normalization = Normalization(config.data.mean, config.data.std)
    loaders = build_loaders(
        config.data,
        images,
        batch_size=_BATCH,
        eval_batch_size=_BATCH,
        device=device,
        rank=0,
        world=1,
        local_world=1,
        seed=config.train.seed,
        normalization=normalization,
    )
    network.to(device, memory_format=torch.channels_last)
    renormalize = renormalization(normalization, known or normalization)
    teacher = FrozenTeacher(network, renormalize, device, None)
    train, evaluation = loaders.train.images, loaders.evaluation.images
    data = {
        "pixels": train.pixels.cpu(),
        "labels": torch.from_numpy(train.labels),
        "evaluation_pixels": evaluation.pixels.cpu(),
        "evaluation_labels": torch.from_numpy(evaluation.labels),
        "classifier_weight": network.classifier.weight.detach(),
        "classifier_bias": network.classifier.bias.detach(),
        "mean": torch.tensor(normalization.mean),
        "std": torch.tensor(normalization.std),
    }
    sides = [_ask(teacher, side, normalization) for side in (train.pixels, train.pixels.flip(2))]
    data["features"] = torch.stack([side.features for side in sides])
    data["logits"] = torch.stack([side.logits for side in sides])
    guesses = _ask(teacher, evaluation.pixels, normalization).logits.argmax(1)
    data["teacher_correct"] = (guesses == data["evaluation_labels"]).sum()
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in data.items()}, partial)
    partial.replace(file)
    return file


def _held_out(config: Config, count: int) -> ImageSet:
    every = open_images(config.data.model_copy(update={"train_subset": None}), config.train.seed).train
    used = config.data.train_subset
    left = 0 if used is None else len(every) - used
    if count > left:
        raise InputError(
            f"--holdout is {count} but only {left} of the {len(every)} training images are not trained on; lower it "
            "or --train-subset"
        )
    return take_subset(every, count, config.train.seed, after=used)


def load(file: Path, device: torch.device) -> StudyData:
    """What `prepare` wrote, on a device."""
    return StudyData(**load_file(file, device=str(device)))


def _ask(teacher: FrozenTeacher, pixels: Tensor, normalization: Normalization) -> Outputs:
    """The teacher's outputs, on the CPU, for N x S x S x 3 bytes."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in normalization)
    answers = []
    for batch in tqdm(pixels.split(_BATCH), "ask the teacher"):
        images = batch.float().div(255).sub(mean).div(std).permute(0, 3, 1, 2)
        outputs = teacher(images)
        answers.append(Outputs(outputs.features.cpu(), outputs.logits.cpu()))
    return Outputs(torch.cat([a.features for a in answers]), torch.cat([a.logits for a in answers]))
