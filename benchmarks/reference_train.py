"""Distillation in plain PyTorch, as a good practitioner writes it: what kdav_fast is compared with.

    python   benchmarks/reference_train.py RECIPE [key=value ...] [--precision bf16] [--channels-last] [--compile]
    torchrun --nproc-per-node 8 benchmarks/reference_train.py RECIPE [key=value ...]

ImageFolder and DataLoader, DistributedDataParallel, the objectives in eager torch. Of kdav_fast it takes the numbers
of a recipe and the networks by name, nothing else; fed the same batches, both have the same losses. Keys of a recipe
that say how fast something is done (loader, ZeRO stage, `distiller.impl`) mean nothing here, nor does
`train.precision`, which is an option. Keys of what is not written out here are refused.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from environment import describe
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kdav_fast.config import Config, DataConfig, MethodConfig, ModelConfig, load_config
from kdav_fast.models import ImageClassifier, build_classifier, load_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
WARM_UP = 10
"""Steps before the clock starts."""
ONLY = {
    "data.name": "folder",
    "data.val_labels": None,
    "data.skip_list": None,
    "data.auto_augment": "none",
    "data.color_jitter": (0.0, 0.0, 0.0, 0.0),
    "distiller.standardize_logits": False,
    "kdav.prototypes": "measured",
    "kdav.weight_label": 0.0,
    "optimizer.name": "sgd",
    "optimizer.decay_norm_and_bias": True,
    "train.accumulate": 1,
    "train.mixup": 0.0,
    "train.cutmix": 0.0,
    "train.ema_decay": 0.0,
    "train.clip_grad_norm": 0.0,
    "train.sync_batchnorm": False,
}
"""Keys of which only this value is written out here; those of one method by its name."""


def open_folders(data: DataConfig) -> tuple[ImageFolder, ImageFolder]:
    """Training and evaluation images, as bytes: they are normalised on the device, and a quarter as much travels."""
    size = data.image_size
    whole = [v2.Resize(size), v2.CenterCrop(size)]
    crop = {
        "random_resized": [v2.RandomResizedCrop(size, data.crop_area, data.crop_aspect_ratio)],
        "padded": [*whole, v2.RandomCrop(size, data.crop_padding)],
        "none": whole,
    }[data.crop]
    flip = [v2.RandomHorizontalFlip()] if data.flip else []
    resize = data.eval_resize or (round(size / 0.875) if data.crop == "random_resized" else size)
    split = "val" if (data.root / "val").is_dir() else "test"
    train = ImageFolder(data.root / "train", v2.Compose([*crop, *flip, v2.PILToTensor()]))
    fixed = v2.Compose([v2.Resize(resize), v2.CenterCrop(size), v2.PILToTensor()])
    evaluation = ImageFolder(data.root / split, fixed)
    if train.classes != evaluation.classes:
        raise ValueError(f"data.root {data.root}: train/ and {split}/ have other classes; both need the same")
    return train, evaluation


def build_network(
    section: ModelConfig, classes: list[str], otherwise: tuple
) -> tuple[ImageClassifier, tuple]:
    """A network with its weights, and the mean and std of the pixels they expect; `otherwise` if nothing says so."""
    network = build_classifier(
        section.name, len(classes), width=section.width, pretrained=section.pretrained, init=section.init
    )
    expected = network.normalization
    if section.checkpoint is not None:
        path = section.checkpoint
        weights, metadata = load_weights(path / "student.safetensors" if path.is_dir() else path)
        network.load_stock_state_dict(weights)
        card = json.loads(metadata.get("kdav_fast", "{}"))
        expected = (card["mean"], card["std"]) if card else expected
    return network, (section.mean, section.std) if section.mean else expected or otherwise


class Student(nn.Module):
    """A classifier that gives B x K logits, or its backbone and a projector, which give B x d embeddings."""

    def __init__(self, network: ImageClassifier, embedding_width: int | None) -> None:
        super().__init__()
        self.network, self.projector = network, None
        if embedding_width is not None:
            linear = nn.Linear(network.feature_width, embedding_width, bias=False)
            self.projector = nn.Sequential(linear, nn.BatchNorm1d(embedding_width))
            network.classifier.requires_grad_(False)  # unused: DDP would wait for its gradient

    def forward(self, images: Tensor) -> Tensor:
        if self.projector is None:
            return self.network(images).logits
        return self.projector(self.network.backbone(images))


class KDAVLoss:
    """Membership and prediction terms, over a memory of the last L teacher embeddings of all ranks."""

    def __init__(
        self, config: MethodConfig, width: int, classes: int, dtype: torch.dtype, device: torch.device
    ):
        self.config, length, self.ids = config, config.memory_length, config.posterior == "ids"
        self.embedding = torch.zeros(length, width, dtype=dtype, device=device)
        shape, kind = ([length], torch.int64) if self.ids else ([length, classes], dtype)
        self.posterior = torch.zeros(shape, dtype=kind, device=device)
        self.cursor = self.filled = 0  # the host knows how many rows come: nothing waits for the device

    def __call__(self, student: Tensor, teacher: Tensor, teacher_logits: Tensor) -> Tensor:
        """Remember the teacher's B x d embeddings and B x K logits; the mean loss of B x d student embeddings."""
        c = self.config
        teacher, q_class = F.normalize(teacher, dim=1), torch.softmax(teacher_logits / c.temperature, dim=1)
        self._push(teacher, teacher_logits.argmax(1) if self.ids else q_class)
        embedding, posterior = self.embedding[: self.filled], self.posterior[: self.filled]
        log_p = F.log_softmax(c.kappa_student * F.normalize(student, dim=1) @ embedding.T, dim=1)
        log_q = F.log_softmax(c.kappa_teacher * teacher @ embedding.T, dim=1)
        membership = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        if self.ids:
            p_class = torch.zeros_like(q_class).index_add(1, posterior, log_p.exp().to(q_class.dtype))
        else:
            p_class = log_p.exp() @ posterior
        prediction = F.kl_div(p_class.clamp(min=1e-8).log(), q_class, reduction="batchmean")
        return c.weight_membership * membership + c.weight_prediction * c.temperature**2 * prediction

    def _push(self, *news: Tensor) -> None:
        length = len(self.embedding)
        embedding, posterior = (gather(rows)[-length:] for rows in news)
        places = (self.cursor + torch.arange(len(embedding), device=embedding.device)) % length
        self.embedding[places] = embedding.to(self.embedding.dtype)
        self.posterior[places] = posterior.to(self.posterior.dtype)
        self.cursor = (self.cursor + len(embedding)) % length
        self.filled = min(self.filled + len(embedding), length)


def kd_loss(student: Tensor, teacher: Tensor, hard: Tensor, config: MethodConfig) -> Tensor:
    """Divergence of B x K logits from the teacher's, and `hard`, the cross-entropy with the labels."""
    log_p = F.log_softmax(student / config.temperature, dim=1)
    log_q = F.log_softmax(teacher / config.temperature, dim=1)
    soft = config.temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return config.weight_label * hard + config.weight_kl * soft


def lr_factor(config: Config, step: int, steps: int, epoch_steps: int) -> float:
    """Share of `optimizer.lr` for a step, 0 .. steps - 1."""
    c = config.schedule

    def half_cosine(start: float, end: float, done: float) -> float:
        return end + (start - end) * (1 + cos(pi * done)) / 2

    warm_up = c.warmup_epochs * epoch_steps
    top = c.peak * steps if c.name == "one_cycle" else warm_up
    if c.name == "one_cycle" and step < top:
        return half_cosine(1 / 25, 1.0, step / top)
    if step + 1 < warm_up:
        return (step + 1) / warm_up
    if c.name in ("one_cycle", "cosine"):
        return half_cosine(1.0, c.final, max(0.0, step - top) / max(1.0, steps - top))
    return c.gamma ** sum(step >= epoch * epoch_steps for epoch in c.milestones)  # none where constant


class Trainer:
    """A recipe's networks, images and training state.

    Args:
        config: the recipe.
        precision: "bf16" runs networks and objective under autocast.
        channels_last: weights and images in NHWC order.
        compiled: both networks through torch.compile.

    Raises:
        ValueError: the recipe asks for what is not written out here, or does not fit the data or the processes.
        FileNotFoundError: a folder of images is missing or empty.
    """

    def __init__(
        self, config: Config, *, precision: str = "fp32", channels_last: bool = False, compiled: bool = False
    ) -> None:
        for key, known in ONLY.items():
            section, name = key.split(".")
            holder = config.distiller if section == config.distiller.name else getattr(config, section, None)
            given = getattr(holder, name, known)
            if given != known:
                raise ValueError(f"{key} is {given!r}; the reference knows only {known!r}")
        self.config, self.kdav = config, config.distiller.name == "kdav"
        self.rank, self.world, self.device = join_processes(config.device)
        batch_size = config.train.batch_size
        if batch_size % self.world:
            raise ValueError(
                f"train.batch_size is {batch_size}; give a multiple of {self.world}, the processes"
            )
        self.batch_size = batch_size // self.world
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

        self._train_set, self._evaluation_set = open_folders(config.data)
        classes = self._train_set.classes
        torch.manual_seed(config.train.seed)
        network, pixels = build_network(config.model, classes, IMAGENET)
        pixels = (config.data.mean, config.data.std) if config.data.mean else pixels
        self.mean, self.std = torch.tensor(pixels, device=self.device).view(2, 3, 1, 1)
        self.teacher = self._build_teacher(classes, pixels) if config.distiller.name != "none" else None
        width = self.teacher.feature_width if self.kdav else None
        self.student = Student(network, width).to(self.device, memory_format=self.format)
        if self.kdav:
            self.loss = KDAVLoss(config.distiller, width, len(classes), dtype, self.device)
        if compiled:
            for module in filter(None, (self.student, self.teacher)):
                module.compile()
        self.model = self.student
        if self.world > 1:
            # BatchNorm's statistics stay each rank's own while training; `evaluate` averages them.
            how = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
            self.model = DistributedDataParallel(self.student, **how)
        torch.manual_seed(config.train.seed + self.rank)  # each rank augments in its own way

        self.train_loader = self._build_train_loader()
        epoch_steps = len(self.train_loader)
        if epoch_steps == 0:
            raise ValueError(f"train.batch_size is {batch_size} but there are fewer images; lower it")
        self.steps = max(1, round(config.train.epochs * epoch_steps))
        trained = [p for p in self.student.parameters() if p.requires_grad]
        settings = config.optimizer.model_dump(include={"lr", "momentum", "nesterov", "weight_decay"})
        self.optimizer = torch.optim.SGD(trained, **settings, fused=self.device.type == "cuda" or None)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(config, step, self.steps, epoch_steps)
        )

    def _build_teacher(self, classes: list[str], pixels: tuple) -> ImageClassifier:
        section = self.config.teacher
        if section.checkpoint is None and not section.pretrained:
            raise ValueError("the teacher has no weights; set teacher.checkpoint or teacher.pretrained=true")
        teacher, expected = build_network(section, classes, pixels)
        # From the data's normalisation to that of the teacher's weights.
        mean, std = torch.tensor(expected, device=self.device).view(2, 3, 1, 1)
        self._teacher_scale, self._teacher_shift = self.std / std, (self.mean - mean) / std
        self._renormalize = bool((mean != self.mean).any() or (std != self.std).any())
        return teacher.requires_grad_(False).eval().to(self.device, memory_format=self.format)

    def _build_train_loader(self) -> DataLoader:
        seed, count, images = self.config.train.seed, self.config.data.train_subset, self._train_set
        if count is not None:  # the images that kdav_fast takes of the same recipe
            chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:count])
            images.samples = [images.samples[i] for i in chosen]
        sampler = DistributedSampler(images, self.world, self.rank, seed=seed, drop_last=True)
        return self._loader(images, sampler=sampler, drop_last=True, persistent_workers=True)

    def _loader(self, images: Dataset, **options: object) -> DataLoader:
        """By all cores, which the ranks of a host share."""
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = self.config.data.workers or max(1, cores)
        pin_memory = self.device.type == "cuda"
        return DataLoader(images, self.batch_size, num_workers=workers, pin_memory=pin_memory, **options)

    def _share(self, images: ImageFolder) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of this rank's share, each image once over all ranks."""
        return self.batches(self._loader(Subset(images, range(self.rank, len(images), self.world))))

    def batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and labels, on the device."""
        for images, target in loader:
            images = images.to(self.device, non_blocking=True).contiguous(memory_format=self.format)
            images = images.float().sub_(255 * self.mean).div_(255 * self.std)
            yield images, target.to(self.device, non_blocking=True)

    def training_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Without end, in another order in every epoch."""
        epoch = 0
        while True:
            self.train_loader.sampler.set_epoch(epoch)
            yield from self.batches(self.train_loader)
            epoch += 1

    @torch.no_grad()
    def teach(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features and logits, in float32."""
        if self._renormalize:
            images = torch.addcmul(self._teacher_shift, images, self._teacher_scale)
        with self.autocast:
            outputs = self.teacher(images)
        return outputs.features.float(), outputs.logits.float()

    def measure_teacher(self) -> None:
        """One pass for centre and class prototypes of the teacher's embeddings, before training with KDAV."""
        if not self.kdav:
            return
        images = copy.copy(self._train_set)
        images.transform = self._evaluation_set.transform
        shape = (len(images.classes), self.teacher.feature_width)
        class_sum = torch.zeros(shape, dtype=torch.float64, device=self.device)
        count = torch.zeros(shape[0], dtype=torch.float64, device=self.device)
        for batch, target in self._share(images):
            class_sum.index_add_(0, target, self.teach(batch)[0].double())
            count.index_add_(0, target, torch.ones_like(target, dtype=torch.float64))
        class_sum, count = total(class_sum), total(count)
        center = class_sum.sum(0) / count.sum() * self.config.distiller.center
        self.center = center.float()
        self.prototypes = F.normalize(class_sum - count[:, None] * center, dim=1).float()

    def step(self, images: Tensor, target: Tensor) -> Tensor:
        """Train on one batch of this rank; its mean loss, detached."""
        loss = self._loss(images, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _loss(self, images: Tensor, target: Tensor) -> Tensor:
        if self.teacher is not None:
            features, logits = self.teach(images)
        with self.autocast:
            outputs = self.model(images)
            if self.kdav:
                return self.loss(outputs, features - self.center, logits)
            hard = F.cross_entropy(outputs, target, label_smoothing=self.config.train.label_smoothing)
            return hard if self.teacher is None else kd_loss(outputs, logits, hard, self.config.distiller)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Top-1 accuracy in percent on the evaluation images, over all ranks."""
        for buffer in filter(Tensor.is_floating_point, self.student.buffers()):
            buffer.copy_(total(buffer) / self.world)
        self.student.eval()
        correct = torch.zeros((), device=self.device)
        for images, target in self._share(self._evaluation_set):
            with self.autocast:
                scores = self.student(images)
            if self.kdav:
                scores = scores.float() @ self.prototypes.T
            correct += (scores.argmax(1) == target).sum()
        self.student.train()
        return 100 * total(correct).item() / len(self._evaluation_set)


def join_processes(device: str) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device, as torchrun's environment says; one process without it."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not on_gpu:
        raise ValueError("device is 'cuda' but torch sees no GPU; set device=cpu")
    rank, local = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if on_gpu:
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return rank, world, torch.device("cuda", local) if on_gpu else torch.device("cpu")


def gather(rows: Tensor) -> Tensor:
    """Rows of all ranks, in rank order."""
    if not dist.is_initialized():
        return rows
    gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def total(tensor: Tensor) -> Tensor:
    """The sum over all ranks."""
    tensor = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(trainer: Trainer) -> dict[str, object]:
    """A whole run: losses by step, images a second after the first steps, accuracy."""
    trainer.measure_teacher()
    warm, losses, started = min(WARM_UP, trainer.steps // 2), {}, now(trainer.device)
    for step, batch in zip(range(1, trainer.steps + 1), trainer.training_batches(), strict=False):
        loss = trainer.step(*batch)
        if step == warm:
            started = now(trainer.device)
        if step % trainer.config.train.log_every == 0 or step == trainer.steps:
            losses[step] = total(loss).item() / trainer.world
            if trainer.rank == 0:
                print(f"step {step}/{trainer.steps}: loss {losses[step]:.4f}", flush=True)
    images = (trainer.steps - warm) * trainer.config.train.batch_size
    rate = images / (now(trainer.device) - started)
    return {"losses": losses, "images_per_s": rate, "top1": trainer.evaluate()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("recipe", type=Path)
    add("overrides", nargs="*", metavar="key=value", help="stand above the recipe")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast (%(default)s)")
    add("--channels-last", action="store_true", help="weights and images in NHWC order")
    add("--compile", action="store_true", dest="compiled", help="networks through torch.compile")
    add("--json", type=Path, help="write the result there")
    options = parser.parse_intermixed_args()
    how = {name: getattr(options, name) for name in ("precision", "channels_last", "compiled")}
    try:
        trainer = Trainer(load_config(options.recipe, options.overrides), **how)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    result = train(trainer)
    if trainer.rank == 0:
        print(f"{result['images_per_s']:.1f} images/s, top-1 {result['top1']:.2f} %")
        if options.json:
            machine = describe(trainer.device, ("torch", "torchvision")) | {"processes": trainer.world}
            record = {"environment": machine, "settings": how, **result}
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    if trainer.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
