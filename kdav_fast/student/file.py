"""Students on disk: safetensors with a card that says what the weights are and how they were made."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kdav_fast.checkpoint.manifest import FOLDER_NAME, defect, read_manifest
from kdav_fast.config import Count, DataConfig, Positive, Section, Triple
from kdav_fast.config.section import Lenient
from kdav_fast.errors import InputError, one_line
from kdav_fast.models import Normalization, build_classifier, load_weights
from kdav_fast.runtime.files import write_whole
from kdav_fast.student.student import Student

FILE_NAME = "student.safetensors"
CHECKPOINTS = "checkpoints"
CARD_KEY = "kdav_fast"
"""Where the card lies in a file's metadata."""


def _unlike(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("two classes have one name")
    return names


class StudentCard(Section):
    """Everything that is needed to use the weights of the stock architecture, kept in the file's metadata."""

    name: str
    """The architecture: `timm:NAME`, `torchvision:NAME` or `cifar:NAME`."""
    width: Positive
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of its library's constructor: `timm.create_model(NAME, num_classes=K, **arguments)`."""
    classes: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_unlike)]
    """Class names in the order of the logits."""
    mean: Triple
    std: Annotated[tuple[Positive, Positive, Positive], Lenient]
    """Input normalisation of RGB pixels in 0..1."""
    embedding_width: None = None
    """Files of version 0.1 may say here how wide a head is that is not folded; such a file is not read."""
    data: DataConfig
    """The data it was trained with; evaluation uses its root and sizes unless told otherwise."""
    distiller: str
    probabilistic: bool = False
    """Whether a softmax of the class scores is a distribution: not where they are cosines, as they may be in files that
    do not tell."""
    step: Annotated[int, Field(ge=0)]
    epoch: float
    steps: Count | None = None
    """Optimizer steps that the run was to take; None in files that do not tell."""
    epochs: Positive | None = None
    """The same in epochs: `train.epochs`."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """In which the networks computed; None in files that do not tell."""

    @property
    def normalization(self) -> Normalization:
        return Normalization(self.mean, self.std)

    def unfinished(self, file: Path) -> str:
        """`unfinished: step 8 of 24, epoch 1, FILE` for weights of a run that was not at its end; else empty."""
        if self.steps is None or self.step >= self.steps:
            return ""
        return f"unfinished: step {self.step} of {self.steps}, epoch {self.epoch:g}, {file}"


def write_student(path: Path, weights: dict[str, Tensor], card: StudentCard) -> None:
    """Write weights and card: the same bytes for the same content. A crash leaves the old file or the new one."""
    write_whole(path, student_bytes(weights, card))


def student_bytes(weights: dict[str, Tensor], card: StudentCard) -> bytes:
    """What `write_student` writes."""
    return _with_sorted_metadata(save(weights, {CARD_KEY: card.model_dump_json(), "format": "pt"}))


def _with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file (8 bytes of length, a JSON header, tensors), whose writer shuffles the metadata."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


def read_card(metadata: dict[str, str], file: Path | str = "the file") -> StudentCard | None:
    """The card in the metadata of `file`; None for a file that this program did not write.

    Raises:
        InputError: it is damaged, or of a version with other keys.
    """
    if CARD_KEY not in metadata:
        return None
    try:
        return StudentCard.model_validate_json(metadata[CARD_KEY])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["loc"] == ("embedding_width",):
            raise InputError(
                f"{file} holds a student whose embedding head is not folded into its classifier, as version 0.1 kept "
                "it; export it with that version ('kdav export'), and give the exported file"
            ) from None
        reason = " ".join(f"{'.'.join(map(str, first['loc']))} {first['msg']}".split())
        raise InputError(
            f"{file}: its '{CARD_KEY}' metadata is damaged or of another version ({reason}); export it again, or give "
            "another file"
        ) from None


def find_student_file(path: Path) -> Path:
    """The weights that a path means: a file itself, a run's final student, or its newest checkpoint's.

    Raises:
        InputError: there are none, or the checkpoint is damaged.
    """
    if not path.is_dir():
        return path
    candidates = [path / FILE_NAME, *sorted(path.glob(f"{CHECKPOINTS}/step-*/{FILE_NAME}"), reverse=True)]
    for candidate in candidates:
        if candidate.is_file():
            _check_checkpoint(candidate)
            return candidate
    saved = [path] if FOLDER_NAME.fullmatch(path.name) else path.glob(f"{CHECKPOINTS}/step-*")
    if {folder.name for folder in saved} == {"step-00000000"}:
        raise InputError(
            f"{path} holds no student yet: all that was saved comes before the run's first step; continue the run, or "
            "give another one or a weights file"
        )
    raise InputError(
        f"{path} holds neither {FILE_NAME} nor {CHECKPOINTS}/step-*/{FILE_NAME}; give a run that has "
        "saved something, or a weights file"
    )


def _check_checkpoint(file: Path) -> None:
    """Raise `InputError` if a file lies in a checkpoint's folder and is not what the manifest says."""
    if not FOLDER_NAME.fullmatch(file.parent.name):
        return
    manifest, problem = read_manifest(file.parent)
    record = manifest["files"].get(file.name)
    problem = problem or (defect(file, record) if record else f"{file.name} is not in its manifest")
    if problem:
        raise InputError(f"checkpoint {file.parent} is damaged: {problem}; give the folder of an earlier one")


def read_file_card(file: Path) -> StudentCard:
    """The card of a safetensors file, without its weights.

    Raises:
        InputError: it cannot be read, or has none.
    """
    try:
        with safe_open(file, framework="pt") as content:
            card = read_card(dict(content.metadata() or {}), file)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is not a whole safetensors file ({one_line(error)}); copy it again"
        ) from None
    if card is None:
        raise _without_card(file)
    return card


def _without_card(file: Path) -> InputError:
    return InputError(
        f"{file} carries no '{CARD_KEY}' metadata, so its architecture is unknown; give a run, or a file "
        "that 'kdav export' wrote"
    )


def read_student(path: Path) -> tuple[Student, StudentCard]:
    """Rebuild a student from a file that `write_student` wrote.

    Args:
        path: a file, or a folder as in `find_student_file`.

    Raises:
        InputError: no such file, no card in it, or weights that do not fit the card.
    """
    file = find_student_file(path)
    weights, metadata = load_weights(file)
    card = read_card(metadata, file)
    if card is None:
        raise _without_card(file)
    network = build_classifier(
        card.name,
        len(card.classes),
        width=card.width,
        image_size=card.data.image_size,
        arguments=card.arguments,
    )
    try:
        network.load_stock_state_dict(weights)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return Student(network).eval(), card


def read_stock_weights(path: Path) -> tuple[dict[str, Tensor], StudentCard | None]:
    """Weights under the stock architecture's names from any file of weights, and its card if it has one.

    Raises:
        InputError: the file cannot be used.
    """
    file = find_student_file(path)
    weights, metadata = load_weights(file)
    return weights, read_card(metadata, file)
