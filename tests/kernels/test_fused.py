"""The fused kernels: their operators under torch's own checks, what they launch, and the order of the classes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.profiler import ProfilerActivity, profile

from kdav_fast import kdav_loss
from kdav_fast.kernels import triton_kdav
from kdav_fast.kernels.class_order import class_order
from kdav_fast.kernels.sorted_order import sorted_order
from kdav_fast.kernels.triton_kdav import Settings, fused_backward, fused_forward
from kdav_fast.kernels.triton_order import order_on_gpu

from .inputs import DEVICE, make_inputs, values_and_gradient

both_posteriors = pytest.mark.parametrize("ids", [False, True], ids=["dense", "ids"])


def float32_inputs(*shape, **keywords):
    return make_inputs(*shape, dtype=torch.float32, device=DEVICE, **keywords)


def widened(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check_against_reference(inputs, *args, tolerance=1e-4, **keywords):
    truth = values_and_gradient(kdav_loss, widened(inputs), *args, impl="reference", **keywords)
    measured = values_and_gradient(kdav_loss, inputs, *args, impl="triton", **keywords)
    for a, b in zip(measured, truth, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0)


@pytest.mark.slow
@both_posteriors
def test_operators_pass_torchs_own_checks(ids):
    student, teacher, logits, memory, posterior = make_inputs(
        3, 6, 20, 4, ids=ids, dtype=torch.bfloat16, device=DEVICE
    )
    filled = torch.tensor(17, device=DEVICE)
    order = class_order(posterior, 4, filled) if ids else (None, None)
    numbers = Settings(10.0, 8.0, 2.0, 1e-8, 1.0, 0.5)
    student.requires_grad_()
    library.opcheck(fused_forward, (student, teacher, logits, memory, posterior, filled, *order, *numbers))
    student = student.detach()
    _, _, _, *saved = fused_forward(student, teacher, logits, memory, posterior, filled, *order, *numbers)
    grad = torch.ones(3, device=DEVICE)
    library.opcheck(
        fused_backward,
        (grad, student, memory, posterior, filled, *saved, *numbers[:3], *numbers[4:]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("tensor_filled", [False, True])
@both_posteriors
def test_torch_compile_takes_a_caller_whole(ids, tensor_filled, fresh_compiler):
    student, teacher, logits, memory, posterior = float32_inputs(3, 6, 20, 4, ids=ids)
    filled = torch.tensor(17, device=DEVICE) if tensor_filled else 17

    def step(weight, memory, posterior, filled):
        out = kdav_loss(student @ weight, teacher, logits, memory, posterior, filled, impl="triton")
        return out.loss * 2, out.membership_kl

    def gradient(function):
        weight = torch.eye(6, device=DEVICE).requires_grad_()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=False):
            loss, parts = function(weight, memory, posterior, filled)
        loss.backward()
        return loss.detach(), parts, weight.grad

    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for a, b in zip(gradient(compiled), gradient(step), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kappa", "given"), [(10.0, False), (100.0, True)])
@both_posteriors
def test_launches_are_those_that_the_documentation_counts(ids, kappa, given, monkeypatch):
    """docs/kernels.md: kernels and products of one loss, forward and backward."""
    launched = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    kernels = triton_kdav.kernels
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), name))
    student, *rest = float32_inputs(3, 6, 20, 4, ids=ids)
    order = class_order(rest[3], 4) if ids and given else None
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loss = kdav_loss(
            student.requires_grad_(), *rest, impl="triton", kappa_student=kappa, memory_order=order
        ).loss
        loss.backward()
    assert len(launched) == (5 if kappa <= 30 else 6) + 2 * (ids and not given)
    products = [event for event in profiler.events() if event.name in ("aten::mm", "aten::addmm")]
    assert len(products) == (2 if ids else 4)


def expected_order(ids, classes, filled):
    rows = [row for k in range(classes) for row in range(filled) if ids[row] == k]
    counts = [sum(ids[row] == k for row in range(filled)) for k in range(classes)]
    return rows, [sum(counts[:k]) for k in range(classes + 1)]


@pytest.mark.parametrize("sort", [class_order, order_on_gpu, sorted_order])
def test_class_order(sort):
    """Ids that are no class (-1, 6, 7) and rows beyond `filled` are in no segment; more rows than a program's."""

    @settings(deadline=None, max_examples=15, derandomize=True)
    @given(
        length=st.integers(1, 600), share=st.floats(0.0, 1.0), masked=st.booleans(), seed=st.integers(0, 99)
    )
    def agrees(length, share, masked, seed):
        ids = torch.randint(-1, 8, (length,), generator=torch.Generator().manual_seed(seed))
        filled = max(1, int(share * length)) if masked else length
        used = torch.tensor(filled, device=DEVICE) if masked else None
        found, begins = sort(ids.to(DEVICE), 6, used)
        rows, starts = expected_order(ids.tolist(), 6, filled)
        first = int(begins[0])
        assert (begins - first).tolist() == starts
        assert found[first : first + len(rows)].tolist() == rows

    agrees()


@both_posteriors
def test_an_order_that_is_given_changes_no_bit(ids):
    inputs = float32_inputs(4, 9, 50, 6, ids=ids)
    filled = torch.tensor(33, device=DEVICE)
    expected = values_and_gradient(kdav_loss, inputs, filled, impl="triton")
    if not ids:
        with pytest.raises(TypeError, match="memory_order is a ClassOrder.*class ids"):
            kdav_loss(*inputs, memory_order=class_order(inputs[4][:, 0].long(), 6))
        return
    order = class_order(inputs[4], 6, filled)
    got = values_and_gradient(kdav_loss, inputs, filled, impl="triton", memory_order=order)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(ValueError, match="memory_order.starts has shape .*must have 7 values"):
        kdav_loss(*inputs, impl="triton", memory_order=class_order(inputs[4], 9))


@pytest.mark.parametrize("shape", [(1, 123, 507, 3), (17, 252, 65, 130), (40, 5, 600, 2)], ids=str)
@both_posteriors
def test_odd_shapes(ids, shape):
    check_against_reference(float32_inputs(*shape, ids=ids), temperature=2.0)


@pytest.mark.parametrize("classes", [1, 4, 70])
def test_one_class_holds_every_row(classes):
    inputs = float32_inputs(5, 16, 300, classes, ids=True)
    inputs[4][:] = classes - 1
    check_against_reference(inputs)


def test_a_tiny_class_beside_a_large_one():
    """Its mass is 1e-8 of the other's: a difference of running sums would lose it."""
    student, teacher, logits, memory, _ = float32_inputs(3, 8, 300, 2, ids=True)
    student[:] = memory[0]
    memory[1:] = memory[0]
    memory[-1] = -memory[0]
    posterior = torch.zeros(300, dtype=torch.int64, device=DEVICE)
    posterior[-1] = 1
    inputs = [student, teacher, logits, memory, posterior]
    truth = kdav_loss(*widened(inputs), impl="reference", kappa_student=6.0, eps=1e-30)
    measured = kdav_loss(*inputs, impl="triton", kappa_student=6.0, eps=1e-30)
    torch.testing.assert_close(measured.prediction_kl.double(), truth.prediction_kl, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("filled", [1, 30])
@both_posteriors
def test_rows_beyond_filled_do_not_count(ids, filled):
    inputs = float32_inputs(4, 9, 50, 6, ids=ids)
    inputs[3][filled:] = 7.0  # longer than unit rows: they would win every maximum
    for kappa in (10.0, 100.0):
        for given_filled in (filled, torch.tensor(filled, device=DEVICE)):
            check_against_reference(inputs, given_filled, kappa_student=kappa)


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = make_inputs(5, 8, 70, 6, dtype=torch.bfloat16, device="cuda:1")
    torch.cuda.set_device(0)
    expected = values_and_gradient(kdav_loss, [t.to("cuda:0") for t in inputs], impl="triton")
    got = values_and_gradient(kdav_loss, inputs, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@both_posteriors
def test_a_cuda_graph_captures_forward_and_backward(ids):
    student, *rest = make_inputs(64, 32, 500, 20, ids=ids, dtype=torch.bfloat16, device="cuda")
    filled = torch.tensor(400, device="cuda")
    student.requires_grad_()

    def step():
        loss = kdav_loss(student, *rest, filled, impl="triton").loss
        return loss.detach(), *torch.autograd.grad(loss, student)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are compiled, and the library's workspace is made
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    filled.fill_(300)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)
