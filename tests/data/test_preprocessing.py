"""Pixels: crops and flips against doing them by hand, and DALI against torchvision."""

import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from scipy.stats import ks_2samp

from kdav_fast.config import DataConfig
from kdav_fast.data.dali import DaliLoader
from kdav_fast.data.dali_draws import OwnDraws
from kdav_fast.data.dali_graph import decode_and_crop
from kdav_fast.data.image_set import PixelImages
from kdav_fast.data.preprocessing import (
    CenterCrop,
    PaddedCrop,
    RandomResizedCrop,
    evaluation_preprocessing,
    training_preprocessing,
)
from kdav_fast.data.sources.folder import ImageFolder
from kdav_fast.data.torchvision_loader import TorchvisionLoader
from tests.data.pictures import copies_of, pixels_of, smooth_photograph

PHOTOGRAPHS = Path(__file__).parents[3] / "shared/data/imagenet-sample-120.tar"


def test_padded_crop_is_a_shift_with_black_moving_in(make_loader, make_split):
    image = np.random.default_rng(0).integers(50, 200, (8, 8, 3))
    image[4, 3] = 255  # the marker
    folder = copies_of(make_split([image]), 128)
    shifts = set()
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    for pixels in pixels_of(make_loader(folder, batch_size=32, crop=PaddedCrop(2))):
        pixels = pixels.permute(1, 2, 0).round().int().numpy()
        ((y, x),) = np.argwhere((pixels == 255).all(axis=-1))
        down, right = int(y) - 4, int(x) - 3
        np.testing.assert_array_equal(pixels, padded[2 - down : 10 - down, 2 - right : 10 - right])
        shifts.add((down, right))
    assert {down for down, _ in shifts} == {right for _, right in shifts} == {-2, -1, 0, 1, 2}
    assert len(shifts) > 20


def test_padding_is_black_before_normalisation(loader_class, make_loader, make_split):
    loader = make_loader(copies_of(make_split([np.full((8, 8), 255)]), 64), crop=PaddedCrop(2))
    normalization = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    loader.preprocessing = training_preprocessing(
        DataConfig(image_size=8, crop="padded", crop_padding=2, flip=False), normalization
    )
    values = torch.cat([batch.images for batch in loader])
    torch.testing.assert_close(torch.tensor([-2.0, 2.0]), values.unique())


def test_flip_mirrors_about_half_of_the_images(make_loader, make_split):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    folder = copies_of(make_split([image]), 128)
    expected = torch.from_numpy(image).permute(2, 0, 1).int()
    pixels = pixels_of(make_loader(folder, batch_size=32, preprocessing={"flip": True})).round().int()
    mirrored = [bool((one == expected.flip(2)).all()) for one in pixels]
    assert all(
        (one == (expected.flip(2) if flip else expected)).all()
        for one, flip in zip(pixels, mirrored, strict=True)
    )
    assert 40 < sum(mirrored) < 88  # 64 +- 4.2 standard deviations


def coordinate_image(height, width) -> np.ndarray:
    """Red is x and green is y, so that the corners of an output tell where it was taken."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], axis=-1)


def crop_shapes(pixels, source_height, source_width):
    """Share of the area and width / height of crops of a coordinate image."""
    # The slope over the middle, since antialiasing bends the ends.
    width = (pixels[:, 0, 16, 27] - pixels[:, 0, 16, 4]) * 32 / 23
    height = (pixels[:, 1, 27, 16] - pixels[:, 1, 4, 16]) * 32 / 23
    return width * height / (source_height * source_width), width / height


def test_random_resized_crop_keeps_to_area_and_aspect_ratio(make_loader, make_split):
    folder = copies_of(make_split([coordinate_image(128, 128)]), 128)
    crop = RandomResizedCrop((0.2, 0.6), (0.5, 2.0))
    pixels = pixels_of(make_loader(folder, size=32, batch_size=32, crop=crop))
    assert pixels[:, 2].max() == 0
    area, ratio = crop_shapes(pixels, 128, 128)
    assert 0.18 < area.min() < 0.28
    assert 0.5 < area.max() < 0.64
    assert ratio.min() > 0.46
    assert ratio.max() < 2.2
    assert ratio.log().std() > 0.2
    assert pixels[:, 0].amin((1, 2)).std() > 5


@pytest.mark.parametrize("in_memory", [False, True])
def test_dali_draws_crops_from_torchvision_s_distribution(make_split, make_loader, in_memory):
    """Kolmogorov-Smirnov, 1,024 crops each, of an oblong image that not every crop fits into."""
    height, width, count = 96, 200, 1024
    images = copies_of(make_split([coordinate_image(height, width)]), count)
    if in_memory:
        pixels = torch.from_numpy(coordinate_image(height, width).astype(np.uint8)).expand(count, -1, -1, -1)
        images = PixelImages(images.root, images.split, images.classes, images.labels, pixels)
    crop = RandomResizedCrop((0.08, 1.0), (0.75, 4 / 3))
    found = []
    for loader_class in (DaliLoader, TorchvisionLoader):
        loader = make_loader(images, loader_class=loader_class, size=32, batch_size=128, crop=crop)
        pixels = pixels_of(loader)
        area, ratio = crop_shapes(pixels, height, width)
        found.append([area, ratio, pixels[:, 0].mean((1, 2)), pixels[:, 1].mean((1, 2))])
    for dali, reference in zip(*found, strict=True):
        assert ks_2samp(dali, reference).pvalue > 0.001
        # The test sees differences: a shift of a quarter of the spread.
        assert ks_2samp(dali + 0.25 * reference.std(), reference).pvalue < 0.001


@pytest.mark.parametrize(
    ("size", "crop"), [(32, CenterCrop(37)), (32, CenterCrop(32)), (48, CenterCrop(64)), (32, PaddedCrop(4))]
)
def test_dali_equals_torchvision_on_smooth_photographs(make_split, make_loader, size, crop):
    shapes = [(60, 80), (81, 60), (61, 61), (33, 47), (200, 90), (20, 31), (32, 32)]
    images = [smooth_photograph(*shape, seed) for seed, shape in enumerate(shapes)]
    for suffix in ("jpg", "png"):
        folder = make_split(images, suffix=suffix)
        if isinstance(crop, PaddedCrop):  # shifts differ: compare the image before it is shifted
            crop = CenterCrop(size)
        assert_near(folder, make_loader, size, crop)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> ImageFolder:
    """The first 48 of the ImageNet photographs: colour and grey, from 100 to 2,000 pixels wide."""
    if not PHOTOGRAPHS.exists():
        pytest.skip("no sample of ImageNet beside the repository")
    root = tmp_path_factory.mktemp("photographs")
    paths = []
    with tarfile.open(PHOTOGRAPHS) as archive:
        for member in [member for member in archive if member.isfile()][:48]:
            paths.append(Path(member.name).name)
            (root / paths[-1]).write_bytes(archive.extractfile(member).read())
    return ImageFolder(root, ".", ("x",), np.zeros(len(paths), np.int64), tuple(paths))


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (224, 224), (32, 32), (64, 72)])
def test_dali_equals_torchvision_on_photographs(photographs, make_loader, size, resize):
    assert_near(photographs, make_loader, size, CenterCrop(resize), mean=0.01)


def assert_near(folder, make_loader, size, crop, mean=0.05):
    """Files on the CPU: both resample alike, but round here and there to the other side."""
    dali, reference = (
        pixels_of(make_loader(folder, loader_class=loader_class, size=size, crop=crop, batch_size=16))
        for loader_class in (DaliLoader, TorchvisionLoader)
    )
    difference = (dali - reference).abs()
    assert difference.mean() < mean
    assert difference.max() < 2.01


def assert_near_inside(dali, reference):
    """DALI's own resampling, of pixels in memory and on a GPU, rounds after each pass as Pillow does.

    In the outermost pixels of a shrunk image Pillow cuts the filter off and DALI repeats the edge (up to 28
    levels were measured on 120 ImageNet photographs, shrunk to 32 pixels).
    """
    difference = (dali - reference).abs()
    assert difference.max() < 30
    difference = difference[..., 1:-1, 1:-1]
    assert difference.mean() < 0.25
    assert difference.max() < 1.01


@pytest.mark.parametrize("crop", [CenterCrop(32), CenterCrop(37)])
def test_pixels_in_memory_are_resampled_alike(make_split, make_loader, crop):
    folder = make_split([smooth_photograph(60, 80, seed) for seed in range(6)])
    pixels = torch.from_numpy(np.stack([smooth_photograph(60, 80, seed) for seed in range(6)]))
    images = PixelImages(folder.root, folder.split, folder.classes, folder.labels, pixels)
    dali, reference = (
        pixels_of(make_loader(images, loader_class=loader_class, size=32, crop=crop))
        for loader_class in (DaliLoader, TorchvisionLoader)
    )
    assert_near_inside(dali, reference)


@pytest.mark.parametrize("crop", [CenterCrop(32), CenterCrop(40), RandomResizedCrop((1.0, 1.0), (1.0, 1.0))])
def test_the_gpu_s_graph_resamples_alike(make_split, make_loader, crop):
    """The graph that decodes on a GPU, run with DALI's CPU operators. A random crop of everything is fixed."""
    folder = make_split([smooth_photograph(64, 64, seed) for seed in range(4)], suffix="png")

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def graph():
        encoded = fn.external_source(lambda: [folder.read(i) for i in range(4)], dtype=types.UINT8)
        return decode_and_crop(encoded, crop, 32, OwnDraws(), "cpu")

    pipeline = graph()
    pipeline.build()
    dali = torch.from_dlpack(pipeline.run()[0].as_tensor()).permute(0, 3, 1, 2).float()
    reference = pixels_of(make_loader(folder, loader_class=TorchvisionLoader, size=32, crop=crop))
    assert_near_inside(dali, reference)


def test_every_kind_of_image_is_decoded_alike(tmp_path, save_image, make_loader):
    pixels = smooth_photograph(40, 50, 0)
    colour = Image.fromarray(pixels)
    with_alpha = colour.copy()
    with_alpha.putalpha(Image.fromarray(pixels[..., 0]))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    variants = {
        "cmyk.jpg": colour.convert("CMYK"),
        "grey.JPG": colour.convert("L"),
        "palette.png": colour.convert("P"),
        "alpha.png": with_alpha,
        "bits.png": colour.convert("1"),
        "a.bmp": colour,
        "a.ppm": colour,
        "a.tif": colour,
        "a.webp": colour,
        "alpha.webp": with_alpha,
    }
    for name, image in variants.items():
        image.save(tmp_path / name)
    colour.save(tmp_path / "rotated.jpg", exif=rotated)
    paths = (*variants, "rotated.jpg")
    folder = ImageFolder(tmp_path, ".", ("x",), np.zeros(len(paths), np.int64), paths)
    assert_near(folder, make_loader, 32, CenterCrop(36))


NORMALIZATION = SimpleNamespace(mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("config", "train_crop", "evaluation_crop"),
    [
        ({}, RandomResizedCrop((0.08, 1.0), (0.75, 4 / 3)), CenterCrop(256)),
        ({"image_size": 32, "crop": "padded", "crop_padding": 3}, PaddedCrop(3), CenterCrop(32)),
        ({"image_size": 32, "crop": "none", "eval_resize": 40}, CenterCrop(32), CenterCrop(40)),
    ],
)
def test_preprocessing_follows_the_config(config, train_crop, evaluation_crop):
    config = DataConfig(**config)
    train = training_preprocessing(config, NORMALIZATION)
    evaluation = evaluation_preprocessing(config, NORMALIZATION)
    assert (train.crop, train.flip) == (train_crop, True)
    assert (evaluation.crop, evaluation.flip) == (evaluation_crop, False)
    assert train.size == evaluation.size == config.image_size
    assert train.mean == evaluation.mean == (0.1, 0.2, 0.3)
