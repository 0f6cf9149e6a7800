"""Every implementation against float64, beside plain torch in the same dtype, and their reruns to the bit."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdav_fast import kdav_loss
from kdav_fast.kernels.loss import KDAVResult

from .inputs import DEVICE, make_inputs, values_and_gradient

IMPLEMENTATIONS = ["chunked", "triton"]
# Beyond the error of plain torch: a share of the largest true magnitude, or of 1 where that is less.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
SHAPES = [
    (1, 3, 1, 2),
    (3, 20, 40, 600),
    (33, 300, 129, 7),
    (65, 37, 600, 11),
]  # batch, width, length, classes


def eager_loss(student, teacher, logits, memory, posterior, *, kappa=10.0, temperature=1.0, reduction="none"):
    """The objective in plain torch, every operation in the inputs' own dtype."""
    log_p = F.log_softmax(kappa * F.normalize(student, dim=1) @ memory.T, dim=1)
    log_q = F.log_softmax(kappa * F.normalize(teacher, dim=1) @ memory.T, dim=1)
    membership = (log_q.exp() * (log_q - log_p)).sum(1)
    if posterior.ndim == 1:
        posterior = F.one_hot(posterior, logits.shape[1]).to(memory.dtype)
    p_class = log_p.exp() @ posterior
    q_class = torch.softmax(logits / temperature, dim=1)
    prediction = torch.xlogy(q_class, q_class) - q_class * p_class.clamp(min=1e-8).log()
    prediction = temperature**2 * prediction.sum(1)
    return KDAVResult(membership + prediction, membership.detach(), prediction.detach())


def fused(impl):
    """`kdav_loss` by `impl`, with eager_loss's arguments and slices of a few rows."""

    def loss(*tensors, kappa=10.0, **keywords):
        bound = {"workspace_bytes": 16384} if impl == "chunked" else {}
        return kdav_loss(*tensors, kappa_student=kappa, kappa_teacher=kappa, impl=impl, **bound, **keywords)

    return loss


def largest_errors(measured, truth):
    return [(m - t).abs().max() / t.abs().max().clamp(min=1.0) for m, t in zip(measured, truth, strict=True)]


def widened(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check_rule(impl, tensors, **keywords):
    truth = values_and_gradient(eager_loss, widened(tensors), **keywords)
    eager = largest_errors(values_and_gradient(eager_loss, tensors, **keywords), truth)
    measured = largest_errors(values_and_gradient(fused(impl), tensors, **keywords), truth)
    for what, error, allowed in zip(("membership", "prediction", "gradient"), measured, eager, strict=True):
        # A torch result that is not finite allows no error beyond the tolerance.
        allowed = torch.nan_to_num(allowed, nan=0.0, posinf=0.0)
        assert error <= allowed + TOLERANCE[tensors[0].dtype], f"{what}: {error:.2e}, torch {allowed:.2e}"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ids", [False, True], ids=["dense", "ids"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_beside_torch_in_the_same_dtype(impl, dtype, ids, shape):
    check_rule(impl, make_inputs(*shape, ids=ids, dtype=dtype, device=DEVICE), temperature=2.0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kappa", [100.0, 200.0])
def test_concentrated_posteriors(impl, dtype, kappa):
    inputs = make_inputs(4, 16, 150, 5, dtype=dtype, device=DEVICE)
    # One row sits on a remembered instance: its probability is 1 to rounding, and every other underflows.
    inputs[0][0] = inputs[3][7] * 3.0
    check_rule(impl, inputs, kappa=kappa)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_two_runs_give_the_same_bits(impl):
    inputs = make_inputs(9, 40, 700, 20, dtype=torch.float32, device=DEVICE)
    first, second = (values_and_gradient(fused(impl), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ids", [False, True], ids=["dense", "ids"])
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "compile"])
def test_training_shape_on_a_gpu(impl, dtype, ids):
    check_rule(impl, make_inputs(256, 512, 16384, 1000, ids=ids, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_input_agrees_with_the_reference(impl):
    @settings(deadline=None, max_examples=12 if impl == "triton" else 60, derandomize=True)
    @given(
        batch=st.integers(1, 5),
        width=st.integers(1, 40),
        length=st.integers(1, 90),
        classes=st.integers(1, 20),
        ids=st.booleans(),
        share=st.floats(0.01, 1.0),
        kappas=st.tuples(st.sampled_from([0.1, 10.0, 100.0]), st.sampled_from([1.0, 200.0])),
        temperature=st.sampled_from([0.5, 1.0, 4.0]),
        weights=st.sampled_from([(1.0, 1.0), (0.0, 2.0), (0.5, 0.0), (0.0, 0.0)]),
        tensor_filled=st.booleans(),
        seed=st.integers(0, 100),
    )
    def agrees(batch, width, length, classes, ids, share, kappas, temperature, weights, tensor_filled, seed):
        inputs = make_inputs(
            batch, width, length, classes, ids=ids, seed=seed, dtype=torch.float32, device=DEVICE
        )
        filled = max(1, int(share * length))
        keywords = {
            "kappa_student": kappas[0],
            "kappa_teacher": kappas[1],
            "temperature": temperature,
            "weight_membership": weights[0],
            "weight_prediction": weights[1],
        }
        truth = values_and_gradient(kdav_loss, widened(inputs), filled, impl="reference", **keywords)
        if tensor_filled:
            filled = torch.tensor(filled, device=DEVICE)
        measured = values_and_gradient(kdav_loss, inputs, filled, impl=impl, **keywords)
        assert max(largest_errors(measured, truth)) < 1e-4

    agrees()
