"""The fast loader: NVIDIA DALI from file bytes, or from pixels in memory, to normalised tensors."""

import base64
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, tee
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from kdav_fast.data import cpu_decoder
from kdav_fast.data.checks.scan import decoding_defects, defects_error
from kdav_fast.data.cpu_decoder import CpuDecoder
from kdav_fast.data.dali_draws import Draws, FedDraws, OwnDraws, Source, to_feed
from kdav_fast.data.dali_graph import (
    as_source,
    color_jitter,
    crop_pixels,
    decode_and_crop,
    normalize,
)
from kdav_fast.data.dali_inputs import contents_of, with_parameters
from kdav_fast.data.epoch_loader import EpochLoader
from kdav_fast.data.image_set import EncodedImages
from kdav_fast.data.preprocessing import Preprocessing, crop_of_square, square_crop
from kdav_fast.data.read_ahead import ReaderLostError
from kdav_fast.data.view_parameters import ViewParameters, parameters_of
from kdav_fast.errors import InputError

_QUEUE = 2  # batches that the pipeline has in work
# Batches that may have been begun when one fails.
_BEGUN = _QUEUE + 1 + cpu_decoder.BEGUN


class DaliLoader(EpochLoader):
    """Decodes on CPU threads or on the GPU. See `EpochLoader` for the other arguments.

    On the CPU a `CpuDecoder` makes squares of bytes; with a CUDA device they cross to it as bytes. On the GPU
    the pipeline decodes. Pixels in memory need neither. In each case one pipeline augments and normalises.

    DALI draws what is random, and its generators' states are part of the loader's. Where images have fixed views, it is
    fed their parameters instead: the position in the epoch is then the whole state.

    Args:
        decode: where.
        hw_decoder_load: share of the JPEGs for the hardware decoder, 0..1, or None for DALI's default; only for `gpu`.
        fancy_upsampling: interpolate colours between their pixels, as decoders on a CPU do; only for `gpu`.
    """

    name = "dali"

    def __init__(
        self,
        *args: Any,
        decode: Literal["cpu", "gpu"] = "cpu",
        hw_decoder_load: float | None = None,
        fancy_upsampling: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._of_gpu: dict[str, float | bool] = {"jpeg_fancy_upsampling": fancy_upsampling}
        if hw_decoder_load is not None:
            self._of_gpu["hw_decoder_load"] = hw_decoder_load
        encoded = isinstance(self.images, EncodedImages)
        self._decode = decode if encoded else None
        self._pipeline: Pipeline | None = None
        self._decoder: CpuDecoder | None = None
        # States of the random operators, where the next pipeline and the next decoder begin.
        self._checkpoint: bytes | None = None
        self._decoder_checkpoint: bytes | None = None
        self._first_epoch = 0  # in which a pipeline without checkpoint began

    def _rest_of_epoch(self, epoch: int, first: int) -> Iterator[torch.Tensor]:
        if self._pipeline is None:
            self._build(epoch, first)
        for batch in range(first, self.batches_per_epoch):
            try:
                images = self._run()
            except ReaderLostError:
                raise
            except (RuntimeError, OSError):
                # A pipeline that failed is lost; a new one can go on from here once the files are repaired.
                self._checkpoint = None if self.views else self._pipeline.checkpoint()
                self._pipeline = self._decoder = None
                begun = np.concatenate(list(islice(self._epochs.upcoming(epoch, batch), _BEGUN)))
                if defects := decoding_defects(self.images, begun.tolist()):
                    raise defects_error(self.images, defects) from None
                raise
            yield images

    def state_dict(self) -> dict[str, Any]:
        if self.views:
            return super().state_dict()
        checkpoint = self._pipeline.checkpoint() if self._pipeline else self._checkpoint
        return {
            **super().state_dict(),
            "pipeline": _as_text(checkpoint),
            "decoder": _as_text(self._decoder_checkpoint),
            "first_epoch": self._first_epoch,
        }

    def _restore(self, state: dict[str, Any] | None) -> None:
        self._pipeline = self._decoder = None  # they take a checkpoint only when they are built
        if self.views:
            return
        self._checkpoint = _as_bytes(state["pipeline"]) if state else None
        self._decoder_checkpoint = _as_bytes(state["decoder"]) if state else None
        self._first_epoch = state["first_epoch"] if state else self._epoch

    def _run(self) -> torch.Tensor:
        """The next batch's images, loaded and augmented: rows x 3 x S x S.

        DALI's dynamic executor gives every batch memory of its own, which lives as long as the tensor.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (output,) = self._pipeline.run(stream)
        if self._decoder and not self.views:
            self._decoder_checkpoint = self._decoder.checkpoint_of_next()
        images = torch.from_dlpack(output.as_tensor())
        if self.preprocessing.channels_last:
            images = images.permute(0, 3, 1, 2)
        return images.to(self.preprocessing.dtype)

    def _build(self, epoch: int, first: int) -> None:
        gpu = None
        if self.device.type == "cuda":
            gpu = torch.cuda.current_device() if self.device.index is None else self.device.index
        contents, views = self._inputs(epoch, first)
        try:
            with _without_deprecations():
                pipeline = _pipeline(
                    as_source(contents, _QUEUE),
                    views,
                    self.preprocessing,
                    self._decode,
                    None if self._decode else self.images.pixels,
                    self._of_gpu,
                    self.device.type == "cuda",
                    batch_size=self._epochs.rows,
                    num_threads=self.workers,
                    device_id=gpu,
                    seed=self._random_seed(0),
                    prefetch_queue_depth=_QUEUE,
                    enable_checkpointing=self.views is None,
                    checkpoint=self._checkpoint,
                )
                pipeline.build()
        except RuntimeError as error:
            self._decoder = None
            if self._checkpoint is None:
                raise
            raise InputError(
                f"the saved position in the {self.images.split} images does not fit this DALI pipeline; resume "
                "with the DALI version and data.decode it was saved with, or start a new run"
            ) from error
        self._pipeline = pipeline

    def _inputs(self, epoch: int, first: int) -> tuple[Iterator, Iterator[ViewParameters] | None]:
        """What the pipeline takes for each batch: files, or squares, or pixels; and the parameters of fixed views.
        Refers to no loader: in a reference cycle, its threads would outlive it."""
        fed = parameters_of(self.preprocessing) if self.views else ()
        if fed:
            batches = self._epochs.upcoming_views(epoch, first)
            contents, views = with_parameters(self.images, batches, self.views)
        else:
            contents, views = contents_of(self.images, self._epochs.upcoming(epoch, first)), None
        if self._decode != "cpu":
            return contents, views
        parts = None
        if "boxes" in fed:  # what nobody took would be kept
            parts, views = tee(views) if len(fed) > 1 else (views, None)
        self._decoder = CpuDecoder(
            contents,
            square_crop(self.preprocessing.crop, self.preprocessing.size),
            self.preprocessing.size,
            batch_size=self._epochs.rows,
            threads=self.workers,
            seed=None if self.views else self._random_seed(1),
            checkpoint=self._decoder_checkpoint,
            views=parts,
        )
        return self._decoder, views

    def _random_seed(self, use: int) -> int:
        """Ranks share the order of images but not the augmentation."""
        entropy = (self._epochs.seed, self._epochs.rank, self._first_epoch, use)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _as_text(checkpoint: bytes | None) -> str | None:
    return checkpoint and base64.b64encode(checkpoint).decode("ascii")


def _as_bytes(text: str | None) -> bytes | None:
    return text and base64.b64decode(text)


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """DALI's automatic augmentations use deprecated names of its own operators, and say so past any filter."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if not issubclass(warning.category, DeprecationWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@pipeline_def(enable_conditionals=True)  # automatic augmentation needs conditionals
def _pipeline(
    source: Source,
    views: Iterator[ViewParameters] | None,
    preprocessing: Preprocessing,
    decode: Literal["cpu", "gpu"] | None,
    pixels: torch.Tensor | None,
    of_gpu: dict[str, float | bool],
    on_gpu: bool,
) -> DataNode:
    crop, size = preprocessing.crop, preprocessing.size
    if decode == "cpu":
        crop = crop_of_square(crop, size)
    draws = OwnDraws() if views is None else _fed(views, replace(preprocessing, crop=crop))
    if decode == "gpu":
        encoded = fn.external_source(source, ndim=1, dtype=types.UINT8, no_copy=True)
        square = decode_and_crop(encoded, crop, size, draws, "mixed", **of_gpu)
    elif decode == "cpu":
        square = fn.external_source(source, layout="HWC", dtype=types.UINT8, no_copy=True)
        square = crop_pixels(square, crop, size, draws, same_size=True)
    else:
        device = "gpu" if pixels.is_cuda else "cpu"
        whole = fn.external_source(
            source, layout="HWC", dtype=types.UINT8, device=device, no_copy=device == "cpu"
        )
        square = crop_pixels(whole, crop, size, draws, same_size=tuple(pixels.shape[1:3]) == (size, size))
    if on_gpu:
        square = square.gpu()
    if preprocessing.augment is not None:
        square = draws.augment(square, preprocessing.augment, size)
    if preprocessing.jitter is not None:
        square = color_jitter(square, preprocessing.jitter, draws)
    return normalize(square, preprocessing, draws)


def _fed(views: Iterator[ViewParameters], preprocessing: Preprocessing) -> Draws:
    names = parameters_of(preprocessing)
    return FedDraws(as_source(to_feed(views, names), _QUEUE), names)
