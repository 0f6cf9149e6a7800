"""Networks in a run: what suits the method and the images, new heads, and what the exported student carries."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from kdav_fast.config import load_config
from kdav_fast.errors import InputError
from kdav_fast.inference.evaluate import evaluate_file
from kdav_fast.models import build_classifier
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.student.export import export_safetensors
from kdav_fast.student.file import read_student
from kdav_fast.student.heads import EmbeddingHead
from kdav_fast.student.student import Student
from kdav_fast.train.loop import run_training
from kdav_fast.train.networks import build_network
from kdav_fast.train.setup import set_up
from kdav_fast.train.trial import try_training_step

SHORT = {"depth": 1, "patch_size": 8}


def refusal(call, *args, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def model_config(*overrides):
    return load_config(None, list(overrides)).model


def test_distilled_student_of_another_size_in_a_whole_run(small_config, teacher_run, tmp_path):
    """From its arguments to the library's own network, which loads the exported weights and agrees."""
    name = "timm:deit_tiny_distilled_patch16_224"
    config = small_config(
        tmp_path / "run",
        data={"image_size": 16, "train_subset": 64, "crop_padding": 2},
        model={"name": name, "width": 1.0, "arguments": SHORT},
        teacher={"name": "cifar:resnet8", "width": 1.0, "checkpoint": str(teacher_run)},
        distiller={"name": "kdav", "memory_length": 64},
        train={"epochs": 1, "precision": "fp32"},
    )
    accuracy = run_training(config)
    file = tmp_path / "student.safetensors"
    assert export_safetensors(config.run_dir, file) < 1e-5
    student, card = read_student(config.run_dir)
    assert card.arguments == SHORT | {"img_size": 16}
    stock = timm.create_model(name.partition(":")[2], num_classes=10, **card.arguments).eval()
    stock.load_state_dict(load_file(file), strict=True)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(stock(images), student(images).logits, rtol=1e-4, atol=1e-4)
    assert evaluate_file(file, ["device=cpu", "train.precision=fp32"]).top1 == accuracy.top1
    message = refusal(evaluate_file, file, ["device=cpu", "data.image_size=32"])
    assert message.startswith(f"{name} cannot classify an RGB image of 32 x 32 pixels")


def test_network_without_a_linear_head_learns_by_kd_and_teaches(small_config, teacher_run, tmp_path):
    changes = {
        "data": {"image_size": 32, "train_subset": 64},
        "model": {"name": "torchvision:squeezenet1_1", "width": 1.0},
        "teacher": {"name": "cifar:resnet8", "width": 1.0, "checkpoint": str(teacher_run)},
        "train": {"epochs": 1, "precision": "fp32"},
    }
    message = refusal(
        set_up, small_config(tmp_path / "a", **changes, distiller={"name": "simkd"}), start_cluster("cpu")
    )
    assert message.startswith("torchvision:squeezenet1_1 has class scores that are no fixed linear function")
    assert "distiller.name=kd" in message
    config = small_config(tmp_path / "b", **changes, distiller={"name": "kd"})
    run_training(config)
    stock = torchvision.models.squeezenet1_1(num_classes=10)
    stock.load_state_dict(load_file(config.run_dir / "student.safetensors"), strict=True)

    changes["teacher"] = {"name": "torchvision:squeezenet1_1", "checkpoint": str(config.run_dir)}
    changes["model"] = {"name": "cifar:resnet8"}
    message = refusal(
        set_up, small_config(tmp_path / "c", **changes, distiller={"name": "simkd"}), start_cluster("cpu")
    )
    assert message.startswith("the teacher torchvision:squeezenet1_1 has no linear classifier")
    run = set_up(
        small_config(tmp_path / "d", **changes, distiller={"name": "kdav", "memory_length": 64}),
        start_cluster("cpu"),
    )
    images = torch.randn(2, 3, 32, 32)
    outputs = run.teacher.answer(images, None)
    stock.eval()
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits, stock(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            outputs.features, stock.features(images).mean((2, 3)), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("model", "size", "batch", "reason"),
    [
        ("torchvision:inception_v3", 32, 8, "Kernel size can't be greater than actual input size"),
        ("timm:efficientformer_l1", 32, 8, "classify an RGB image of 32 x 32 pixels"),
        ("torchvision:resnet18", 16, 1, "cannot train on one image at a time"),
    ],
)
def test_images_too_small_or_too_few(small_config, tmp_path, model, size, batch, reason):
    config = small_config(
        tmp_path / "run",
        data={"image_size": size},
        model={"name": model, "width": 1.0},
        train={"batch_size": batch},
    )
    message = refusal(set_up, config, start_cluster("cpu"))
    assert message.startswith(f"{model} cannot")
    assert reason in message
    assert ("train.batch_size" if batch == 1 else "data.image_size") in message
    assert not config.run_dir.exists()


@pytest.mark.parametrize(("rows", "head"), [(1, False), (2, True), (64, True)])
def test_the_trial_leaves_nothing_behind(rows, head):
    torch.manual_seed(0)
    network = build_classifier("cifar:resnet8", 10, width=0.25)
    student = Student(network, EmbeddingHead(network.feature_width, 5, 10) if head else None)
    student.network.backbone.eval()  # whatever the mode
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    modes = [module.training for module in student.modules()]
    random = torch.random.get_rng_state()
    try_training_step(student, 16, rows)
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert [module.training for module in student.modules()] == modes


def test_the_trial_finds_what_only_the_head_cannot():
    network = build_classifier("cifar:resnet8", 10, width=0.25)  # its maps hold more than one pixel
    try_training_step(Student(network), 16, 1)
    student = Student(network, EmbeddingHead(network.feature_width, 5, 10))
    assert "one image at a time" in refusal(try_training_step, student, 16, 1)


@pytest.fixture
def weights_of_seven(tmp_path):
    """Weights of a small network for seven classes, in a file without a card."""
    torch.manual_seed(1)
    state = build_classifier("cifar:resnet8", 7, width=0.25).stock_state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "seven.safetensors")
    return tmp_path / "seven.safetensors", state


CLASSES = tuple("abcde")


def test_reset_head_takes_all_but_the_head(weights_of_seven):
    file, theirs = weights_of_seven
    overrides = ["model.width=0.25", f"model.checkpoint={file}"]
    message = refusal(build_network, model_config(*overrides), CLASSES, "model", 8)
    assert "for another number of classes than the data's 5" in message
    assert "model.reset_head=true" in message
    torch.manual_seed(0)
    fresh = build_classifier("cifar:resnet8", 5, width=0.25).stock_state_dict()
    torch.manual_seed(0)
    network, _ = build_network(model_config(*overrides, "model.reset_head=true"), CLASSES, "model", 8)
    for name, tensor in network.stock_state_dict().items():
        assert torch.equal(tensor, (fresh if name.startswith("fc.") else theirs)[name]), name


def test_reset_head_for_other_classes_of_the_same_number(teacher_run):
    overrides = ["model.width=1.0", f"model.checkpoint={teacher_run}"]
    others = tuple("abcdefghij")
    message = refusal(build_network, model_config(*overrides), others, "model", 8)
    assert "was trained for other classes" in message
    assert "model.reset_head=true" in message
    trained = load_file(teacher_run / "student.safetensors")
    network, _ = build_network(model_config(*overrides, "model.reset_head=true"), others, "model", 8)
    ours = network.stock_state_dict()
    same = {name for name, tensor in ours.items() if torch.equal(tensor, trained[name])}
    assert set(ours) - same == {"fc.weight", "fc.bias"}


def test_reset_head_needs_no_head_in_the_file_but_all_else(weights_of_seven):
    file, theirs = weights_of_seven
    config = model_config("model.width=0.25", f"model.checkpoint={file}", "model.reset_head=true")
    save_file({name: tensor for name, tensor in theirs.items() if not name.startswith("fc.")}, file)
    build_network(config, CLASSES, "model", 8)
    save_file({name: tensor for name, tensor in theirs.items() if not name.startswith("conv1.")}, file)
    assert "conv1.weight is missing" in refusal(build_network, config, CLASSES, "model", 8)


@pytest.fixture
def no_download(monkeypatch):
    state = {
        key: torch.full_like(value, 0.25)
        for key, value in timm.create_model("test_resnet").state_dict().items()
    }
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))


@pytest.mark.parametrize("reset", [True, False])
def test_reset_head_of_pretrained_weights_with_as_many_classes(no_download, reset):
    config = model_config("model.name=timm:test_resnet", "model.pretrained=true", f"model.reset_head={reset}")
    network, normalization = build_network(config, tuple(map(str, range(1000))), "model", 32)
    state = network.stock_state_dict()
    assert bool((state["fc.weight"] == 0.25).all()) != reset
    assert (state["conv1.0.weight"] == 0.25).all()
    assert normalization == network.normalization is not None


def test_pretrained_teacher_that_knows_other_classes(no_download, small_config, tmp_path):
    config = small_config(
        tmp_path / "run",
        data={"image_size": 32},
        teacher={"name": "timm:test_resnet", "pretrained": True},
        distiller={"name": "kd"},
    )
    message = refusal(set_up, config, start_cluster("cpu"))
    assert (
        "teacher.pretrained: the weights of timm:test_resnet know 1000 classes, the data have 10" in message
    )


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.reset_head=true"], "reset_head has no effect without checkpoint or pretrained"),
        (["teacher.name=cifar:resnet8", "teacher.checkpoint=x", "teacher.reset_head=true"], "are random"),
        (["model.arguments={a: null}"], "arguments.a is None"),
        (["model.arguments={a: {b: 1}}"], "arguments.a is {'b': 1}"),
        (["model.arguments=3"], "'model.arguments' is 3"),
    ],
)
def test_keys_that_make_no_sense(overrides, reason):
    assert reason in refusal(load_config, None, overrides)
