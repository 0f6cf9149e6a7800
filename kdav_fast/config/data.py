"""The data section."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kdav_fast.config.section import (
    Count,
    ExpandedPath,
    Fraction,
    Lenient,
    MayChange,
    NonNegative,
    OfMachine,
    Range,
    Section,
    Triple,
)

DOWNLOADABLE = ("cifar10", "cifar100", "stl10")
"""Published archives that `data.download` can fetch."""
OF_GPU_DECODER = ("hw_decoder_load", "fancy_upsampling")
"""Keys that mean something only where images are decoded on a GPU."""
PILLOW_MAX_PIXELS = 178_956_970
"""Pillow refuses to open larger images as decompression bombs."""
_MOST = {1: "no other view than itself", 2: "two views, as it is and mirrored"}
Strengths = Annotated[
    tuple[NonNegative, NonNegative, NonNegative, Annotated[float, Field(ge=0, le=0.5)]], Lenient
]


class DataConfig(Section):
    """Where the images come from and what is done to them."""

    name: Literal["digits", "folder", "webdataset", "cifar10", "cifar100", "stl10"] = "digits"
    """`digits`: scikit-learn's handwritten digits as PNG files; `folder`: a tree of class folders (ImageNet and
    Tiny-ImageNet as published are such trees); `webdataset`: tar shards; the others: published archives."""
    root: MayChange[ExpandedPath | None] = None
    """`folder`: holds `train/CLASS/*.jpg` and `val/` or `test/`. `webdataset`: holds the shards. Archives: the
    archive, the folder it was extracted to, or the folder that holds either. `digits`: the cache folder."""
    download: MayChange[bool] = False
    """Fetch the published archive into `root` if it is not there: `cifar10`, `cifar100` and `stl10`."""
    val_labels: ExpandedPath | None = None
    """`folder` with all evaluation images in one folder: the file that names each one's class. Default: the one
    that ImageNet's and Tiny-ImageNet's distributions bring along."""
    skip_list: ExpandedPath | None = None
    """Leave out the images that this file names, such as `kdav data check --quarantine` writes it."""
    max_pixels: Annotated[int, Field(ge=1, le=PILLOW_MAX_PIXELS)] = 100_000_000
    """Images with more pixels stop the run before it begins: decoding a few of them would fill the memory."""
    check: MayChange[Literal["decode", "ends"]] = "decode"
    """What is looked at before a run begins, and not again as long as no file changes: all pixels of every image, which
    finds damage that decoders pass over in silence, or only the ends and the header of each file."""
    train_subset: Count | None = None
    """Train on this many images, drawn once with the run's seed. Default: all."""

    loader: Literal["dali", "torchvision"] = "dali"
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """Where DALI decodes. `auto`: on the GPU if there is one."""
    hw_decoder_load: OfMachine[Fraction | None] = None
    """Decoding on a GPU: the share of a batch's JPEGs that goes to its hardware decoder, where it has one; the rest is
    decoded by its multiprocessors. Default: DALI's (0.65)."""
    fancy_upsampling: bool | None = None
    """Decoding on a GPU: interpolate a JPEG's colours between their pixels, as decoders on a CPU do. `false` repeats
    them, which takes less time and gives other pixels. Default: true."""
    resident: bool = False
    """Decode every image once, keep it as `image_size` x `image_size` bytes in the memory of the device, and augment
    from there. Crops are then taken from that square. For sets that fit, in each process."""
    workers: OfMachine[Annotated[int, Field(ge=1, le=1024)] | None] = None
    """Decoding threads or processes a rank. Default: the rank's share of the cores."""
    on_reshard: MayChange[Literal["refuse", "restart_epoch"]] = "refuse"
    """Continuing with another number of processes: an error, or the epoch from its beginning."""
    on_change: MayChange[Literal["refuse", "accept"]] = "refuse"
    """Continuing with files of the same names but other content than the run began with: an error, or accepted."""

    image_size: Annotated[int, Field(ge=8)] = 224
    """Side of the square that the networks see, in pixels."""
    crop: Literal["random_resized", "padded", "none"] = "random_resized"
    """Training crop: ImageNet's random area, CIFAR's shift by padding, or the whole image."""
    crop_area: Range = (0.08, 1.0)
    crop_aspect_ratio: Range = (0.75, 4 / 3)
    crop_padding: Count = 4
    """Pixels on each side for `crop: padded`."""
    flip: bool = True
    auto_augment: Literal["none", "rand_augment", "trivial_augment"] = "none"
    """RandAugment (arXiv 1909.13719) or TrivialAugment's wide space (arXiv 2103.10158)."""
    rand_augment_ops: Count = 2
    """Operations an image (n)."""
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Their strength (m), 0 to 30."""
    color_jitter: Strengths = (0.0, 0.0, 0.0, 0.0)
    """Strengths of random brightness, contrast, saturation (factors within 1 +- strength) and hue (turns, at most
    0.5). 0: off."""
    views: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Training: every image has this many fixed augmentations, which follow from the run's seed, and an epoch shows one
    of them, none twice before all were shown. With flips alone there are 2. Default: augmentation without end."""
    eval_resize: Count | None = None
    """Short side before the evaluation's centre crop. Default: image_size / 0.875 for
    `random_resized` training, image_size otherwise."""
    mean: Triple | None = None
    """RGB mean in 0..1. Default: what the model's weights expect, else ImageNet's."""
    std: Triple | None = None
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the normalised images. The half types go with `train.precision=bf16`."""
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """Memory order of the images and of the networks: NHWC or NCHW. On a CPU, convolutions that crash in NHWC compute
    in NCHW in any case."""

    @model_validator(mode="after")
    def _source(self) -> Self:
        if self.name != "digits" and self.root is None:
            raise ValueError(
                f"data.root is needed when data.name is '{self.name}': give the folder or archive that holds it"
            )
        if self.download and self.name not in DOWNLOADABLE:
            raise ValueError(
                f"data.download does not go with data.name '{self.name}'; only {', '.join(DOWNLOADABLE)} can be "
                "downloaded"
            )
        for key in OF_GPU_DECODER:
            if getattr(self, key) is not None and self.name in DOWNLOADABLE:
                raise ValueError(
                    f"data.{key} is of JPEG files, but those of data.name '{self.name}' are none; drop it"
                )
        if self.val_labels is not None and self.name != "folder":
            raise ValueError(f"data.val_labels goes with data.name 'folder', not '{self.name}'; drop it")
        return self

    @model_validator(mode="after")
    def _view(self) -> Self:
        for key in ("crop_area", "crop_aspect_ratio"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"data.{key} is [{low}, {high}]; the first must not exceed the second")
        if self.crop_area[1] > 1:
            raise ValueError(
                f"data.crop_area is {list(self.crop_area)}; areas are fractions of the image, at most 1"
            )
        if self.views is not None and (most := self._most_views()) and self.views != most:
            raise ValueError(
                f"data.views is {self.views}; with data.crop 'none' and neither automatic augmentation nor colour "
                f"jitter an image has {_MOST[most]}; give {most}, drop data.views, or augment more"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std belong together; give both or neither")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"data.std is {list(self.std)}; every value must be above 0")
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(
                f"data.eval_resize is {self.eval_resize}; it must be at least data.image_size ({self.image_size})"
            )
        return self

    def _most_views(self) -> int | None:
        """How many views an image can have, where that is few."""
        if self.crop != "none" or self.auto_augment != "none" or any(self.color_jitter):
            return None
        return 2 if self.flip else 1
