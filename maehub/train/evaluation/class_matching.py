"""Which output of a classifier stands for which class of the data: by names, by a certain order, or as a file says."""

import csv
from collections.abc import Sequence
from pathlib import Path

from maehub.data import Labelled, label_name, mapped
from maehub.errors import DataError, UsageError, first_names, log
from maehub.files import check_regular
from maehub.train.evaluation.text_tables import printable

_GIVE = (
    "Give --classes-from FILE: a text file whose line i names the class of output i (from 0), or a .csv with the "
    "columns folder,class, where class is a name or a number of the model's classes"
)


def match_classes(
    labelled: Labelled, names: Sequence[str], classes: int, classes_from: Path | None, model: str, data: str
) -> tuple[Labelled, list[int]]:
    """Match the classes of labelled pictures with the outputs of a classifier, or refuse to guess.

    Gives the pictures, their labels being places in the classes that are scored, and the output of each such class.

    Args:
        labelled: with its own classes.
        names: of the outputs; empty where the model has none.
        classes: how many outputs.
        classes_from: a file that says it; see ``EvaluateConfig``.
        model, data: for messages.

    Raises:
        DataError: they cannot be matched with certainty.
        UsageError: the file does not fit the model.
    """
    if classes_from is not None:
        listed = _read_file(classes_from, names, classes)
        return mapped(labelled, tuple(listed), f"{data} (see {classes_from})"), list(listed.values())
    known = tuple(map(label_name, names))
    if known:
        try:
            return mapped(labelled, known, data), list(range(classes))
        except DataError as error:
            raise DataError(f"{error}. {_GIVE}") from error
    order = _certain_order(labelled.classes, classes)
    if order is None:
        has = f"{printable(data)} has {len(labelled.classes)}: {first_names(list(map(printable, labelled.classes)), 3)}"
        raise DataError(
            f"{model} does not name its {classes} classes, and {has}. They are matched by their order only where they "
            f"are the numbers 0 to {classes - 1} or the wordnet ids of ImageNet. {_GIVE}"
        )
    log.info(
        "%s does not name its %d classes: matched by their order, from %s to %s", model, classes, order[0], order[-1]
    )
    return mapped(labelled, order, data), list(range(classes))


def _certain_order(folders: Sequence[str], classes: int) -> tuple[str, ...] | None:
    """The folders in the order of the outputs, where there is no doubt about it."""
    if len(folders) != classes:
        return None
    if all(name.isdecimal() for name in folders):
        ordered = tuple(sorted(folders, key=int))
        return ordered if [int(name) for name in ordered] == list(range(classes)) else None
    from timm.data.imagenet_info import ImageNetInfo

    published = tuple(ImageNetInfo("imagenet-1k").label_names())
    return published if set(published) == set(folders) else None


def _read_file(path: Path, names: Sequence[str], classes: int) -> dict[str, int]:
    """Folders to outputs."""
    try:
        check_regular(path, UsageError)
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                rows = [[cell.strip() for cell in cells] for cells in csv.reader(file, strict=True) if cells]
            else:
                rows = [[line.strip(), str(number)] for number, line in enumerate(file.read().splitlines())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if path.suffix.lower() == ".csv":
        if not rows or rows[0] != ["folder", "class"]:
            raise UsageError(f"{path}: its first line must be folder,class")
        rows = rows[1:]
    elif len(rows) != classes:
        raise UsageError(f"{path} has {len(rows)} lines and the model {classes} outputs: one line an output, in order")
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        numbers.setdefault(label_name(name), []).append(number)
    listed: dict[str, int] = {}
    for line, cells in enumerate(rows, 1):
        folder, *rest = map(label_name, cells)
        places = numbers.get(rest[0], []) if len(rest) == 1 else []
        if not places and len(rest) == 1 and rest[0].isdecimal() and int(rest[0]) < classes:
            places = [int(rest[0])]
        if not folder or len(places) != 1 or folder in listed:
            raise UsageError(
                f"{path}, row {line}: {cells!s:.80} does not name one more folder and one class of the model"
            )
        listed[folder] = places[0]
    if len(set(listed.values())) < max(2, len(listed)):
        raise UsageError(f"{path}: two folders or more are needed, each of another class")
    return listed
