import gc
import resource
import threading
import time
from itertools import cycle, islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdav_fast.data.cpu_decoder import BEGUN, CpuDecoder
from kdav_fast.data.preprocessing import CenterCrop, RandomResizedCrop
from kdav_fast.data.read_ahead import read_ahead
from tests.data.pictures import smooth_photograph

RANDOM = RandomResizedCrop((0.2, 1.0), (0.75, 4 / 3))


@pytest.fixture
def photographs(make_split):
    return make_split([smooth_photograph(30 + 7 * i, 50 - 3 * i, i) for i in range(6)])


def decoder(images, crop, size=16, seed=0, checkpoint=None, first=0, threads=2):
    batches = islice(cycle([np.array([0, 3, 5]), np.array([1, 2, 4])]), first, None)
    options = {"batch_size": 3, "threads": threads, "seed": seed, "checkpoint": checkpoint}
    return CpuDecoder(read_ahead(batches, images, 2), crop, size, **options)


def test_a_fixed_crop_is_a_resampling_of_the_short_side_and_the_middle_of_it(photographs):
    squares = next(decoder(photographs, CenterCrop(20)))
    for square, position in zip(squares, (0, 3, 5), strict=True):
        image = torch.from_numpy(smooth_photograph(30 + 7 * position, 50 - 3 * position, position))
        height, width = image.shape[:2]
        scaled = [int(20 * side / min(height, width)) for side in (height, width)]
        planes = image.permute(2, 0, 1)[None].double()
        resized = F.interpolate(planes, scaled, mode="bilinear", antialias=True)[0]
        top, left = (round((side - 16) / 2) for side in scaled)
        expected = resized[:, top : top + 16, left : left + 16].permute(1, 2, 0)
        # Against float64: bytes are rounded after each of two passes.
        assert (torch.from_numpy(square).double() - expected).abs().max() < 1.51


def test_images_of_the_wanted_size_are_not_touched(make_split):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3))
    np.testing.assert_array_equal(next(decoder(make_split(pixels), CenterCrop(16))), pixels[[0, 3, 5]])


@pytest.mark.parametrize("shape", [(3, 250), (250, 3), (4, 301)])
def test_the_far_ends_of_a_very_long_image_change_nothing(make_split, shape):
    image = smooth_photograph(*shape, 0)
    square = next(decoder(make_split([image] * 6), CenterCrop(20)))[0]
    scaled = [20 * side // min(shape) for side in shape]
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    resized = F.interpolate(planes, scaled, mode="bilinear", antialias=True)[0]
    top, left = (round((side - 16) / 2) for side in scaled)
    expected = resized[:, top : top + 16, left : left + 16].permute(1, 2, 0)
    # The scale, a quotient of whole pixels, differs in its third digit.
    assert (torch.from_numpy(square).double() - expected).abs().max() < 3


def test_a_very_long_image_does_not_fill_the_memory(make_split):
    """Resized as a whole it would have 20 x 4,000,000 pixels."""
    image = np.arange(200_000)[None, :, None] // 1000 + np.zeros((1, 1, 3), np.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square = next(decoder(make_split([image] * 6), CenterCrop(20)))[0]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 100_000  # KiB
    assert set(square.ravel()) <= {99, 100}


def test_random_parts_depend_on_the_seed_and_on_nothing_else(photographs):
    def some(**options):
        return list(islice(decoder(photographs, RANDOM, **options), 3))

    np.testing.assert_array_equal(some(), some(threads=1))
    assert not np.array_equal(some()[0], some(seed=1)[0])
    assert not np.array_equal(some()[0], some()[2])


@pytest.mark.parametrize("taken_after", [1, 2, 5])
def test_a_checkpoint_is_of_the_batch_that_was_taken_however_many_are_begun(photographs, taken_after):
    original = decoder(photographs, RANDOM)
    batches = list(islice(original, 5 + BEGUN))
    checkpoints = [original.checkpoint_of_next() for _ in range(taken_after)]
    restored = decoder(photographs, RANDOM, checkpoint=checkpoints[-1], first=taken_after)
    for batch in batches[taken_after:]:
        np.testing.assert_array_equal(next(restored), batch)


@pytest.fixture
def three_threads():
    """The decoder's own have one each: it must give back what was set before it."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_the_process_keeps_its_threads_and_loses_the_decoder_s(photographs):
    before = set(threading.enumerate())

    def started() -> list[str]:
        names = (thread.name for thread in set(threading.enumerate()) - before)
        return [name for name in names if name.startswith("resample")]

    running = decoder(photographs, RANDOM)
    next(running)
    assert torch.get_num_threads() == 3
    assert len(started()) == 2
    del running
    for _ in range(100):
        gc.collect()  # DALI's pipelines refer to themselves
        if not started():
            break
        time.sleep(0.1)
    assert not started()


@pytest.mark.usefixtures("three_threads")
def test_new_threads_get_torch_s_usual_number(photographs):
    running = decoder(photographs, RANDOM)
    next(running)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [3]


def test_a_file_that_cannot_be_decoded_or_read_raises(photographs):
    path = photographs.root / photographs.paths[2]
    path.write_bytes(b"no image")
    with pytest.raises(RuntimeError):
        list(islice(decoder(photographs, RANDOM), 2))
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        list(islice(decoder(photographs, RANDOM), 2))
