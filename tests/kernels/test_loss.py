"""The public function: reductions, validation, and mathematics that holds for any input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdav_fast import KDAVLoss, kdav_loss
from kdav_fast.kernels.reference import reference_terms

from .inputs import make_inputs


def by_the_book(z, t, g, memory, posterior, kappa_student, kappa_teacher, temperature, eps=1e-8):
    """DESIGN section 2 with loops over plain floats: slow, and written from the formulas alone."""
    import math

    def posterior_of_v(x, kappa):
        norm = math.sqrt(sum(float(a) ** 2 for a in x))
        s = [kappa * sum(float(a) * float(b) for a, b in zip(x, u, strict=True)) / norm for u in memory]
        top = max(s)
        e = [math.exp(v - top) for v in s]
        return [v / sum(e) for v in e]

    rows = []
    for i in range(len(z)):
        p, q = posterior_of_v(z[i], kappa_student), posterior_of_v(t[i], kappa_teacher)
        membership = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        logits = [float(v) / temperature for v in g[i]]
        e = [math.exp(v - max(logits)) for v in logits]
        prediction = 0.0
        for y, value in enumerate(e):
            q_y = value / sum(e)
            if posterior.ndim == 2:
                p_y = sum(p[j] * float(posterior[j, y]) for j in range(len(p)))
            else:
                p_y = sum(p[j] for j in range(len(p)) if int(posterior[j]) == y)
            if q_y > 0:
                prediction += q_y * (math.log(q_y) - math.log(max(p_y, eps)))
        rows.append((membership, temperature**2 * prediction))
    return torch.tensor(rows, dtype=torch.float64).T


@pytest.mark.parametrize("ids", [False, True])
def test_against_the_formulas(ids):
    inputs = make_inputs(ids=ids)
    out = kdav_loss(*inputs, kappa_student=7.0, kappa_teacher=3.0, temperature=2.0)
    membership, prediction = by_the_book(*inputs, kappa_student=7.0, kappa_teacher=3.0, temperature=2.0)
    torch.testing.assert_close(out.membership_kl, membership, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.prediction_kl, prediction, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 6),
    width=st.integers(1, 9),
    length=st.integers(1, 20),
    classes=st.integers(1, 7),
    ids=st.booleans(),
    kappa=st.sampled_from([0.1, 1.0, 10.0, 200.0]),
    seed=st.integers(0, 1000),
)
def test_both_terms_are_divergences_and_ignore_the_length_of_embeddings(
    batch, width, length, classes, ids, kappa, seed
):
    inputs = make_inputs(batch, width, length, classes, ids=ids, seed=seed)
    out = kdav_loss(*inputs, kappa_student=kappa, kappa_teacher=kappa)
    assert (out.membership_kl > -1e-9).all()
    assert (out.prediction_kl > -1e-6).all()  # the floor eps adds up to K * eps of probability
    scaled = [inputs[0] * 17.0, inputs[1] * 0.25, *inputs[2:]]
    again = kdav_loss(*scaled, kappa_student=kappa, kappa_teacher=kappa)
    torch.testing.assert_close(again.loss, out.loss, rtol=1e-9, atol=1e-9)
    same = kdav_loss(inputs[1], *inputs[1:], kappa_student=kappa, kappa_teacher=kappa)
    assert same.membership_kl.abs().max() < 1e-9


@settings(deadline=None, max_examples=30)
@given(filled=st.integers(1, 12), ids=st.booleans(), seed=st.integers(0, 1000))
def test_rows_beyond_filled_do_not_exist(filled, ids, seed):
    inputs = make_inputs(ids=ids, seed=seed)
    short = [*inputs[:3], inputs[3][:filled], inputs[4][:filled]]
    expected = kdav_loss(*short, reduction="none").loss
    torch.testing.assert_close(kdav_loss(*inputs, filled, reduction="none").loss, expected)
    # The mask that an accelerator would use, where `filled` is not read back.
    keywords = {"kappa_student": 10.0, "kappa_teacher": 10.0, "temperature": 1.0, "eps": 1e-8}
    student = inputs[0].clone().requires_grad_()
    masked = sum(reference_terms(student, *inputs[1:], torch.tensor(filled), **keywords))
    torch.testing.assert_close(masked.detach(), expected)
    masked.sum().backward()
    assert student.grad.isfinite().all()


def test_gradcheck():
    student, *rest = make_inputs(3, 5, 7, 4)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kdav_loss(z, *rest, kappa_student=5.0).loss, (student,))


def test_reductions_and_weights():
    inputs = make_inputs()
    rows = kdav_loss(*inputs, weight_membership=0.5, weight_prediction=2.0, reduction="none")
    expected = 0.5 * rows.membership_kl + 2.0 * rows.prediction_kl
    torch.testing.assert_close(rows.loss, expected)
    for reduction, value in {"mean": expected.mean(), "sum": expected.sum()}.items():
        out = kdav_loss(*inputs, weight_membership=0.5, weight_prediction=2.0, reduction=reduction)
        torch.testing.assert_close(out.loss, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_accumulated_in_float32(dtype):
    inputs = make_inputs(dtype=dtype)
    out = kdav_loss(*inputs)
    assert out.loss.dtype == torch.float32
    truth = kdav_loss(*[t.double() for t in inputs])
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)


def test_one_hot_teacher_and_absent_class():
    student, teacher, logits, memory, _ = make_inputs(classes=3)
    logits = torch.full_like(logits, -torch.inf)
    logits[:, 2] = 0.0
    absent = torch.zeros(len(memory), dtype=torch.int64)  # no remembered instance of class 2
    out = kdav_loss(student.requires_grad_(), teacher, logits, memory, absent)
    torch.testing.assert_close(
        out.prediction_kl, torch.full_like(out.prediction_kl, -torch.tensor(1e-8).log())
    )
    out.loss.backward()
    assert student.grad.isfinite().all()


def test_nan_in_nan_out():
    inputs = make_inputs()
    inputs[0][1, 2] = torch.nan
    rows = kdav_loss(*inputs, reduction="none").loss
    assert rows.isnan().tolist() == [False, True, False, False, False]


def test_module_binds_settings():
    inputs = make_inputs()
    expected = kdav_loss(*inputs, 9, kappa_student=3.0, reduction="sum")
    module = KDAVLoss(kappa_student=3.0, reduction="sum")
    assert torch.equal(module(*inputs, 9).loss, expected.loss)
    assert "kappa_student=3.0" in repr(module)
    with pytest.raises(TypeError, match="no setting 'kapa'.*kappa_student"):
        KDAVLoss(kapa=3.0)


def replaced(position, value):
    def change(inputs):
        inputs[position] = value(inputs[position])
        return inputs

    return change


@pytest.mark.parametrize(
    ("change", "filled", "error", "message"),
    [
        (replaced(0, lambda t: t[0]), None, ValueError, "student_embedding has shape.*2 dimensions"),
        (replaced(0, lambda t: t[:0]), None, ValueError, "0 x 8"),
        (replaced(0, lambda t: t.long()), None, TypeError, "student_embedding has dtype torch.int64"),
        (replaced(1, lambda t: t[:, :7]), None, ValueError, "teacher_embedding has shape"),
        (
            replaced(1, lambda t: t.requires_grad_()),
            None,
            ValueError,
            "teacher_embedding requires a gradient",
        ),
        (replaced(2, lambda t: t[:3]), None, ValueError, "teacher_logits has 3 rows"),
        (replaced(2, lambda t: t.tolist()), None, TypeError, "teacher_logits is a list"),
        (replaced(3, lambda t: t[:, :7]), None, ValueError, "memory_embedding has rows of width 7"),
        (replaced(3, lambda t: t[:0]), None, ValueError, "memory_embedding has no rows"),
        (replaced(3, lambda t: t.requires_grad_()), None, ValueError, "memory_embedding requires a gradient"),
        (replaced(4, lambda t: t[:, :2]), None, ValueError, "memory_posterior has shape.*12 x 4"),
        (replaced(4, lambda t: t[:, 0].int()), None, TypeError, "class ids must be int64"),
        (replaced(4, lambda t: t[:5, 0].long()), None, ValueError, "class ids must be 12 values"),
        (list, 0, ValueError, "memory is empty"),
        (list, 13, ValueError, "filled is 13; it must be 1..12"),
        (list, torch.tensor(0), ValueError, "memory is empty"),
        (list, torch.ones(2, dtype=torch.int64), TypeError, "one integer"),
        (list, torch.tensor(True), TypeError, "one integer"),
        (list, True, TypeError, "filled is True; it must be one integer"),
        (list, 2.7, TypeError, "filled is 2.7; it must be one integer"),
    ],
)
def test_unusable_inputs_are_named(change, filled, error, message):
    with pytest.raises(error, match=message):
        kdav_loss(*change(make_inputs()), filled)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"kappa_student": 0.0}, "kappa_student is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"kappa_teacher": float("inf")}, "kappa_teacher is inf; it must be above 0 and finite"),
        ({"weight_prediction": float("nan")}, "weight_prediction is nan; it must be at least 0 and finite"),
        ({"weight_membership": -1.0}, "weight_membership is -1.0"),
        ({"reduction": "max"}, "reduction is 'max'; allowed: 'mean', 'none', 'sum'"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0"),
        ({"impl": "cuda"}, "impl is 'cuda'; allowed: 'auto', 'reference', 'chunked', 'triton', 'compile'"),
    ],
)
def test_unusable_settings_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        kdav_loss(*make_inputs(), **keywords)


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("wrong", [-1, 3])
def test_class_ids_that_are_no_class_are_refused(impl, wrong):
    embedding, logits = torch.eye(2), torch.zeros(2, 3)
    ids = torch.tensor([0, 2, wrong])
    memory = torch.eye(2).repeat(2, 1)[:3]
    with pytest.raises(
        ValueError, match=rf"memory_posterior holds class id {wrong}; with 3 .* must be 0\.\.2"
    ):
        kdav_loss(embedding, embedding, logits, memory, ids, impl=impl)
    assert kdav_loss(
        embedding, embedding, logits, memory, ids, 2, impl=impl
    ).loss.isfinite()  # a row not in use
