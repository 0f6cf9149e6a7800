"""The fast loader: an NVIDIA DALI pipeline from file bytes to normalised tensors."""

import base64
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, math, types
from nvidia.dali.data_node import DataNode
from PIL import Image

from kdav_fast.data.batch import Batch
from kdav_fast.data.check import decoding_defects, defects_error
from kdav_fast.data.epoch_loader import EpochLoader
from kdav_fast.data.preprocessing import CenterCrop, PaddedCrop, Preprocessing, RandomResizedCrop
from kdav_fast.errors import InputError

# Batches that DALI may have begun when it fails: two in the pipeline, two in the reader and its next one.
_READ_AHEAD = 5


class DaliLoader(EpochLoader):
    """Decodes on CPU threads or on the GPU. See `EpochLoader` for the other arguments.

    Args:
        decode: `gpu` decodes and resizes there. With `cpu` and a CUDA device, cropped images cross to the
            GPU as bytes and are normalised there.
    """

    name = "dali"

    def __init__(self, *args: Any, decode: Literal["cpu", "gpu"] = "cpu", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._decode = decode
        self._pipeline: Pipeline | None = None
        self._checkpoint: bytes | None = None  # where the next pipeline begins; None: at the first epoch

    def _rest_of_epoch(self, epoch: int, step: int) -> Iterator[Batch]:
        if self._pipeline is None:
            self._pipeline = self._build(self.folder.root, self._paths(), self._checkpoint)
        for position in range(step, self.steps_per_epoch):
            try:
                images, place = self._run(self._pipeline)
            except RuntimeError:
                # A pipeline that failed is lost; a new one can go on from here once the files are repaired.
                self._checkpoint = self._pipeline.checkpoint()
                self._pipeline = None
                defects = self._defects_ahead(self._checkpoint)
                if not defects:
                    raise
                raise defects_error(self.folder, defects) from None
            yield self._batch(images.permute(0, 3, 1, 2), place, position)

    def state_dict(self) -> dict[str, Any]:
        checkpoint = self._pipeline.checkpoint() if self._pipeline else self._checkpoint
        return {
            **super().state_dict(),
            "pipeline": checkpoint and base64.b64encode(checkpoint).decode("ascii"),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._checkpoint = state["pipeline"] and base64.b64decode(state["pipeline"])
        self._pipeline = None  # a pipeline takes a checkpoint only when it is built

    def _paths(self) -> list[str]:
        """The path at every place of the order."""
        return [self.folder.paths[image] for image in self._image_at]

    def _run(self, pipeline: Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
        """The next images (B x S x S x 3) and their places in the order (B, int64, CPU).

        DALI's dynamic executor gives every batch memory of its own, which lives as long as the tensor.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        images, place = (torch.from_dlpack(output.as_tensor()) for output in pipeline.run(stream))
        return images, place.flatten().long()

    def _build(self, root: Path, paths: list[str], checkpoint: bytes | None) -> Pipeline:
        shard = self.shard
        gpu = None
        if self.device.type == "cuda":
            gpu = torch.cuda.current_device() if self.device.index is None else self.device.index
        # Of DALI's two ways to shuffle, `random_shuffle` mixes within a buffer; this one reorders the whole
        # split, before the first epoch too, by a seed that all ranks share. Like `stick_to_shard`, it keeps
        # a rank at its own part of the order.
        order = {"stick_to_shard": True}
        if self.shuffle:
            order = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": self.seed}
        pipeline = Pipeline(
            batch_size=shard.batch_size,
            num_threads=self.workers,
            device_id=gpu,
            # Ranks share the order of images but not the augmentation.
            seed=int(np.random.SeedSequence((self.seed, shard.rank)).generate_state(1)[0]),
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        with pipeline:
            encoded, place = fn.readers.file(
                name="reader",
                file_root=str(root),
                files=paths,
                labels=list(range(len(paths))),
                **order,
                num_shards=shard.world,
                shard_id=shard.rank,
                pad_last_batch=True,
                dont_use_mmap=True,  # a mapped file on a network file system is read page by page
            )
            pixels = _crop(encoded, self.preprocessing, "mixed" if self._decode == "gpu" else "cpu")
            images = _normalize(pixels if gpu is None else pixels.gpu(), self.preprocessing)
            pipeline.set_outputs(images, place)
        try:
            pipeline.build()
        except RuntimeError as error:
            if checkpoint is None:
                raise
            raise InputError(
                f"the saved position in the {self.folder.split} images does not fit this DALI pipeline; resume "
                "with the DALI version and data.decode it was saved with, or start a new run"
            ) from error
        return pipeline

    def _defects_ahead(self, checkpoint: bytes) -> list[str]:
        """What is wrong in the first bad batch after `checkpoint`.

        DALI names the file for few kinds of damage and does not tell which files a batch has before it is
        decoded. The same pipeline over copies of one sound image does: its order is the same.
        """
        with tempfile.TemporaryDirectory() as folder:
            sound = io.BytesIO()
            Image.new("RGB", (8, 8)).save(sound, "PNG")
            Path(folder, "sound.png").write_bytes(sound.getvalue())
            pipeline = self._build(Path(folder), ["sound.png"] * len(self._image_at), checkpoint)
            for _ in range(_READ_AHEAD):
                _, place = self._run(pipeline)
                if defects := decoding_defects(self.folder, self._image_at[place.numpy()].tolist()):
                    return defects
        return []


def _crop(encoded: DataNode, preprocessing: Preprocessing, device: Literal["cpu", "mixed"]) -> DataNode:
    """S x S x 3 bytes. EXIF rotation is ignored, as by torchvision and with published weights."""
    size = preprocessing.size
    options = {"device": device, "output_type": types.RGB, "adjust_orientation": False}
    if device == "mixed":
        options["jpeg_fancy_upsampling"] = True  # what CPU decoders do
    match preprocessing.crop:
        case RandomResizedCrop(area, aspect_ratio):
            part = fn.decoders.image_random_crop(
                encoded, random_area=area, random_aspect_ratio=aspect_ratio, **options
            )
            return fn.resize(part, size=(size, size))
        case PaddedCrop(padding):
            whole = _resize_and_center_crop(fn.decoders.image(encoded, **options), size, size)
            shift = fn.random.uniform(
                values=[float(pixels) for pixels in range(-padding, padding + 1)], shape=2, dtype=types.INT32
            )
            return fn.slice(
                whole,
                start=shift,
                shape=(size, size),
                axes=(0, 1),
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        case CenterCrop(resize):
            return _resize_and_center_crop(fn.decoders.image(encoded, **options), resize, size)


def _resize_and_center_crop(images: DataNode, resize: int, size: int) -> DataNode:
    """torchvision's `Resize(resize)` and `CenterCrop(size)` as one resampling of the window that remains."""
    shape = fn.cast(images.shape()[:2], dtype=types.FLOAT)
    short = math.min(shape[0], shape[1])
    resized = math.floor(shape * resize / short)
    excess = resized - size
    # round(excess / 2) where halves go to the even number, as torchvision rounds
    start = math.floor((excess + 1) / 4) + math.floor((excess + 2) / 4)
    scale = shape / resized
    return fn.resize(images, size=(size, size), roi_start=start * scale, roi_end=(start + size) * scale)


def _normalize(images: DataNode, preprocessing: Preprocessing) -> DataNode:
    """S x S x 3 floats: flipped at random, (x / 255 - mean) / std."""
    return fn.crop_mirror_normalize(
        images,
        mirror=fn.random.coin_flip() if preprocessing.flip else 0,
        mean=[255 * value for value in preprocessing.mean],
        std=[255 * value for value in preprocessing.std],
        output_layout="HWC",
        dtype=types.FLOAT,
    )
