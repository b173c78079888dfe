"""The confusion matrix as a picture, and sheets of pictures: what is drawn where, for any number of classes."""

import numpy as np
import pytest
from PIL import Image

from maehub.errors import UsageError
from maehub.train.evaluation.plots import confusion_picture, contact_sheet
from maehub.train.evaluation.scores import score

WHITE = (255, 255, 255)


def scored(confusion, names=None):
    """Scores with this confusion matrix."""
    confusion = np.asarray(confusion)
    true, taken = np.nonzero(confusion)
    labels, guesses = (np.repeat(places, confusion[true, taken]) for places in (true, taken))
    logits = np.eye(len(confusion), dtype=np.float32)[guesses]
    return score(logits, labels, names or tuple(f"class {place}" for place in range(len(confusion))))


def cells(picture, classes):
    """The colours of the matrix, (classes, classes, 3): of each cell one pixel near its corner, off the text."""
    pixels = np.asarray(picture).astype(int)
    side = max(1, min(72, 1300 // classes))
    bottom = picture.height - 24 - max(0, 240 - side * classes)
    top, left = bottom - side * classes, np.flatnonzero((pixels[bottom] == 228).all(axis=1))[0] + 1
    places = np.arange(classes) * side + min(2, side - 1)
    return pixels[top + places][:, left + places]


@pytest.mark.parametrize("classes", [2, 10, 40, 100, 300, 1000])
def test_the_diagonal_of_a_perfect_model_is_dark_and_all_else_is_white(classes):
    picture = confusion_picture(scored(np.eye(classes, dtype=int) * 3))
    assert picture.mode == "RGB"
    assert max(picture.size) < 1800
    found = cells(picture, classes)
    own = np.eye(classes, dtype=bool)
    assert (found[own] < 70).all()
    assert (found[~own] == 255).all()


def test_a_colour_is_the_share_of_its_row():
    confusion = [[90, 9, 1], [900, 90, 10], [0, 5, 5]]
    found = cells(confusion_picture(scored(confusion)), 3)
    assert np.array_equal(found[0], found[1])  # ten times as many in the same shares
    light = found.sum(axis=2)
    assert light[0, 0] < light[2, 1] == light[2, 2] < light[0, 1] < light[0, 2] < light[2, 0] == 3 * 255


def ink(picture):
    return int((np.asarray(picture.convert("L")) < 128).sum())


def test_counts_and_names_are_written_while_they_fit():
    few = scored(np.full((4, 4), 7))
    renamed = scored(np.full((4, 4), 7), ("ant", "bee", "cat", "dog"))
    assert confusion_picture(few).size != confusion_picture(renamed).size  # names take room
    more = confusion_picture(scored(np.full((4, 4), 8)))
    assert more.size == confusion_picture(few).size
    assert more.tobytes() != confusion_picture(few).tobytes()  # the counts are other ones
    # Of 200 classes places are written instead of names.
    many = [tuple(f"{word} {place}" for place in range(200)) for word in ("ant", "a much longer name")]
    pictures = [confusion_picture(scored(np.eye(200, dtype=int), names)) for names in many]
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_any_name_can_be_drawn():
    names = ("猫", "two\nlines", "\udcff\ud800", "x" * 400, "", r"$\frac{1$")
    picture = confusion_picture(scored(np.eye(6, dtype=int), names))
    assert picture.width < 1000
    # Names that the font lacks stand there as their places, so they can be told apart.
    boxes = [confusion_picture(scored(np.eye(2, dtype=int), pair)) for pair in (("猫", "犬"), ("猫", "猫"))]
    assert boxes[0].tobytes() == boxes[1].tobytes()
    assert boxes[0].tobytes() == confusion_picture(scored(np.eye(2, dtype=int), ("class 0", "class 1"))).tobytes()


def test_very_many_classes_share_rows():
    picture = confusion_picture(scored(np.eye(2100, dtype=int)))
    assert max(picture.size) < 1800
    assert ink(picture) > 1000


def test_a_class_without_pictures_has_a_white_row():
    found = cells(confusion_picture(scored([[5, 0, 0], [0, 0, 0], [0, 1, 4]])), 3)
    assert (found[1] == 255).all()


def test_there_is_no_matrix_where_a_picture_may_have_several_classes():
    with pytest.raises(UsageError, match="several classes"):
        confusion_picture(score(np.ones((3, 2)), np.array([[True, False]] * 3), ("a", "b")))


# --- sheets


def test_a_sheet_has_every_picture_in_a_frame_of_its_colour():
    colours = [(200, 30, 200), (30, 200, 200), (200, 200, 30), (10, 10, 200), (90, 90, 90)]
    sizes = [(50, 50), (400, 100), (3, 90), (200, 200), (1, 1)]
    pictures = [Image.new("RGB", size, colour) for size, colour in zip(sizes, colours, strict=True)]
    sheet = contact_sheet(pictures, ["true: a\npredicted: b 97 %"] * 5, [True, False, True, False, False], columns=3)
    pixels = np.asarray(sheet).reshape(-1, 3)
    for (width, height), colour in zip(sizes, colours, strict=True):
        area = (pixels == colour).all(axis=1).sum()
        assert area == pytest.approx(200 * 200 * min(width, height) / max(width, height), abs=100)
    frame = 208**2 - 200**2
    assert (pixels == (38, 128, 62)).all(axis=1).sum() == 2 * frame
    assert (pixels == (178, 24, 24)).all(axis=1).sum() == 3 * frame


def test_a_sheet_takes_grey_pictures_one_picture_and_any_caption():
    grey = Image.new("L", (20, 30), 128)
    plain, long = (contact_sheet([grey], [text], [False]) for text in ("a", "x" * 500))
    assert plain.size == long.size  # cut, not wider
    assert ink(long) > ink(plain) > 0
    contact_sheet([grey], ["猫 \udcff\nb\nc"], [False])
    titled = contact_sheet([grey], ["a"], [False], title="the worst mistakes of a model with a name")
    assert titled.width > plain.width
    assert titled.height > plain.height


def test_a_sheet_needs_as_many_captions_as_pictures():
    grey = Image.new("L", (20, 30))
    for arguments in (([], [], []), ([grey], [], [True]), ([grey], ["a"], [])):
        with pytest.raises(UsageError):
            contact_sheet(*arguments)
