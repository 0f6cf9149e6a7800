"""What loaders show of images with fixed views."""

import gc
from itertools import chain

import numpy as np
import pytest
import torch
from nvidia.dali.auto_aug import rand_augment, trivial_augment
from torch.nn.functional import interpolate

from kdav_fast.data.dali import DaliLoader
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
from kdav_fast.data.resident import ResidentImages
from kdav_fast.data.torchvision_loader import TorchvisionLoader
from kdav_fast.data.view_parameters import OPERATIONS, ViewParameters
from kdav_fast.data.views import ClassPairs, Rotations, Views
from kdav_fast.errors import InputError
from tests.data.batches import assert_equal
from tests.data.conftest import BLACK_TO_WHITE
from tests.data.pictures import smooth_photograph
from tests.data.test_read_ahead import slabs

COLOURS = {"flip": True, "augment": RandAugment(1, 9), "jitter": ColorJitter(0.4, 0.4, 0.4, 0.1)}
CROP = RandomResizedCrop((0.3, 1.0), (0.75, 4 / 3))


@pytest.fixture
def make_viewed(make_loader):
    """A shuffled loader of 8 x 8 images in `count` views."""

    def make(images, count=3, crop=CROP, preprocessing=COLOURS, views=None, **options):
        wanted = Preprocessing(8, crop, **(BLACK_TO_WHITE | preprocessing))
        return make_loader(
            images,
            crop=crop,
            preprocessing=preprocessing,
            views=views or DrawnViews(count, 1, wanted),
            **{"shuffle": True, **options},
        )

    return make


def rows_of(batch):
    """(image, view, pixels) of every row that is known to be of the batch's images."""
    views = batch.view.reshape(-1, len(batch.index))
    images = batch.images.unflatten(0, (-1, len(batch.index)))
    for shown, pixels in zip(views, images, strict=False):
        yield from zip(batch.index.tolist(), shown.tolist(), pixels, strict=True)


@pytest.mark.parametrize(
    ("as_source", "crop", "preprocessing"),
    [
        ("folder", CROP, COLOURS),
        ("resident", CROP, COLOURS),
        ("tar", PaddedCrop(2), {"flip": True, "augment": RandAugment(1, 9)}),
    ],
    indirect=["as_source"],
)
def test_a_view_is_the_same_pixels_however_it_is_loaded(
    make_viewed, noise_split, as_source, crop, preprocessing
):
    """In batches of other sizes and company, in other epochs, on other ranks, in other orders, beside other views."""
    images = as_source(noise_split)
    options = {"crop": crop, "preprocessing": preprocessing}
    loaders = [
        make_viewed(images, batch_size=4, seed=0, **options),
        make_viewed(images, batch_size=11, seed=9, order=Views(2), **options),
        make_viewed(images, batch_size=3, rank=1, world=2, workers=2, order=Rotations(2), **options),
    ]
    seen = {}
    for batch in chain.from_iterable([*loader, *loader, *loader] for loader in loaders):
        assert batch.view.dtype == torch.int64
        for image, view, pixels in rows_of(batch):
            assert torch.equal(seen.setdefault((image, view), pixels), pixels)
    assert len(seen) == 33
    # Noise cropped and coloured otherwise is never alike.
    assert len({pixels.numpy().tobytes() for pixels in seen.values()}) == 33


def test_every_view_is_shown_once_in_as_many_epochs(make_viewed, numbered_split):
    loader = make_viewed(numbered_split(9), count=3)
    for _ in range(2):
        epochs = [list(loader) for _ in range(3)]
        shown = [
            (image, view)
            for batch in chain.from_iterable(epochs)
            for image, view in zip(
                batch.index[batch.valid].tolist(), batch.view[batch.valid].tolist(), strict=True
            )
        ]
        assert sorted(shown) == [(image, view) for image in range(9) for view in range(3)]


def test_a_partner_is_in_a_view_of_its_own(make_viewed, numbered_split):
    loader = make_viewed(numbered_split(12), order=ClassPairs(), count=4)
    views = torch.cat([batch.view.reshape(2, -1) for batch in chain(loader, loader)], dim=1)
    assert (views[0] != views[1]).float().mean() > 0.4
    assert set(views.flatten().tolist()) == {0, 1, 2, 3}


def test_without_fixed_views_a_batch_names_none(make_loader, numbered_split):
    assert next(iter(make_loader(numbered_split(4)))).view is None


@pytest.mark.parametrize("as_source", ["folder", "resident"], indirect=True)
def test_restore_is_exact_and_the_position_is_the_whole_state(
    make_viewed, noise_split, as_source, through_json
):
    images = as_source(noise_split)
    loader = make_viewed(images, order=ClassPairs())
    for _ in range(2):
        next(iter(loader))
    state = through_json(loader.state_dict())
    assert not {"pipeline", "decoder"} & set(state)
    restored = make_viewed(images, order=ClassPairs())
    restored.load_state_dict(state)
    ours, theirs = [*restored, *restored], [*loader, *loader]
    assert_equal(ours, theirs)
    assert all(torch.equal(one.view, other.view) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("saved", "here"), [(3, 4), (3, None), (None, 3)])
def test_a_state_of_other_views_is_refused(make_viewed, make_loader, numbered_split, saved, here):
    def make(count):
        plain = {"crop": CROP, "preprocessing": COLOURS, "shuffle": True}
        images = numbered_split(5)
        return make_viewed(images, count) if count else make_loader(images, **plain)

    with pytest.raises(InputError, match=f"is of views {saved}, but this run has views {here}"):
        make(here).load_state_dict(make(saved).state_dict())


class Stored:
    """Views whose parameters are known: a row an image, in one view."""

    count, needs_sizes = 1, False

    def __init__(self, **parameters):
        self._parameters = ViewParameters(**parameters)

    def parameters(self, images, views, sizes):
        return ViewParameters(*(one if one is None else one[images] for one in self._parameters))


BOXES = np.array([[3, 2, 11, 12], [0, 0, 24, 20], [10, 15, 8, 5], [0, 7, 20, 9], [23, 19, 1, 1]])


@pytest.mark.parametrize("resident", [False, True])
def test_a_stored_box_is_cut_out_resized_and_mirrored(make_split, make_loader, loader_class, resident):
    """Against float64 on the decoded image. No size is asked for."""
    pictures = [smooth_photograph(20, 24, seed) for seed in range(5)]
    images = make_split(pictures)
    if resident:
        pixels = torch.from_numpy(np.stack(pictures))
        images = ResidentImages(images.root, "train", images.classes, images.labels, pixels, images)
    flips = np.array([True, False, True, False, True])
    views = Stored(boxes=(BOXES / [24, 20, 24, 20]).astype(np.float32), flips=flips)
    (batch,) = make_loader(images, crop=CROP, preprocessing={"flip": True}, views=views, batch_size=5)
    for found, picture, (x, y, width, height), flip in zip(batch.images, pictures, BOXES, flips, strict=True):
        part = torch.from_numpy(picture)[y : y + height, x : x + width].permute(2, 0, 1)[None].double()
        expected = interpolate(part, [8, 8], mode="bilinear", antialias=True)[0]
        wrong = (found.double() * 255 - (expected.flip(2) if flip else expected)).abs()
        # Bytes are rounded after each of two passes. DALI's own resampling, of pixels in memory, repeats the edge.
        by_dali = resident and loader_class is DaliLoader
        assert (wrong[:, 1:-1, 1:-1] if by_dali else wrong).max() < 1.51
        assert wrong.max() < 30


def test_a_shift_lets_black_in_where_it_says(make_split, make_loader, as_source):
    picture = np.random.default_rng(0).integers(1, 256, (8, 8, 3))
    shifts = np.array([[-2, 1], [0, 0], [2, -1], [1, 2]], np.int16)
    views = Stored(shifts=shifts)
    images = as_source(make_split([picture] * 4))
    (batch,) = make_loader(images, crop=PaddedCrop(2), views=views)
    padded = np.pad(picture, ((2, 2), (2, 2), (0, 0)))
    for found, (down, right) in zip(batch.images, shifts, strict=True):
        expected = padded[2 + down : 10 + down, 2 + right : 10 + right]
        assert (np.rint(found.permute(1, 2, 0).numpy() * 255) == expected).all()


def of_both_loaders(make_loader, images, preprocessing, views) -> list[torch.Tensor]:
    """DALI's pixels and torchvision's, 0..255."""
    loaders = (
        make_loader(
            images,
            loader_class=loader_class,
            size=48,
            batch_size=len(images),
            preprocessing=preprocessing,
            views=views,
        )
        for loader_class in (DaliLoader, TorchvisionLoader)
    )
    return [next(iter(loader)).images * 255 for loader in loaders]


@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
@pytest.mark.parametrize("augment", [RandAugment(2, 9), TrivialAugment()])
def test_operations_are_torchvision_s(make_split, make_loader, augment):
    """Each, in either direction; the second of two leaves the image as it is."""
    picture = smooth_photograph(48, 48, 4)
    shape = (2 * len(OPERATIONS), augment.operations)
    operations = np.full(shape, OPERATIONS.index("identity"))
    operations[:, 0] = np.arange(len(operations)) // 2
    views = Stored(
        operations=operations.astype(np.uint8),
        magnitudes=np.full(shape, 12, np.uint8),
        negated=np.broadcast_to(np.arange(len(operations))[:, None] % 2 == 1, shape),
    )
    images = make_split([picture] * len(operations))
    dali, reference = of_both_loaders(make_loader, images, {"augment": augment}, views)
    apart = (dali - reference).abs().mean((1, 2, 3)).reshape(-1, 2)
    changed = (reference - torch.from_numpy(picture).permute(2, 0, 1)).abs().mean((1, 2, 3)).reshape(-1, 2)
    for name, difference, change in zip(OPERATIONS, apart, changed, strict=True):
        if name == "equalize":
            continue  # DALI's is OpenCV's, which spreads values otherwise than Pillow's
        # Roundings; lines that are sheared by half a pixel go to either side.
        allowed = 0.1 * change if name.startswith("shear") else torch.tensor(0.9)
        assert (difference < allowed).all(), name
        assert name == "identity" or (change > 1).all(), name


@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
def test_colours_are_torchvision_s(make_split, make_loader):
    picture = smooth_photograph(48, 48, 3) // 3 + 60
    strengths = {"brightness": 1.3, "contrast": 0.6, "saturation": 1.5, "hue": 0.05}
    factors = {
        name: np.where(np.arange(4) == row, strength, float(name != "hue")).astype(np.float32)
        for row, (name, strength) in enumerate(strengths.items())
    }
    jitter = {"jitter": ColorJitter(0.5, 0.5, 0.5, 0.1)}
    dali, reference = of_both_loaders(make_loader, make_split([picture] * 4), jitter, Stored(**factors))
    apart = (dali - reference).abs().mean((1, 2, 3))
    changed = (reference - torch.from_numpy(picture).permute(2, 0, 1)).abs().mean((1, 2, 3))
    # Hue is turned in YIQ there and in HSV here, alike for small turns; DALI's are smaller.
    assert (apart[:3] < 1).all()
    assert apart[3] < 6
    assert (changed > 4).all()


def test_operations_are_numbered_as_dali_does():
    suites = (
        rand_augment.get_rand_augment_suite(use_shape=True),
        trivial_augment.get_trivial_augment_wide_suite(max_translate_abs=32),
    )
    for suite in suites:
        assert tuple(operation.name for operation in suite) == OPERATIONS


@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
@pytest.mark.parametrize(("crop", "flip"), [(CenterCrop(8), False), (CROP, False), (CenterCrop(8), True)])
def test_nothing_is_kept_of_views_that_have_been_shown(make_viewed, numbered_split, crop, flip):
    """Where one of two pipelines, or both, take nothing of a view."""
    loader = make_viewed(numbered_split(4), crop=crop, preprocessing={"flip": flip}, batch_size=2)
    alive = []
    for _ in range(30):
        list(loader)
        alive.append(sum(isinstance(one, ViewParameters) for one in gc.get_objects()))
    assert max(alive[10:]) <= max(alive[:10])


@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
def test_files_take_no_more_memory_than_without_fixed_views(make_viewed, make_loader, make_split):
    images = make_split([np.full((9, 9), i) for i in range(16)])

    def pieces(make, **options) -> int:
        gc.collect()  # DALI's pipelines refer to themselves
        loader = make(images, preprocessing={"flip": True}, **options)
        for _ in range(3):
            list(loader)
        return slabs()

    assert pieces(make_viewed) <= pieces(make_loader, crop=CROP, shuffle=True)


@pytest.mark.gpu
@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
@pytest.mark.parametrize("resident", [False, True])
def test_views_reach_the_gpu(make_loader, make_split, decode, resident):
    """The same as on the CPU, up to the decoders' and the resampling's roundings."""
    pictures = [smooth_photograph(40, 40, seed) for seed in range(6)]
    images = on_gpu = make_split(pictures)
    if resident:
        pixels = torch.from_numpy(np.stack(pictures))
        images, on_gpu = (
            ResidentImages(images.root, "train", images.classes, images.labels, pixels.to(device), images)
            for device in ("cpu", "cuda")
        )
    preprocessing = Preprocessing(32, CROP, **(BLACK_TO_WHITE | COLOURS))
    options = {
        "size": 32,
        "crop": CROP,
        "preprocessing": COLOURS,
        "views": DrawnViews(3, 1, preprocessing),
    }
    (there,) = make_loader(on_gpu, decode=decode, device=torch.device("cuda"), batch_size=6, **options)
    (here,) = make_loader(images, batch_size=6, **options)
    assert there.view.is_cuda
    assert torch.equal(there.view.cpu(), here.view)
    assert (there.images.cpu() - here.images).abs().mean((1, 2, 3)).median() < 4 / 255
