"""How a run is set up."""

import pytest
import torch

from kdav_fast.runtime.processes import start_cluster
from kdav_fast.train.setup import set_up


@pytest.mark.parametrize("wanted", [True, False])
def test_cudnn_tries_its_convolutions_unless_told_not_to(small_config, tmp_path, wanted):
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not wanted
    try:
        set_up(small_config(tmp_path / "run", train={"cudnn_benchmark": wanted}), start_cluster("cpu"))
        assert torch.backends.cudnn.benchmark is wanted
    finally:
        torch.backends.cudnn.benchmark = before
