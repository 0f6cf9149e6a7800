"""What every implementation of the loss must withstand, and what each promises alone."""

import json

import pytest
import torch
import triton
from torch.profiler import ProfilerActivity, profile

from kdav_fast import kdav_loss
from kdav_fast.kernels import dispatch, explain_choice, triton_kdav
from kdav_fast.kernels.chunked import chunked_terms
from kdav_fast.kernels.reference import reference_terms

from .inputs import DEVICE, make_inputs, values_and_gradient

IMPLEMENTATIONS = ["reference", "chunked", "triton"]
every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
both_posteriors = pytest.mark.parametrize("ids", [False, True], ids=["dense", "ids"])
SETTINGS = {"kappa_student": 10.0, "kappa_teacher": 10.0, "temperature": 1.0, "eps": 1e-8}


def float32_inputs(*shape, **keywords):
    return make_inputs(*shape, dtype=torch.float32, device=DEVICE, **keywords)


def agree(first, second, tolerance=1e-5):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_implementation
@both_posteriors
def test_equal_similarities(impl, ids):
    student, teacher, logits, memory, posterior = float32_inputs(3, 6, 70, 4, ids=ids)
    memory = memory[:1].expand(70, 6).contiguous()
    membership, _, gradient = values_and_gradient(
        kdav_loss, [student, teacher, logits, memory, posterior], impl=impl
    )
    assert membership.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-5  # every slope has the same row of U to go to, and they add up to 0


@every_implementation
def test_one_hot_teacher_and_absent_class(impl):
    student, teacher, logits, memory, _ = float32_inputs(classes=3)
    logits = torch.full_like(logits, -torch.inf)
    logits[:, 2] = 0.0
    absent = torch.zeros(len(memory), dtype=torch.int64, device=DEVICE)  # no instance of class 2
    inputs = [student, teacher, logits, memory, absent]
    _, prediction, gradient = values_and_gradient(kdav_loss, inputs, weight_membership=0.0, impl=impl)
    torch.testing.assert_close(prediction, torch.full_like(prediction, -torch.tensor(1e-8).log().item()))
    assert gradient.abs().max() == 0  # the floor of p(y|x) is flat


@every_implementation
@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0)])
def test_either_weight_may_be_zero(impl, weights):
    inputs = float32_inputs(5, 8, 80)
    keywords = {"weight_membership": weights[0], "weight_prediction": weights[1]}
    truth = values_and_gradient(kdav_loss, [t.double() for t in inputs], impl="reference", **keywords)
    agree(values_and_gradient(kdav_loss, inputs, impl=impl, **keywords), truth)


@every_implementation
def test_strided_inputs(impl):
    inputs = float32_inputs(5, 8, 70, 6)
    strided = [t.T.contiguous().T for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    agree(values_and_gradient(kdav_loss, strided, impl=impl), values_and_gradient(kdav_loss, inputs))


@every_implementation
@pytest.mark.parametrize("where", ["student", "teacher", "logits", "memory", "posterior"])
def test_nan_in_nan_out(impl, where):
    inputs = float32_inputs(5, 8, 70, 6)
    position = ["student", "teacher", "logits", "memory", "posterior"].index(where)
    inputs[position][1, 2] = torch.nan
    rows = kdav_loss(*inputs, reduction="none", impl=impl).loss
    one_row = position < 3
    assert rows.isnan().tolist() == [not one_row, True, not one_row, not one_row, not one_row]


@every_implementation
def test_mean_and_sum(impl):
    inputs = float32_inputs()
    rows = kdav_loss(*inputs, reduction="none", impl=impl).loss
    for reduction, value in {"mean": rows.mean(), "sum": rows.sum()}.items():
        student = inputs[0].clone().requires_grad_()
        out = kdav_loss(student, *inputs[1:], reduction=reduction, impl=impl)
        torch.testing.assert_close(out.loss.detach(), value)
        out.loss.backward()
        assert student.grad.abs().max() > 0


@every_implementation
def test_embeddings_of_unlike_dtypes(impl):
    inputs = float32_inputs(5, 8, 70, 6)
    mixed = [inputs[0].bfloat16(), inputs[1].half(), inputs[2].bfloat16(), inputs[3], inputs[4].half()]
    truth = values_and_gradient(kdav_loss, [t.double() for t in mixed])
    agree(values_and_gradient(kdav_loss, mixed, impl=impl), truth, tolerance=5e-3)  # bfloat16 gradient


@every_implementation
def test_an_empty_memory_is_refused(impl):
    inputs = float32_inputs()
    with pytest.raises(ValueError, match="memory is empty"):
        kdav_loss(*inputs, 0, impl=impl)
    with pytest.raises(ValueError, match="memory_embedding has no rows"):
        kdav_loss(*inputs[:3], inputs[3][:0], inputs[4][:0], impl=impl)


def test_triton_refuses_float64():
    with pytest.raises(TypeError, match="was given torch.float64.*use impl='chunked'"):
        kdav_loss(*make_inputs(device=DEVICE), impl="triton")


def test_triton_names_its_device(monkeypatch):
    monkeypatch.setattr(triton_kdav, "INTERPRETED", triton.language.constexpr(False))
    inputs = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="tensors on cpu.*TRITON_INTERPRET=1"):
        kdav_loss(*inputs, impl="triton")


@both_posteriors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_chunked_gradcheck_and_slices_of_any_size(ids, dtype):
    inputs = make_inputs(4, 9, 50, 6, ids=ids, dtype=dtype, device=DEVICE)
    whole = values_and_gradient(kdav_loss, inputs, 47, impl="chunked")
    for workspace in (1, 500, 3000):
        sliced = values_and_gradient(kdav_loss, inputs, 47, impl="chunked", workspace_bytes=workspace)
        agree(sliced, whole, tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5)
    if dtype == torch.float64:
        student = inputs[0].requires_grad_()
        assert torch.autograd.gradcheck(
            lambda z: kdav_loss(z, *inputs[1:], impl="chunked", workspace_bytes=1500).loss, (student,)
        )


@both_posteriors
def test_chunked_with_filled_on_the_device(ids):
    student, *rest = make_inputs(4, 9, 50, 6, ids=ids, device=DEVICE)
    results = []
    for filled in (20, torch.tensor(20, device=DEVICE)):
        z = student.clone().requires_grad_()
        membership, prediction = chunked_terms(z, *rest, filled, **SETTINGS, workspace_bytes=1500)
        (membership + prediction).sum().backward()
        results.append([membership.detach(), prediction.detach(), z.grad])
    agree(*results, tolerance=1e-12)


def peak_extra_bytes(function, folder) -> int:
    """Most bytes that `function` holds at a time beyond those held before, by the profiler's record."""
    path = folder / "trace.json"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        anchor = torch.empty(64)  # so that the record starts with the bytes held before
        function()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = [e["args"]["Total Allocated"] for e in sorted(events, key=lambda e: e["ts"])]
    assert len(held) > 10
    return max(held) - held[0] + anchor.nbytes


@both_posteriors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunked_memory_does_not_grow_with_length(ids, dtype, tmp_path):
    batch, width, classes, workspace = 16, 32, 50, 2**18
    statistics = 4 * 10 * batch * (width + classes)

    def run(length, impl):
        student, *rest = make_inputs(batch, width, length, classes, ids=ids, dtype=dtype)
        student.requires_grad_()
        bound = {"workspace_bytes": workspace} if impl == "chunked" else {}
        return peak_extra_bytes(
            lambda: kdav_loss(student, *rest, impl=impl, **bound).loss.backward(), tmp_path
        )

    short, long = run(8192, "chunked"), run(32768, "chunked")
    assert short == long
    assert workspace / 2 < long <= workspace + statistics
    assert run(8192, "reference") > 4 * long  # the measurement sees what grows


def test_auto_takes_what_it_explains(monkeypatch):
    taken = []
    for name in dispatch.IMPLEMENTATIONS:

        def record(*args, name=name, workspace_bytes=None, **settings):
            taken.append(name)
            return reference_terms(*args, **settings)

        monkeypatch.setitem(dispatch.IMPLEMENTATIONS, name, record)
    for batch, length in ((2, 10), (64, 20000)):
        inputs = make_inputs(batch, 8, length, 4)
        kdav_loss(*inputs)
        name, reason = explain_choice("cpu", batch, 8, length, 4, torch.float64, "dense")
        assert taken.pop() == name
        assert reason
    assert explain_choice("cpu", 2, 8, 10, 4, torch.float32, "ids")[0] == "reference"
    assert explain_choice("cpu", 256, 512, 65536, 1000, torch.float32, "dense")[0] == "chunked"
    assert explain_choice("cuda", 256, 512, 16384, 1000, torch.bfloat16, "dense")[0] == "triton"
    assert explain_choice("cuda", 1024, 2048, 65536, 1000, torch.bfloat16, "ids")[0] == "chunked"
    for dtype, length in ((torch.float16, 2**16), (torch.float32, 2**15)):  # 64 MiB of similarities, no more
        assert explain_choice("cuda", 256, 4096, length, 1000, dtype, "ids")[0] == "triton"
        assert explain_choice("cuda", 256, 64, length + 1, 1000, dtype, "dense")[0] == "chunked"
    assert explain_choice("cuda", 256, 512, 16384, 1000, torch.float64, "ids")[0] == "chunked"
    assert explain_choice("mps", 256, 512, 16384, 1000, torch.float32, "ids")[0] == "chunked"
