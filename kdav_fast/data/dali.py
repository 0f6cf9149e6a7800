"""The fast loader: an NVIDIA DALI pipeline from file bytes, or from pixels in memory, to normalised tensors."""

import base64
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from kdav_fast.data.checks.start import decoding_defects, defects_error
from kdav_fast.data.dali_graph import auto_augment, color_jitter, crop_pixels, decode_and_crop, normalize
from kdav_fast.data.epoch_loader import EpochLoader
from kdav_fast.data.image_set import EncodedImages, PixelImages
from kdav_fast.data.preprocessing import Preprocessing
from kdav_fast.data.read_ahead import read_ahead
from kdav_fast.errors import InputError

# Batches in DALI's queue, and the one that it fills next.
_QUEUE = 2
_BEGUN = _QUEUE + 1
# Batches whose files are read before DALI asks for them.
_READ_AHEAD = 2


class DaliLoader(EpochLoader):
    """Decodes on CPU threads or on the GPU. See `EpochLoader` for the other arguments.

    Args:
        decode: `gpu` decodes and resizes there. With `cpu` and a CUDA device, cropped images cross to the
            GPU as bytes and are augmented and normalised there.
        hw_decoder_load: share of the JPEGs for the hardware decoder, 0..1; only for `gpu`.
    """

    name = "dali"

    def __init__(
        self, *args: Any, decode: Literal["cpu", "gpu"] = "cpu", hw_decoder_load: float = 0.9, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._decode = decode
        self._hw_decoder_load = hw_decoder_load
        self._pipeline: Pipeline | None = None
        self._checkpoint: bytes | None = None  # of the random operators, where the next pipeline begins
        self._first_epoch = 0  # in which a pipeline without checkpoint began

    def _rest_of_epoch(self, epoch: int, step: int) -> Iterator[torch.Tensor]:
        if self._pipeline is None:
            self._pipeline = self._build(epoch, step)
        for position in range(step, self.steps_per_epoch):
            try:
                images = self._run()
            except (RuntimeError, OSError):
                # A pipeline that failed is lost; a new one can go on from here once the files are repaired.
                self._checkpoint = self._pipeline.checkpoint()
                self._pipeline = None
                begun = np.concatenate(list(islice(self.order.upcoming(epoch, position), _BEGUN)))
                if defects := decoding_defects(self.images, begun.tolist()):
                    raise defects_error(self.images, defects) from None
                raise
            yield images

    def state_dict(self) -> dict[str, Any]:
        checkpoint = self._pipeline.checkpoint() if self._pipeline else self._checkpoint
        return {
            **super().state_dict(),
            "pipeline": checkpoint and base64.b64encode(checkpoint).decode("ascii"),
            "first_epoch": self._first_epoch,
        }

    def _restore(self, state: dict[str, Any] | None) -> None:
        self._pipeline = None  # a pipeline takes a checkpoint only when it is built
        self._checkpoint = base64.b64decode(state["pipeline"]) if state and state["pipeline"] else None
        self._first_epoch = state["first_epoch"] if state else self._epoch

    def _run(self) -> torch.Tensor:
        """The next B x 3 x S x S images.

        DALI's dynamic executor gives every batch memory of its own, which lives as long as the tensor.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (output,) = self._pipeline.run(stream)
        images = torch.from_dlpack(output.as_tensor())
        if self.preprocessing.channels_last:
            images = images.permute(0, 3, 1, 2)
        return images.to(self.preprocessing.dtype)

    def _build(self, epoch: int, step: int) -> Pipeline:
        gpu = None
        if self.device.type == "cuda":
            gpu = torch.cuda.current_device() if self.device.index is None else self.device.index
        # Ranks share the order of images but not the augmentation.
        entropy = (self.order.seed, self.order.rank, self._first_epoch)
        seed = np.random.SeedSequence(entropy).generate_state(1)[0]
        with _without_deprecations():
            pipeline = self._define(epoch, step, gpu, int(seed))
            try:
                pipeline.build()
            except RuntimeError as error:
                if self._checkpoint is None:
                    raise
                raise InputError(
                    f"the saved position in the {self.images.split} images does not fit this DALI pipeline; resume "
                    "with the DALI version and data.decode it was saved with, or start a new run"
                ) from error
        return pipeline

    def _define(self, epoch: int, step: int, gpu: int | None, seed: int) -> Pipeline:
        return _pipeline(
            self.images,
            _source(self.images, self.order.upcoming(epoch, step)),
            self.preprocessing,
            self._decode,
            self._hw_decoder_load,
            self.device.type == "cuda",
            batch_size=self.order.batch_size,
            num_threads=self.workers,
            device_id=gpu,
            seed=seed,
            prefetch_queue_depth=_QUEUE,
            enable_checkpointing=True,
            checkpoint=self._checkpoint,
        )


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """DALI's automatic augmentations use deprecated names of its own operators, and say so past any filter."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if not issubclass(warning.category, DeprecationWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


Source = Callable[[int], Any]


def _source(images: EncodedImages | PixelImages, batches: Iterator[np.ndarray]) -> Source:
    """Answers DALI when it asks for the next batch's bytes or pixels. Refers to no loader: in a reference
    cycle, the pipeline's threads would outlive it."""
    if isinstance(images, EncodedImages):
        contents = read_ahead(batches, images.read, _READ_AHEAD)
    else:
        # On the CPU by NumPy: torch takes ten times as long to pick rows of bytes.
        pixels = images.pixels if images.pixels.is_cuda else images.pixels.numpy()
        contents = (pixels[batch] for batch in batches)
    in_use = deque(maxlen=_BEGUN + 1)  # DALI does not copy what it was given

    def next_batch(_iteration: int) -> Any:
        in_use.append(next(contents))
        return in_use[-1]

    return next_batch


@pipeline_def(enable_conditionals=True)  # auto_augment needs conditionals
def _pipeline(
    images: EncodedImages | PixelImages,
    source: Source,
    preprocessing: Preprocessing,
    decode: Literal["cpu", "gpu"],
    hw_decoder_load: float,
    on_gpu: bool,
) -> DataNode:
    crop, size = preprocessing.crop, preprocessing.size
    if isinstance(images, EncodedImages):
        encoded = fn.external_source(source, ndim=1, dtype=types.UINT8, no_copy=True)
        device = "mixed" if decode == "gpu" else "cpu"
        square = decode_and_crop(encoded, crop, size, device, hw_decoder_load)
    else:
        device = "gpu" if images.pixels.is_cuda else "cpu"
        pixels = fn.external_source(
            source, layout="HWC", dtype=types.UINT8, device=device, no_copy=device == "cpu"
        )
        square = crop_pixels(pixels, crop, size, same_size=tuple(images.pixels.shape[1:3]) == (size, size))
    if on_gpu:
        square = square.gpu()
    square = auto_augment(square, preprocessing.augment, size)
    if preprocessing.jitter is not None:
        square = color_jitter(square, preprocessing.jitter)
    return normalize(square, preprocessing)
