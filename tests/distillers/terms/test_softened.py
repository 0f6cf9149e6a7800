"""Logit standardisation against the authors' code and the paper's algorithm, and at its edges."""

import pytest
import torch

from kdav_fast.config.loading import load_config
from kdav_fast.distillers.terms.softened import standardized
from kdav_fast.errors import InputError
from tests.distillers.golden import Golden, golden_cases


@pytest.mark.parametrize("case", golden_cases("LSKD"))
def test_standardised_logits_are_the_authors(case, agrees):
    golden = Golden(case)
    for who in ("student", "teacher"):
        agrees(standardized(golden[f"{who}_logits"], sample=True), golden[f"{who}_standardised"])


@pytest.mark.parametrize("sample", [False, True])
def test_mean_0_and_deviation_1_whatever_scale_and_shift(sample):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    found = standardized(logits, sample)
    torch.testing.assert_close(found.mean(1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.std(1, correction=int(sample)), torch.ones(5))
    torch.testing.assert_close(standardized(3 * logits + 5, sample), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_logits_have_a_gradient(sample, dtype):
    logits = torch.full((2, 3), 4.0, dtype=dtype, requires_grad=True)
    found = standardized(logits, sample)
    found[:, 0].sum().backward()
    assert not found.any()
    assert logits.grad.isfinite().all()


def test_a_deviation_of_nothing_is_refused():
    keys = ["distiller.name=kd", "teacher.name=cifar:resnet8", "distiller.sample_deviation=true"]
    with pytest.raises(InputError, match="is off; set distiller.standardize_logits=true, or leave it false"):
        load_config(None, keys)
    load_config(None, [*keys, "distiller.standardize_logits=true"])


def test_simkd_without_its_kl_has_nothing_to_standardise():
    keys = ["distiller.name=simkd", "teacher.name=cifar:resnet8", "distiller.standardize_logits=true"]
    with pytest.raises(InputError, match="is of the KL term, which distiller.weight_kl leaves out"):
        load_config(None, keys)
    load_config(None, [*keys, "distiller.weight_kl=1"])
