import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kdav_fast.config import DataConfig
from kdav_fast.errors import InputError
from kdav_fast.models import build_classifier
from kdav_fast.student.file import (
    StudentCard,
    read_card,
    read_file_card,
    read_stock_weights,
    read_student,
    write_student,
)

CARD = StudentCard(
    name="cifar:resnet8",
    width=1.0,
    classes=("Hähnchen", "b"),
    mean=(0.5, 0.5, 0.5),
    std=(0.1, 0.1, 0.1),
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


@pytest.mark.parametrize("text", ["", '{"a":', "[]", "[" * 100_000, "{}", CARD.model_dump_json()[:-2]])
@pytest.mark.parametrize("read", [read_file_card, read_stock_weights])
def test_a_damaged_card_is_told_in_one_short_line_with_the_file(tmp_path, text, read):
    file = tmp_path / "student.safetensors"
    save_file(WEIGHTS, file, {"kdav_fast": text})
    with pytest.raises(InputError) as error:
        read(file)
    message = str(error.value)
    assert message.startswith(f"{file}: its 'kdav_fast' metadata is damaged or of another version (")
    assert message.endswith("); export it again, or give another file")
    assert message.count(str(file)) == 1
    assert "http" not in message


@pytest.mark.parametrize("read", [read_file_card, read_stock_weights, read_student])
def test_a_head_that_is_not_folded_is_told_what_to_do(tmp_path, read):
    """Version 0.1 kept heads apart: without them, its classifier answers nonsense."""
    file = tmp_path / "student.safetensors"
    save_file(
        WEIGHTS, file, {"kdav_fast": json.dumps(CARD.model_dump(mode="json") | {"embedding_width": 12})}
    )
    with pytest.raises(InputError) as error:
        read(file)
    assert str(error.value) == (
        f"{file} holds a student whose embedding head is not folded into its classifier, as version 0.1 kept it; "
        "export it with that version ('kdav export'), and give the exported file"
    )


def test_a_student_of_a_method_that_is_not_known_here_is_read(tmp_path):
    file = tmp_path / "student.safetensors"
    network = build_classifier(CARD.name, 2)
    write_student(file, network.stock_state_dict(), CARD.model_copy(update={"distiller": "later"}))
    student, card = read_student(file)
    assert card.distiller == "later"
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(student(images).logits, network.eval()(images).logits)
