"""What is demanded of every method there is: a file of `distillers/` is found here by itself."""

import pytest
import torch
from safetensors.torch import load, save

from kdav_fast.distillers.phases import Fit
from kdav_fast.train.engine.untouched import Untouched
from tests.distillers.small_run import BATCH, CLASSES, SmallRun, all_cases

CASES = all_cases()
PADDING = [(1, 7), (0, 2, 3), ()]
"""Rows of each of three batches."""


@pytest.fixture(params=CASES)
def section(request):
    return CASES[request.param]


def prepared(section, *options, **named) -> SmallRun:
    run = SmallRun(section, *options, **named)
    go_through_phases(run)
    return run


def go_through_phases(run, measured=lambda sample: sample, fitted=lambda sample: sample):
    """What comes before distillation, with the samples changed."""
    run.go_through_phases(
        [measured(run.sample(seed, padding=(seed, 5), measuring=True)) for seed in range(3)],
        [fitted(run.sample(seed, padding=(seed, 5))) for seed in range(3)],
    )


def state_of(run) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds of it, as its files hold it."""
    state = {**run.distiller.state_dict(), **run.trainee.state_dict()}
    return load(save({name: tensor.contiguous() for name, tensor in state.items()}))


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


@pytest.mark.parametrize("filling", ["nan", "other"])
def test_padding_never_counts(section, filling):
    padded, bare = SmallRun(section), SmallRun(section)
    # The gradient of a weight sums over all rows, and 0 x NaN is NaN.
    go_through_phases(padded, lambda sample: sample.spoilt(filling), lambda sample: sample.spoilt("other"))
    go_through_phases(bare, *2 * [lambda sample: sample.taken(sample.batch.valid)])
    close(state_of(padded), state_of(bare))
    for step, padding in enumerate(PADDING):
        sample = padded.sample(10 + step, padding=padding)
        valid, rows = sample.batch.valid, sample.batch.valid_rows
        answer, gradients = padded.answer(sample.spoilt(filling), step)
        expected, expected_gradients = bare.answer(sample.taken(valid), step)
        close(answer.total, expected.total)
        close(answer.parts, expected.parts)
        for name, gradient in expected_gradients.items():
            found = gradients[name]
            if len(found) != len(gradient) or found.shape == rows.shape:
                assert filling == "nan" or not found[~rows].any(), name
                found = found[rows]
            elif filling == "nan":
                continue  # again of a weight
            close(found, gradient)
        close(state_of(padded), state_of(bare))


def test_a_batch_of_padding_alone_is_finite_and_changes_nothing(section):
    """As the last batch of an epoch is on one of several ranks."""
    run = prepared(section)
    run.answer(run.sample(9))
    before = state_of(run)
    sample = run.sample(10, padding=range(BATCH))
    answer, gradients = run.answer(sample)
    assert answer.total.isfinite()
    assert all(part.isfinite() for part in answer.parts.values())
    assert not any(gradient.any() for gradient in gradients.values())
    assert run.answer(sample.spoilt("nan"))[0].total.isfinite()
    close(state_of(run), before, rtol=0, atol=0)


def test_one_loss_has_a_gradient_and_its_parts_are_numbers(section):
    run = prepared(section)
    answer, gradients = run.answer(run.sample(10))
    assert answer.total.shape == ()
    assert answer.total.dtype == torch.float32
    assert answer.parts
    for name, part in answer.parts.items():
        assert (part.shape, part.requires_grad, part.isfinite().item()) == ((), False, True), name
    assert any(
        gradient.any() for name, gradient in gradients.items() if "." not in name or name[-1].isdigit()
    )
    assert not any(buffer.requires_grad for buffer in run.distiller.buffers())
    assert not list(run.distiller.parameters())
    if run.facts.teacher_classifier is not None:
        assert all(parameter.grad is None for parameter in run.facts.teacher_classifier.parameters())


def test_what_is_learned_is_trained(section):
    run = prepared(section)
    _, gradients = run.answer(run.sample(10), step=9)  # terms that come in by and by have begun to
    before = {name for phase in run.distiller.phases() if isinstance(phase, Fit) for name in phase.modules}
    for name, _ in run.trainee.learned.named_parameters():
        if name.split(".")[0] not in before:  # these may be left as they are
            assert gradients[f"learned.{name}"].any(), name


def test_state_makes_a_round_trip(section):
    used, restored = prepared(section), SmallRun(section, seed=1)
    for step in range(2):
        used.answer(used.sample(10 + step), step)
    saved = state_of(used)
    for module in (restored.distiller, restored.trainee):
        module.load_state_dict({name: saved[name] for name in module.state_dict()})
    for step in range(2, 4):
        sample = used.sample(10 + step, padding=(3,))
        for found, expected in zip(restored.answer(sample, step), used.answer(sample, step), strict=True):
            close(found, expected, rtol=0, atol=0)


def test_the_same_comes_out_again(section):
    outcomes = []
    for _ in range(2):
        run = prepared(section)
        outcomes.append([run.answer(run.sample(10 + step), step) for step in range(2)])
    close(*outcomes, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_in_half_precision_and_for_large_answers(section, dtype, factor):
    run = prepared(section, dtype)
    for step in range(3):
        sample = run.sample(10 + step, padding=(0, 4)).scaled(factor)
        if step == 1 and sample.teacher is not None:  # the student already is the teacher
            sample = sample._replace(student=sample.student._replace(logits=sample.teacher.logits))
        answer, gradients = run.answer(sample, step)
        assert answer.total.isfinite()
        assert all(part.isfinite() for part in answer.parts.values())
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_in_half_precision_the_loss_is_nearly_the_same(section):
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        run = prepared(section, dtype)
        losses[dtype] = run.answer(run.sample(10))[0].total
    close(losses[torch.bfloat16], losses[torch.float32], rtol=0.03, atol=0.03)


def test_a_caller_s_autocast_changes_nothing(section):
    run = prepared(section)
    expected, _ = run.answer(run.sample(10))
    run = prepared(section)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = run.answer(run.sample(10))
    close(found, expected, rtol=0, atol=0)


def test_labels_count_where_the_section_says_so(section):
    """Of a method that uses none, smoothing them is refused."""
    run, smooth = prepared(section), prepared(section, label_smoothing=0.5)
    losses = [each.answer(each.sample(10))[0].total for each in (run, smooth)]
    assert torch.equal(*losses) == (not section.uses_labels)


def test_mixed_images_are_taken_where_the_section_says_so(section):
    if not section.takes_mixed:
        pytest.skip("it takes none")
    run = prepared(section)
    sample = run.sample(10)
    shares = torch.rand(BATCH, CLASSES, generator=torch.Generator().manual_seed(0)).softmax(1)
    answer, gradients = run.answer(sample._replace(batch=sample.batch._replace(mixed=shares)))
    assert answer.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_step_that_is_not_taken_leaves_no_trace(section):
    with_it, without = prepared(section), prepared(section)
    untouched = [Untouched([run.distiller, run.trainee]) for run in (with_it, without)]
    with_it.answer(with_it.sample(30), 0)
    untouched[0].settle(torch.tensor(False))
    for step in range(2):
        outcomes = [run.answer(run.sample(10 + step), step) for run in (with_it, without)]
        close(*outcomes, rtol=0, atol=0)
        for each in untouched:
            each.settle(torch.tensor(True))
    close(state_of(with_it), state_of(without), rtol=0, atol=0)
