"""From files to squares of bytes on the CPU: DALI decodes, torch resamples."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch import Tensor
from torchvision.transforms.v2 import functional

from kdav_fast.data.dali_draws import Draws, FedDraws, OwnDraws, Source, to_feed
from kdav_fast.data.dali_graph import as_source
from kdav_fast.data.preprocessing import CenterCrop, RandomResizedCrop
from kdav_fast.data.view_parameters import ViewParameters

QUEUE = 2
"""Batches that DALI decodes ahead."""
_RESAMPLED_AHEAD = 1  # decoded batches whose resampling has begun
_LONGEST = 16  # times the short side
_FED = ("boxes",)  # what it takes of a view
BEGUN = QUEUE + _RESAMPLED_AHEAD + 1
"""Batches that may have been begun beyond the one that was handed out."""


class CpuDecoder:
    """An iterator over batches of B x S x S x 3 bytes (NumPy).

    DALI decodes only what is inside a random crop. torch then resamples: on a CPU its routine for bytes is the
    faster one (1,091 against 714 images/s for the whole loader), and it is Pillow's to a level of 255, up to the edges.

    Args:
        contents: the B files of every batch; endless.
        crop: the random part, or the middle.
        size: S, pixels.
        batch_size: B.
        threads: for decoding, and again for resampling.
        seed: of the random parts; None where nothing is drawn here, and there is no checkpoint.
        checkpoint: where an earlier decoder's random state was; None begins anew.
        views: of every batch: which parts a random crop takes, if they are not drawn here.

    Raises:
        RuntimeError: an image cannot be decoded, or (from the constructor) the checkpoint does not fit.
        OSError: what `contents` raises.
    """

    def __init__(
        self,
        contents: Iterator[list[np.ndarray]],
        crop: RandomResizedCrop | CenterCrop,
        size: int,
        *,
        batch_size: int,
        threads: int,
        seed: int | None,
        checkpoint: bytes | None = None,
        views: Iterator[ViewParameters] | None = None,
    ) -> None:
        self._crop, self._size = crop, size
        self._draws = seed is not None
        self._pipeline = _pipeline(
            as_source(contents, QUEUE),
            crop,
            None if views is None else as_source(to_feed(views, _FED), QUEUE),
            batch_size=batch_size,
            num_threads=threads,
            device_id=None,
            seed=seed,
            prefetch_queue_depth=QUEUE,
            enable_checkpointing=self._draws,
            checkpoint=checkpoint,
        )
        self._pipeline.build()
        self._threads = _single_threaded_pool(threads)
        self._workers = threads
        self._begun: deque[tuple[Tensor, list[Future]]] = deque()
        self._checkpoints: deque[bytes] = deque()

    def __iter__(self) -> "CpuDecoder":
        return self

    def __next__(self) -> np.ndarray:
        while len(self._begun) <= _RESAMPLED_AHEAD:
            self._begin()
        squares, parts = self._begun.popleft()
        for part in parts:
            part.result()
        return squares.numpy()

    def checkpoint_of_next(self) -> bytes:
        """The random state after the oldest batch that this was not asked about yet."""
        return self._checkpoints.popleft()

    def _begin(self) -> None:
        (decoded,) = self._pipeline.run()
        if self._draws:
            self._checkpoints.append(self._pipeline.checkpoint())
        if decoded.is_dense_tensor() and decoded.shape()[0][:2] == (self._size, self._size):
            self._begun.append((torch.from_dlpack(decoded.as_tensor()), []))
            return
        crop, squares = self._crop, torch.empty(len(decoded), self._size, self._size, 3, dtype=torch.uint8)

        def resample(positions: np.ndarray) -> None:
            for position in positions.tolist():
                image = torch.from_dlpack(decoded[position]).permute(2, 0, 1)[None]
                _resample(image, crop, squares[position : position + 1].permute(0, 3, 1, 2))

        parts = np.array_split(np.arange(len(decoded)), 2 * self._workers)
        self._begun.append((squares, [self._threads.submit(resample, part) for part in parts]))


def _resample(image: Tensor, crop: RandomResizedCrop | CenterCrop, square: Tensor) -> None:
    """Fill `square` (1 x 3 x S x S) from an image or a part of one (1 x 3 x H x W), antialiased bilinear."""
    size = square.shape[2]
    if isinstance(crop, RandomResizedCrop):
        # What torch.nn.functional.interpolate calls; writing in place saves a copy and its page faults.
        torch.ops.aten._upsample_bilinear2d_aa.out(image, [size, size], False, None, None, out=square)
    else:
        square.copy_(functional.center_crop(functional.resize(_middle(image), [crop.resize]), [size, size]))


def _middle(image: Tensor) -> Tensor:
    """Without the far ends of an image that is very long: nothing of them is left after the crop, but resizing
    them could fill the memory. As much goes from either end, so that the middle stays where it is."""
    height, width = image.shape[2:]
    longest = _LONGEST * min(height, width)
    top, left = (max(0, side - longest) // 2 for side in (height, width))
    return image[:, :, top : height - top, left : width - left]


def _single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch does not divide its work among further ones."""
    all_started = Barrier(threads + 1)
    wanted = torch.get_num_threads()

    def start() -> None:
        torch.set_num_threads(1)  # of this thread, and the default of later ones
        all_started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="resample", initializer=start)
    for _ in range(threads):
        pool.submit(int)
    all_started.wait()
    torch.set_num_threads(wanted)
    return pool


@pipeline_def
def _pipeline(source: Source, crop: RandomResizedCrop | CenterCrop, views: Source | None) -> DataNode:
    draws: Draws = OwnDraws() if views is None else FedDraws(views, _FED)
    encoded = fn.external_source(source, ndim=1, dtype=types.UINT8, no_copy=True)
    # EXIF rotation is ignored, as by torchvision and with published weights.
    options = {"output_type": types.RGB, "adjust_orientation": False}
    if isinstance(crop, CenterCrop):
        return fn.decoders.image(encoded, **options)
    return draws.decode_part(encoded, crop, **options)
