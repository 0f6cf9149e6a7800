"""What the author of a method got wrong, said when the run is set up and not in the middle of it."""

from torch import nn

from kdav_fast.data.views import ClassPairs, Rotations, Shuffled, Views
from kdav_fast.distillers.base import Distiller, Learned
from kdav_fast.distillers.phases import Fit, Measure
from kdav_fast.student.heads import FoldableHead


def check_method(distiller: Distiller) -> None:
    """Raise `TypeError`, which says what its file must give, unless a distiller is what `Distiller` asks for."""
    for name, _ in distiller.named_parameters():
        raise TypeError(
            f"it has the parameter {name}, which nothing would train; what is trained belongs in its learned() or its "
            "head()"
        )
    if not isinstance(distiller.order, Shuffled | Views | Rotations | ClassPairs):
        raise TypeError(
            f"its order is {distiller.order!r}; give Shuffled(), Views(), Rotations() or ClassPairs()"
        )
    head = distiller.head()
    if head is not None and not isinstance(head, FoldableHead):
        raise TypeError(
            f"its head() gives a {type(head).__name__}; give a FoldableHead of student/heads.py, or None"
        )
    learned = distiller.learned()
    _check_learned(learned)
    _check_phases(distiller.phases(), set(learned))


def follows_the_student(distiller: Distiller) -> bool:
    """Whether it wants to hear of every step."""
    return type(distiller).after_step is not Distiller.after_step


def _check_learned(learned: dict[str, Learned]) -> None:
    for name, one in learned.items():
        if not isinstance(one, Learned):
            raise TypeError(f"its learned() gives a {type(one).__name__} for {name!r}; give Learned(module)")
        if "." in name or hasattr(nn.ModuleDict, name):
            raise TypeError(
                f"its learned() has the name {name!r}, which no module can have; give another one"
            )
    seen = {}
    for name, one in learned.items():
        for parameter in one.module.parameters():
            other = seen.setdefault(parameter, name)
            if other != name:
                raise TypeError(
                    f"its learned() gives a parameter of {other!r} again in {name!r}; give each once"
                )


def _check_phases(phases: object, learned: set[str]) -> None:
    if not isinstance(phases, tuple | list):
        raise TypeError(f"its phases() gives a {type(phases).__name__}; give a tuple of Measure and Fit")
    for phase in phases:
        if not isinstance(phase, Measure | Fit):
            raise TypeError(f"its phases() hold a {type(phase).__name__}; give Measure or Fit")
        if isinstance(phase, Measure):
            continue
        if isinstance(phase.modules, str):
            raise TypeError(
                f"its phase {phase.name!r} trains the text {phase.modules!r}; give a tuple of names"
            )
        if unknown := [name for name in phase.modules if name not in learned]:
            raise TypeError(
                f"its phase {phase.name!r} trains {unknown[0]!r}, which is not in its learned() "
                f"({', '.join(sorted(learned)) or 'nothing is'})"
            )
