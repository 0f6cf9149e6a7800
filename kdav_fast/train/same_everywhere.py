"""What each process finds for itself must be the same on all: hosts may have other files under the same paths."""

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from kdav_fast.data.fingerprint import Fingerprint, difference, fingerprint
from kdav_fast.data.image_set import ImageSet
from kdav_fast.errors import InputError
from kdav_fast.runtime.processes import Cluster


def same_images(cluster: Cluster, splits: Iterable[ImageSet]) -> Fingerprint:
    """What the first process finds in some splits, after one process of each host has looked.

    Raises:
        InputError: on all processes, if a host has other images under the same names.
    """
    splits = list(splits)
    mine = fingerprint(splits) if cluster.is_first or cluster.local_rank == 0 else None
    first = cluster.on_first(lambda: mine)
    found = None if cluster.is_first or mine is None else difference(first, mine)
    for name, different in zip(cluster.names, cluster.gather(found), strict=True):
        if different:
            raise InputError(
                f"{name} reads other images than {cluster.names[0]} (here and there): {different}; all hosts must have "
                "the same files in data.root"
            )
    return first


def require_same_network(
    cluster: Cluster, network: nn.Module, section: str, dtype: torch.dtype | None
) -> str:
    """The checksum of a network's weights, after all processes have compared theirs, and their precision.

    Args:
        cluster: the run's processes.
        network: with whole weights.
        section: of the config; the weights are those of its `checkpoint`, or what it has loaded or drawn.
        dtype: in which the network is to compute; None for float32.

    Raises:
        InputError: on all processes, if they differ.
    """
    checksum = digest(network)
    precision = str(dtype or torch.float32).removeprefix("torch.")
    cluster.agree(
        {
            f"the checksum of the {section}'s weights": checksum,
            f"the {section}'s precision": precision,
        }
    )
    return checksum


def digest(network: nn.Module) -> str:
    """A checksum of all weights and buffers that are saved, by name."""
    content = hashlib.blake2b(digest_size=8)
    for name, tensor in network.state_dict().items():
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
