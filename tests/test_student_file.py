import torch
from safetensors import safe_open

from kdav_fast.config import DataConfig
from kdav_fast.student_file import StudentCard, read_card, write_student

CARD = StudentCard(
    name="cifar:resnet8",
    width=1.0,
    classes=("Hähnchen", "b"),
    mean=(0.5, 0.5, 0.5),
    std=(0.1, 0.1, 0.1),
    embedding_width=None,
    data=DataConfig(),
    distiller="none",
    step=3,
    epoch=0.1,
)
WEIGHTS = {"b": torch.randn(3, 5), "a": torch.arange(7), "c": torch.randn(2).half()}


def test_equal_content_is_equal_bytes(tmp_path):
    """safetensors' own writer orders two entries of metadata at random, one time out of two."""
    files = [tmp_path / f"{i}.safetensors" for i in range(30)]
    for file in files:
        write_student(file, WEIGHTS, CARD)
    assert len({file.read_bytes() for file in files}) == 1


def test_other_readers_find_weights_and_card(tmp_path):
    file = tmp_path / "student.safetensors"
    write_student(file, WEIGHTS, CARD)
    with safe_open(file, "pt") as stored:
        assert set(stored.keys()) == set(WEIGHTS)
        for name, tensor in WEIGHTS.items():
            assert torch.equal(stored.get_tensor(name), tensor)
        metadata = stored.metadata()
    assert metadata["format"] == "pt"
    assert read_card(metadata) == CARD
