"""The cost model's counts against numbers taken by hand, and what any such model must obey."""

import itertools

import pytest

from kdav_fast.kernels import cost

A_IDS, A_DENSE = cost.SHAPES["A ids"], cost.SHAPES["A dense"]


def passes(name, shape):
    return {one.name: one for one in cost.IMPLEMENTATIONS[name](shape)}


def test_counts_of_the_old_fused_kernels_at_shape_a():
    """g = 2 x 256 x 512 x 16384 = 4.29 GFLOP; 4 tiles of 64 rows, 128 of 128 items, 512 of 32."""
    found = passes("triton 64559d1", A_IDS)
    g = 4_294_967_296
    assert found["membership"].flops == 2 * g
    assert found["membership"].l2 == 4 * 128 * (64 + 64 + 128) * 1024
    # Two tiles of 512 classes: the similarities of each again, and a product with 1024 columns of ones and zeros.
    assert found["classes"].flops == 2 * g + 2 * 256 * 16384 * 1024
    assert found["classes"].l2 == 4 * 2 * 512 * (64 + 32) * 1024
    assert found["gradient"].flops == 3 * g
    assert found["gradient"].l2 == 4 * 512 * ((64 + 64 + 32 + 32) * 1024 + 64 * 32 * 32)


def test_a_product_by_hand():
    # 512 x 16384 by tiles of 128 x 256: 4 x 64 = 256 on 132 multiprocessors, two waves.
    one = cost.product("similarity", 512, 16384, 512)
    assert one.flops == 2 * 512 * 16384 * 512
    assert one.slots == 2 * 132 * 2 * 128 * 256 * 512
    assert one.l2 == (512 + 16384) * 1024 + 512 * 16384 * 2
    assert one.hbm == one.l2  # 34 MB are over half of L2
    assert cost.product("similarity", 512, 8192, 512).hbm == 0
    assert one.device_time(cost.Machine(launch=1.0)) == pytest.approx(one.slots / 790e6 + 1.0)
    assert one.device_time(cost.Machine(launch=1.0, l2=1e12)) == pytest.approx(one.l2 / 1e6 + 1.0)


@pytest.mark.parametrize("name", cost.IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", cost.SHAPES.values(), ids=cost.SHAPES)
def test_what_every_prediction_obeys(name, shape):
    one = cost.predict(name, shape)
    assert one.total == max(one.device, one.host)
    assert one.device > 1e6 * one.flops / cost.H200.flops
    twice = cost.predict(name, shape._replace(length=2 * shape.length))
    # A last slice counts as a whole one.
    assert twice.flops == pytest.approx(2 * one.flops, rel=0.15 if "chunked" in name else 1e-6)
    assert twice.device > 1.3 * one.device
    slower = cost.Machine(launch=10.0, torch_host=20.0)
    assert cost.predict(name, shape, slower).device > one.device
    assert cost.predict(name, shape, slower).host > one.host


def test_the_table_has_every_implementation_at_every_shape(capsys):
    assert len(cost.table()) == len(cost.SHAPES) * len(cost.IMPLEMENTATIONS)
    cost.show()
    printed = capsys.readouterr().out
    assert "PREDICTED" in printed
    assert "not measured" in printed
    assert "flops 7.9e+14" in printed


def test_a_product_that_is_split():
    # 256 x 512 by 128 x 128: 8 tiles of a depth of 16384, split in 16 parts of 1024, added in float32. (4 tiles of
    # 128 x 256 in 32 parts would write twice as many sums.)
    one = cost.product("gradient", 256, 512, 16384, out=4)
    assert one.slots == 132 * 2 * 128 * 128 * 1024 / 0.85
    assert one.l2 == 16384 * (256 + 512) * 2 + 256 * 512 * 4 + 2 * 4 * 256 * 512 * 16


def test_launches_of_chunked_are_those_that_are_tested():
    """8 a slice and 4 for all slices, as test_chunked.py counts them; `kdav_loss` and its mean take 10."""
    for shape in ("Bshape ids", "Bshape dense"):
        assert cost.predict("chunked", cost.SHAPES[shape]).launches == 16 * 8 + 4 + 10


def test_kernels_that_never_write_similarities_win_nowhere():
    """Why they are gone: at no width, length or number of classes were they ahead of both that stayed."""
    for batch, width, length, classes, ids in itertools.product(
        (64, 256, 1024), (16, 64, 256, 512, 2048), (2**10, 2**14, 2**18, 2**22), (10, 1000), (False, True)
    ):
        shape = cost.Shape(batch, width, length, classes, ids)
        before, fused, chunked = (
            cost.predict(name, shape).device for name in ("triton 64559d1", "triton", "chunked")
        )
        assert before > min(fused, chunked)
