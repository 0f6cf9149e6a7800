"""Random numbers by image and step: their distribution, and on what they depend."""

import torch

from kdav_fast.distillers.terms.noise import normal_rows, whole_rows

INDEX = torch.arange(1000)


def test_they_are_standard_normal_and_no_two_go_together():
    first = normal_rows(INDEX, 0, 3, 0, (2, 50)).flatten(1)
    shares = [(first.abs() < bound).double().mean().item() for bound in (0.5, 1.0, 2.0, 3.0)]
    expected = [torch.erf(torch.tensor(bound / 2**0.5)).item() for bound in (0.5, 1.0, 2.0, 3.0)]
    # Of 100,000 numbers: five standard deviations.
    torch.testing.assert_close(torch.tensor(shares), torch.tensor(expected), rtol=0, atol=5 * 0.5 / 316)
    assert abs(first.mean()) < 5 / 316
    others = (
        first.roll(1, 0),
        first.roll(1, 1),
        normal_rows(INDEX, 0, 4, 0, (100,)),
        normal_rows(INDEX, 0, 3, 1, (100,)),
        normal_rows(INDEX, 1, 3, 0, (100,)),
        normal_rows(INDEX, 2**31 - 1, 3, 0, (100,)),
    )
    for other in others:
        assert abs((first * other).mean()) < 5 / 316


def test_they_depend_on_image_seed_step_and_stream_alone():
    whole = normal_rows(INDEX, 0, 7, 1, (3, 2))
    assert torch.equal(normal_rows(INDEX[[5, 900]], 0, 7, 1, (3, 2)), whole[[5, 900]])
    assert torch.equal(whole_rows(INDEX[[5, 900]], 0, 7, 1, 10), whole_rows(INDEX, 0, 7, 1, 10)[[5, 900]])


def test_whole_numbers_are_uniform():
    counts = whole_rows(torch.arange(100_000), 0, 1, 0, 10).bincount()
    assert len(counts) == 10
    assert (counts - 10_000).abs().max() < 5 * 95
