"""Directions of rows, also of rows that have none."""

import torch

from kdav_fast.distillers.terms.unit import unit


def test_rows_have_length_1_and_zeros_neither_length_nor_gradient():
    rows = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1e-20, 0.0]], dtype=torch.float64, requires_grad=True)
    directions = unit(rows)
    assert directions.tolist() == [[0.6, -0.8], [0, 0], [1e-8, 0]]
    directions[:2].sum().backward()
    # Of (x + y) / |x|: (1, 1) / 5 less its share along the row.
    torch.testing.assert_close(rows.grad[0], torch.tensor([0.224, 0.168], dtype=torch.float64))
    assert rows.grad[1].tolist() == [0, 0]
