"""What a caller may have on around the loss: autocast, a graph of the gradient, torch.func, a memory that moves on."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from kdav_fast import EmbeddingHead, KDAVLoss, TeacherMemory, kdav_loss
from kdav_fast.distillers.simkd import feature_mse
from kdav_fast.distillers.terms.softened import soft_target_kl

from .golden import load_case
from .inputs import DEVICE, make_inputs, values_and_gradient
from .test_golden import relative_error

QUICK = ["auto", "reference", "chunked", "triton"]
COMPILE = pytest.param("compile", marks=pytest.mark.slow)  # seconds for every new shape
HALVES = [torch.bfloat16, torch.float16]


def float32_inputs(*shape, **keywords):
    return make_inputs(*shape, dtype=torch.float32, device=DEVICE, **keywords)


@pytest.mark.parametrize("where", ["both", "backward"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("impl", [*QUICK, COMPILE])
def test_a_callers_autocast_changes_nothing(impl, dtype, where):
    tensors, filled, settings, truth = load_case("case2", torch.float32)
    student, *rest = [tensor.to(DEVICE) for tensor in tensors]
    student.requires_grad_()
    with torch.autocast(DEVICE, dtype=dtype, enabled=where == "both"):
        out = KDAVLoss(**settings, impl=impl)(student, *rest, filled)
    with torch.autocast(DEVICE, dtype=dtype):
        out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert relative_error(out.loss.detach(), truth["loss"]) <= 1e-4
    assert relative_error(out.membership_kl, truth["membership_kl"]) <= 1e-4
    assert relative_error(out.prediction_kl, truth["prediction_kl"]) <= 1e-4
    assert relative_error(student.grad, truth["grad_student_embedding"]) <= 1e-4


def test_autocast_is_still_on_for_the_caller_afterwards():
    student, *rest = float32_inputs()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = kdav_loss(student.requires_grad_(), *rest, impl="chunked").loss
        assert (student @ student.T).dtype == torch.bfloat16
        loss.backward()
        assert (student @ student.T).dtype == torch.bfloat16


def test_memory_and_head_under_autocast():
    student, teacher, logits, _, _ = float32_inputs(20, 16, 40, 6)
    labels = logits.argmax(1)

    def everything():
        torch.manual_seed(0)
        memory, head = TeacherMemory(40, 16, 6, device=DEVICE), EmbeddingHead(9, 16, 6).to(DEVICE)
        memory.push(teacher, logits)
        head.observe(teacher, labels)
        head.set_center()
        folded = head.fold()
        z = student.clone().requires_grad_()
        scores = torch.stack([head.class_scores(z, 10.0), head.classify(z)])
        scores.square().sum().backward()
        return [
            memory.embedding,
            memory.posterior,
            head.prototypes(),
            folded.weight,
            folded.bias,
            scores,
            z.grad,
        ]

    expected = everything()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under_autocast = everything()
    assert all(torch.equal(a, b) for a, b in zip(under_autocast, expected, strict=True))


@pytest.mark.parametrize("function", [lambda f, g: soft_target_kl(f, g, 4.0), feature_mse], ids=["kl", "mse"])
def test_methods_widen_half_precision(function):
    student, teacher, *_ = float32_inputs(6, 500)
    student, teacher = student.bfloat16(), (student + 0.1 * teacher).bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rows = function(student, teacher)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(
        rows.double(), function(student.double(), teacher.double()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("ids", [False, True], ids=["dense", "ids"])
def test_second_derivatives_of_the_reference(ids):
    student, *rest = make_inputs(3, 5, 7, 4, ids=ids)
    assert torch.autograd.gradgradcheck(
        lambda z: kdav_loss(z, *rest, kappa_student=5.0, impl="reference").loss, student.requires_grad_()
    )


def gradient_penalty(impl):
    student, *rest = float32_inputs()
    z = student.requires_grad_()
    (gradient,) = torch.autograd.grad(kdav_loss(z, *rest, impl=impl).loss, z, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), z)


def retained_graph(impl):
    student, *rest = float32_inputs()
    kdav_loss(student.requires_grad_(), *rest, impl=impl, reduction="none").loss[0].backward(
        create_graph=True
    )


def functional_hessian(impl):
    student, *rest = float32_inputs(2, 3, 5, 2)
    return torch.autograd.functional.hessian(lambda z: kdav_loss(z, *rest, impl=impl).loss, student)


@pytest.mark.parametrize(
    ("impl", "ask"),
    [
        *itertools.product(["chunked", "triton"], [gradient_penalty, retained_graph, functional_hessian]),
        pytest.param("compile", gradient_penalty, marks=pytest.mark.slow),
    ],
)
def test_second_derivatives_of_the_others_name_the_reference(impl, ask):
    with pytest.raises(
        NotImplementedError, match=f"'{impl}' has first derivatives only.*use impl='reference'"
    ):
        ask(impl)


def test_auto_names_what_it_took():
    student, *rest = float32_inputs(64, 4, 20000, 3)
    z = student.requires_grad_()
    with pytest.raises(NotImplementedError, match="'chunked' has first derivatives only"):
        torch.autograd.grad(kdav_loss(z, *rest).loss, z, create_graph=True)


def forward_mode(loss, z):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z, torch.ones_like(z))
        return forward_ad.unpack_dual(loss(dual)).tangent


TRANSFORMS = {
    "grad": lambda loss, z: torch.func.grad(loss)(z),
    "hessian": lambda loss, z: torch.func.hessian(loss)(z),
    "jvp": lambda loss, z: torch.func.jvp(loss, (z,), (torch.ones_like(z),))[1],
    "vmap": lambda loss, z: torch.func.vmap(loss)(torch.stack([z, -z])),
    "vmap of grad": lambda loss, z: torch.func.vmap(torch.func.grad(loss))(torch.stack([z, -z])),
    "forward mode": forward_mode,
}
BY_HAND = {
    "grad": lambda loss, z: torch.autograd.functional.jacobian(loss, z),
    "hessian": lambda loss, z: torch.autograd.functional.hessian(loss, z),
    "jvp": lambda loss, z: torch.autograd.functional.jacobian(loss, z).sum(),
    "vmap": lambda loss, z: torch.stack([loss(z), loss(-z)]),
    "vmap of grad": lambda loss, z: torch.stack(
        [torch.autograd.functional.jacobian(loss, sign * z) for sign in (1, -1)]
    ),
    "forward mode": lambda loss, z: torch.autograd.functional.jacobian(loss, z).sum(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("impl", [*QUICK, COMPILE])
def test_transforms_are_right_or_name_the_reference(impl, transform):
    # Long enough that "auto" would take `chunked` otherwise.
    student, *rest = (
        make_inputs(2, 3, 2**19 + 1, 2, device=DEVICE) if impl == "auto" else make_inputs(2, 3, 7, 2)
    )
    rest = [tensor.to(student) if tensor.is_floating_point() else tensor for tensor in rest]

    def loss(z, impl=impl):
        return kdav_loss(z, *rest, impl=impl).loss

    if impl in ("chunked", "triton"):
        with pytest.raises(NotImplementedError, match=f"'{impl}'.*use impl='reference'"):
            TRANSFORMS[transform](loss, student)
        return
    expected = BY_HAND[transform](lambda z: loss(z, "reference"), student)
    torch.testing.assert_close(TRANSFORMS[transform](loss, student), expected)


@pytest.mark.parametrize(
    ("impl", "ids", "changed"),
    [
        *itertools.product(QUICK, [False, True], ["memory", "posterior"]),
        pytest.param("compile", False, "posterior", marks=pytest.mark.slow),
    ],
)
def test_a_memory_that_moves_on_before_backward(impl, ids, changed):
    """The gradient is of the memory as it was, or there is none."""
    student, *rest = float32_inputs(ids=ids)
    z = student.requires_grad_()
    (expected,) = torch.autograd.grad(kdav_loss(z, *rest, impl=impl).loss, z)
    loss = kdav_loss(z, *rest, impl=impl).loss
    rest[2 if changed == "memory" else 3].zero_()
    try:
        (gradient,) = torch.autograd.grad(loss, z)
    except RuntimeError as error:
        assert "modified" in str(error)  # noqa: PT017 - an answer as good as the right gradient
    else:
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("impl", QUICK)
def test_two_backward_passes_of_one_forward(impl):
    student, *rest = float32_inputs()
    z = student.requires_grad_()
    loss = kdav_loss(z, *rest, impl=impl).loss
    first = torch.autograd.grad(loss, z, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, z)[0])


@pytest.mark.parametrize("impl", QUICK)
def test_a_teacher_that_answered_in_inference_mode(impl):
    student, *rest = float32_inputs()
    expected = torch.autograd.grad(kdav_loss(student.requires_grad_(), *rest, impl=impl).loss, student)
    with torch.inference_mode():
        rest = [tensor.clone() if isinstance(tensor, torch.Tensor) else tensor for tensor in rest]
    found = torch.autograd.grad(kdav_loss(student, *rest, impl=impl).loss, student)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", QUICK)
def test_without_a_gradient(impl):
    student, *rest = float32_inputs()
    expected = kdav_loss(student, *rest, impl="reference").loss
    with torch.inference_mode():
        torch.testing.assert_close(kdav_loss(student, *rest, impl=impl).loss, expected)
    with torch.no_grad():
        loss = kdav_loss(student.requires_grad_(), *rest, impl=impl).loss
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_caller_that_is_compiled_whole(impl, fresh_compiler):
    """As one graph, the loss and its gradient within."""
    student, *rest = float32_inputs()

    def step(z):
        return 3 * kdav_loss(2 * z, *rest, impl=impl).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        z = student.clone().requires_grad_()
        loss = function(z)
        results.append([loss.detach(), *torch.autograd.grad(loss, z)])
    for expected, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected)


ON_A_GPU = ["chunked", "triton"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("impl", ON_A_GPU)
@pytest.mark.parametrize("ids", [False, True], ids=["dense", "ids"])
def test_tensors_on_another_device_than_the_current_one(impl, ids):
    first, second = (
        values_and_gradient(
            kdav_loss, make_inputs(ids=ids, dtype=torch.float32, device=f"cuda:{index}"), impl=impl
        )
        for index in (0, 1)
    )
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ON_A_GPU)
@pytest.mark.parametrize("ids", [False, True], ids=["dense", "ids"])
def test_a_cuda_graph_takes_it_and_nothing_waits_for_the_device(impl, ids):
    student, *rest = make_inputs(256, 64, 5000, 100, ids=ids, dtype=torch.bfloat16, device="cuda")
    filled = torch.tensor(4000, device="cuda")
    z = student.requires_grad_()

    def step():
        return torch.autograd.grad(kdav_loss(z, *rest, filled, impl=impl).loss, z)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    graph.replay()
    assert torch.equal(result, expected)
