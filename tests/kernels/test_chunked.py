"""`chunked` as a GPU runs it, by Triton's interpreter where there is none: slices, launches, callers' devices."""

import contextlib
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdav_fast import kdav_loss
from kdav_fast.kernels import chunked, chunked_gpu, triton_chunk
from kdav_fast.kernels.records import Settings

from .inputs import DEVICE, make_inputs, values_and_gradient
from .test_accuracy import TOLERANCE, check_rule, eager_loss, largest_errors, widened

both_posteriors = pytest.mark.parametrize("ids", [False, True], ids=["dense", "ids"])
SMALLEST = 1
"""Of workspaces: a slice then has 256 rows."""


@pytest.fixture
def gpu_passes(monkeypatch):
    monkeypatch.setattr(chunked, "passes_for", lambda device: chunked_gpu)


@both_posteriors
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 600, 70), (2, 37, 257, 600)], ids=str)
def test_error_beside_torch_in_the_same_dtype(gpu_passes, dtype, ids, shape):
    inputs = make_inputs(*shape, ids=ids, dtype=dtype, device=DEVICE)
    check_rule("chunked", inputs, temperature=2.0)


@both_posteriors
@pytest.mark.parametrize("filled", [1, 255, 256, 300, 600])
@pytest.mark.parametrize("kappa", [10.0, 200.0])
def test_a_part_of_the_memory_in_use(gpu_passes, ids, filled, kappa):
    """The number stays on the device; rows beyond it hold what does not count."""
    inputs = make_inputs(2, 20, 600, 70, ids=ids, dtype=torch.float32, device=DEVICE)
    settings = {"kappa_student": kappa, "kappa_teacher": kappa}
    truth = values_and_gradient(kdav_loss, widened(inputs), filled, impl="reference", **settings)
    inputs[3][filled:] = 1e4
    measured = values_and_gradient(
        kdav_loss,
        inputs,
        torch.tensor(filled, device=DEVICE),
        impl="chunked",
        workspace_bytes=SMALLEST,
        **settings,
    )
    assert max(largest_errors(measured, truth)) < kappa * 1e-5


@pytest.mark.parametrize("memory", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("posterior", [torch.float32, torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("student", [torch.float32, torch.float64], ids=str)
def test_every_mixture_of_dtypes(gpu_passes, student, memory, posterior):
    inputs = make_inputs(2, 20, 600, 70, ids=posterior == torch.int64, dtype=torch.float32, device=DEVICE)
    inputs[0], inputs[3], inputs[4] = inputs[0].to(student), inputs[3].to(memory), inputs[4].to(posterior)
    truth = values_and_gradient(kdav_loss, widened(inputs), impl="reference")
    measured = values_and_gradient(kdav_loss, inputs, impl="chunked", workspace_bytes=SMALLEST)
    exact = student == torch.float64 or memory not in (torch.bfloat16, torch.float16)
    allowed = 1e-5 if exact and posterior != torch.bfloat16 else 5e-3  # the interpreter cuts bfloat16 off
    assert max(largest_errors(measured, truth)) < allowed


@both_posteriors
def test_two_runs_give_the_same_bits(gpu_passes, ids):
    inputs = make_inputs(2, 20, 600, 70, ids=ids, dtype=torch.bfloat16, device=DEVICE)
    first, second = (
        values_and_gradient(kdav_loss, inputs, impl="chunked", workspace_bytes=SMALLEST) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both_posteriors
def test_a_new_maximum_in_every_slice(gpu_passes, ids):
    """Rows ever nearer to the embeddings: all earlier sums shrink each time."""
    inputs = make_inputs(3, 20, 1024, 70, ids=ids, dtype=torch.float32, device=DEVICE)
    nearness = torch.linspace(-3, 3, 1024, device=DEVICE)[:, None]
    inputs[3] = torch.nn.functional.normalize(inputs[3] + nearness * (inputs[0][0] + inputs[1][0]), dim=1)
    truth = values_and_gradient(kdav_loss, widened(inputs), impl="reference", kappa_student=80.0)
    measured = values_and_gradient(
        kdav_loss, inputs, impl="chunked", workspace_bytes=SMALLEST, kappa_student=80.0
    )
    assert max(largest_errors(measured, truth)) < 1e-4


class Launches(TorchDispatchMode):
    """What a GPU would be given to do, every operation that is no view by name, and the most bytes held meanwhile."""

    def __init__(self):
        super().__init__()
        self.names, self.held, self.most = [], {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace != "prim" and not function.is_view and not name.startswith("empty"):
            self.names.append(name)
        if function in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
            return kwargs["out"]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.hold(result.untyped_storage())
        return result

    def hold(self, storage):
        if storage._cdata not in self.held:
            self.held[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.held.pop, storage._cdata)
            self.most = max(self.most, sum(self.held.values()))


class Kernel:
    """Stands for a Triton kernel: notes its launches in `launches`."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.names.append(self.name)


@pytest.fixture
def launches(monkeypatch):
    """GPU passes over tensors without values, with the devices that were made current."""
    mode = Launches()
    mode.entered = []

    @contextlib.contextmanager
    def on_device(device):
        mode.entered.append(str(device))
        mode.names.append("enter")
        yield
        mode.names.append("leave")

    for name in [name for name in vars(triton_chunk) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_chunk, name, Kernel(name, mode))
    monkeypatch.setattr(chunked_gpu, "on_device", on_device)
    monkeypatch.setattr(chunked_gpu, "adds_wider", lambda device: True)
    with mode:
        yield mode


def large_inputs(length, ids):
    """Batch 1024, width 2048, 1000 classes, bfloat16."""

    def make(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    posterior = make(length, dtype=torch.int64) if ids else make(length, 1000)
    return [make(1024, 2048), make(1024, 2048), make(1024, 1000), make(length, 2048), posterior]


def fake_passes(length, ids, workspace_bytes=25 * 10**6):
    """Forward and backward; the workspace is one for slices of 2,048 rows."""
    filled = torch.empty((), dtype=torch.int64, device="meta")
    settings = Settings(10.0, 10.0, 1.0, 1e-8, workspace_bytes)
    inputs = *large_inputs(length, ids), filled
    student, _, _, memory, posterior, _ = inputs
    membership_kl, prediction_kl, saved = chunked_gpu.forward(*inputs, settings)
    chunked_gpu.backward(student, memory, posterior, filled, saved, membership_kl, prediction_kl, settings)


SLICE = {
    False: ["mm", "absorb_kernel", "addmm", "addmm", "mm", "mm", "chunked_slope_kernel", "addmm"],
    True: ["mm", "absorb_kernel", "one_hot_kernel", "addmm", "addmm", "mm", "chunked_slope_kernel", "addmm"],
}


@both_posteriors
def test_launches_of_a_slice(launches, ids):
    """Eight, none of which waits for the device or copies to the host; 2,048 rows at a time."""
    fake_passes(4096, ids)
    two, launches.names = launches.names, []
    fake_passes(3 * 2048, ids)
    three = launches.names
    assert sorted(set(SLICE[ids])) == sorted(set(three) & set(SLICE[ids]))
    for name in set(three):
        assert three.count(name) - two.count(name) == SLICE[ids].count(name), name
    once = ["query_kernel", "chunked_divergence_kernel", "upstream_kernel", "chunked_gradient_kernel"]
    assert len(two) - 2 * 8 == len(once) + 4  # entering and leaving the device's context twice
    assert [two.count(name) for name in once] == [1] * 4


@both_posteriors
def test_kernels_are_launched_on_the_tensors_device(launches, ids):
    fake_passes(2048, ids)
    assert launches.entered == ["meta", "meta"]
    inside = False
    for name in launches.names:
        inside = name == "enter" or (inside and name != "leave")
        assert inside or not name.endswith("kernel")


@both_posteriors
def test_extra_memory_at_the_large_shape(launches, ids):
    """A tenth of what plain torch takes, by the bytes of every tensor that is alive."""

    def most(function):
        launches.most = 0
        before = sum(launches.held.values())
        function()
        return launches.most - before

    student, *rest = large_inputs(65536, False)
    z = student.requires_grad_()
    eager = most(lambda: torch.autograd.grad(eager_loss(z, *rest).loss.sum(), z))
    inputs = 2 * (2 * 1024 * 2048 + 1024 * 1000 + 65536 * 2048) + 65536 * (8 if ids else 2000)
    extra = most(lambda: fake_passes(65536, ids, 45 * 10**6)) - inputs
    assert launches.names.count("absorb_kernel") == 16  # slices of 4,096 rows
    assert 30 * 10**6 < extra <= eager / 10
