"""Small caches of known answers: how the tests of them make, continue and damage them."""

import numpy as np
import torch

from kdav_fast.teachers.cache import CacheCard, Layout, Parameter, ShardDraft, prepare

FACTS = {"teacher": {"name": "cifar:resnet20", "sha256": "ab"}, "mean": [0.5, 0.5, 0.5], "seed": 1}
PARAMETERS = {"box": Parameter(dtype="fp32", width=4), "flip": Parameter(dtype="bool", width=1)}


def small_card(**changes):
    """Three shards: 3, 3 and 1 images, each in 2 views."""
    layout = {"images": 7, "views": 2, "classes": 5, "width": 3, "parameters": PARAMETERS, **changes}
    of_image = Layout(**layout).bytes_per_view * layout["views"]
    return CacheCard(layout=Layout(**layout, shard_bytes=3 * of_image), facts=FACTS)


class KnownAnswers:
    """What a teacher says to each view, and how each view is made: drawn once, by image and view."""

    def __init__(self, layout, seed=0):
        random = np.random.default_rng(seed)
        each = layout.images, layout.views
        self.features = torch.tensor(random.normal(0, 2, (*each, layout.width)), dtype=torch.float32)
        self.logits = torch.tensor(random.normal(0, 4, (*each, layout.classes)), dtype=torch.float32)
        self.parameters = {
            name: random.integers(0, 200, (*each, parameter.width)).astype(
                {"fp64": "f8", "fp32": "f4", "int32": "i4", "int16": "i2", "uint8": "u1", "bool": "?"}[
                    parameter.dtype
                ]
            )
            for name, parameter in layout.parameters.items()
        }

    def put(self, draft, index, view):
        parameters = {name: values[index, view] for name, values in self.parameters.items()}
        draft.put(index, view, self.features[index, view], self.logits[index, view], parameters)


def every_view(images, views):
    """Positions and views of all views of some images."""
    index, view = np.meshgrid(np.asarray(images), np.arange(views), indexing="ij")
    return index.ravel(), view.ravel()


def make(folder, card, shards=None, batch=4):
    """Make the shards that are missing or damaged, or those of them that are given; returns which were to be made."""
    known, found = KnownAnswers(card.layout), prepare(folder, card)
    for shard in found if shards is None else shards:
        draft = ShardDraft(folder, card, shard)
        index, view = every_view(draft.images, card.layout.views)
        for start in range(0, len(index), batch):
            known.put(draft, index[start : start + batch], view[start : start + batch])
        draft.write()
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
