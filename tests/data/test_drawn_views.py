"""The parameters of fixed views: against torchvision's own steps, and what they depend on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import _geometry

from kdav_fast.data.counter_random import keys, stream, uniform
from kdav_fast.data.drawn_views import DrawnViews
from kdav_fast.data.preprocessing import (
    CenterCrop,
    ColorJitter,
    PaddedCrop,
    Preprocessing,
    RandAugment,
    RandomResizedCrop,
    TrivialAugment,
)
from kdav_fast.data.view_parameters import parameters_of, pixel_boxes

GREY = ((0.5,) * 3, (0.25,) * 3)
WHOLE = CenterCrop(32)
IMAGENET = RandomResizedCrop((0.08, 1.0), (0.75, 4 / 3))


def drawn(crop=WHOLE, flip=True, augment=None, jitter=None, seed=0, count=10) -> DrawnViews:
    return DrawnViews(count, seed, Preprocessing(32, crop, flip, *GREY, augment, jitter))


def several(views: DrawnViews, rows=4000, size=(300, 400)):
    sizes = np.tile(np.array([size]), (rows, 1))
    return views.parameters(np.arange(rows), np.arange(rows) % views.count, sizes)


class _Uniform:
    """torch, as torchvision's crop draws from it, with the numbers given."""

    def __init__(self, numbers):
        self._attempts = iter(np.stack([numbers[:10], numbers[10:20]], axis=1).ravel())
        self._places = iter(numbers[20:22])

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, _):
        def uniform_(low, high):
            number = next(self._attempts)
            return torch.tensor(float(low) + (float(high) - float(low)) * number, dtype=torch.float64)

        return SimpleNamespace(uniform_=uniform_)

    def randint(self, low, high, size):
        return torch.tensor(int(next(self._places) * high))


@pytest.mark.parametrize("crop", [IMAGENET, RandomResizedCrop((0.5, 1.0), (0.9, 1.1))])
@pytest.mark.parametrize("size", [(300, 400), (375, 500), (7, 5), (3, 400), (400, 3), (1, 1)])
def test_random_parts_are_torchvision_s_for_the_same_numbers(monkeypatch, crop, size):
    """Long images too, where attempts fail and the middle is taken."""
    rows = np.arange(60)
    sizes = np.tile(np.array([size]), (len(rows), 1))
    parameters = drawn(crop, seed=5).parameters(rows, rows % 3, sizes)
    numbers = uniform(keys(stream(5, 2), rows, rows % 3), 22)
    transform = v2.RandomResizedCrop(32, crop.area, crop.aspect_ratio)
    transform._log_ratio = torch.log(torch.tensor(crop.aspect_ratio, dtype=torch.float64))
    image = torch.empty(3, *size)
    for row, box in zip(numbers, pixel_boxes(parameters.boxes, sizes).tolist(), strict=True):
        monkeypatch.setattr(_geometry, "torch", _Uniform(row))
        params = transform.make_params([image])
        top, left, height, width = (params[name] for name in ("top", "left", "height", "width"))
        assert box == [left, top, left + width, top + height]


def test_stored_boxes_are_whole_pixels_again():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 2**17, (20000, 2))
    ends = np.sort(random.integers(0, sizes[:, None, :] + 1, (20000, 2, 2)), axis=1)  # y, x of both corners
    (top, left), (bottom, right) = ends[:, 0].T, ends[:, 1].T
    height, width = sizes.T
    boxes = np.stack([left / width, top / height, (right - left) / width, (bottom - top) / height], axis=1)
    expected = np.stack([left, top, right, bottom], axis=1)
    assert (pixel_boxes(boxes.astype(np.float32), sizes) == expected).all()


EVERYTHING = {
    "crop": IMAGENET,
    "augment": RandAugment(2, 9),
    "jitter": ColorJitter(0.4, 0.3, 0.2, 0.1),
}


def test_a_view_is_the_same_in_whatever_company():
    views = drawn(**EVERYTHING)
    random = np.random.default_rng(0)
    images, numbers = random.integers(0, 1000, 50), random.integers(0, 10, 50)
    sizes = random.integers(10, 500, (50, 2))
    together = views.parameters(images, numbers, sizes)
    for row in range(50):
        alone = drawn(**EVERYTHING).parameters(*(one[row : row + 1] for one in (images, numbers, sizes)))
        for name in parameters_of(Preprocessing(32, IMAGENET, True, *GREY, *list(EVERYTHING.values())[1:])):
            assert (getattr(alone, name)[0] == getattr(together, name)[row]).all()


@pytest.mark.parametrize("change", ["image", "view", "seed"])
def test_another_image_view_or_seed_is_another_augmentation(change):
    images, sizes = np.arange(100), np.full((100, 2), 200)
    one = drawn(**EVERYTHING).parameters(images, images * 0, sizes)
    other = drawn(**EVERYTHING, seed=int(change == "seed")).parameters(
        images + 100 * (change == "image"), images * 0 + (change == "view"), sizes
    )
    assert (one.boxes != other.boxes).any(1).all()
    assert (one.brightness != other.brightness).all()
    assert 30 < (one.flips != other.flips).sum() < 70


def test_the_crop_is_the_same_with_and_without_what_follows():
    plain, all_of_it = several(drawn(IMAGENET)), several(drawn(**EVERYTHING))
    assert (plain.boxes == all_of_it.boxes).all()
    assert (plain.flips == all_of_it.flips).all()


def test_colours_and_shifts_are_uniform():
    parameters = several(drawn(PaddedCrop(4), jitter=ColorJitter(0.4, 1.5, 0.0, 0.1)))
    assert kstest(parameters.brightness, "uniform", (0.6, 0.8)).pvalue > 1e-3
    assert kstest(parameters.contrast, "uniform", (0, 2.5)).pvalue > 1e-3
    assert kstest(parameters.hue, "uniform", (-0.1, 0.2)).pvalue > 1e-3
    assert parameters.saturation is None
    cells = np.bincount(9 * (parameters.shifts[:, 0] + 4) + parameters.shifts[:, 1] + 4, minlength=81)
    assert len(cells) == 81
    assert abs(cells - 4000 / 81).max() < 5 * np.sqrt(4000 / 81)
    assert abs(parameters.flips.mean() - 0.5) < 0.04


@pytest.mark.parametrize(
    ("augment", "magnitudes"), [(RandAugment(2, 9), {9}), (TrivialAugment(), set(range(31)))]
)
def test_all_operations_and_magnitudes_are_drawn(augment, magnitudes):
    parameters = several(drawn(augment=augment))
    shape = (4000, augment.operations)
    assert parameters.operations.shape == parameters.magnitudes.shape == parameters.negated.shape == shape
    share = np.bincount(parameters.operations[:, -1], minlength=14) / 4000
    assert len(share) == 14
    assert abs(share - 1 / 14).max() < 5 * np.sqrt(1 / 14 / 4000)
    assert set(parameters.magnitudes.ravel().tolist()) == magnitudes
    assert abs(parameters.negated.mean() - 0.5) < 0.04


def test_with_flips_alone_there_are_the_image_and_its_mirror_image():
    parameters = drawn(count=2).parameters(np.array([3, 3, 9]), np.array([0, 1, 1]), None)
    assert parameters.flips.tolist() == [False, True, True]
    assert [name for name, value in parameters._asdict().items() if value is not None] == ["flips"]


def test_random_numbers_of_different_names_are_independent():
    numbers = uniform(keys(stream(0, 0), np.arange(3000), np.arange(3000) % 5), 12)
    assert kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    neighbours = [(numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])]
    for one, other in neighbours:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(one.size)
