"""The labelled sets that the benchmarks build: what is read, kept and written. Nothing is downloaded."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from labelled_files import read_labelled
from PIL import Image

from maehub.errors import DataError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import labelled_data
from labelled_data import Found, Kept, check, pickled_bytes, write


def picture(value, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(value).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def kept(*pictures):
    found = Kept()
    for one in pictures:
        found.add(one)
    return found


class Trap:
    """What a pickle can do to who loads it."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_the_array_of_a_pickle_is_read_as_data(kind):
    array = np.arange(3000, dtype=kind).reshape(30, 100)
    found = np.frombuffer(pickled_bytes(pickle.dumps(array, protocol=4)), kind).reshape(array.shape)
    np.testing.assert_array_equal(found, array)


def test_nothing_in_a_pickle_is_executed():
    array = np.arange(3000, dtype=np.uint8)
    assert pickled_bytes(pickle.dumps([Trap(), array], protocol=4)) == array.tobytes()
    with pytest.raises(DataError, match="2 long byte strings"):
        pickled_bytes(pickle.dumps([array, array + 1], protocol=4))


def test_the_same_picture_is_kept_once_and_an_ambiguous_one_not_at_all():
    found = kept(
        Found("a", "first", picture(0)),
        Found("a", "again", picture(0)),
        Found("a", "both", picture(1)),
        Found("b", "both", picture(1)),
        Found("b", "other", picture(2)),
    )
    assert [(one.label, one.name) for one in found.chosen().values()] == [("a", "first"), ("b", "other")]
    assert str(found) == (
        "2 of 5 pictures (1 were there twice in one class, 1 left out since they are in several classes)"
    )


def test_pixels_are_compared_before_pictures_are_made_smaller():
    wide = picture(0, (600, 300))
    changed = wide.copy()
    changed.putpixel((5, 5), tuple(255 - part for part in wide.getpixel((5, 5))))
    found = kept(Found("a", "one", wide), Found("a", "two", changed))
    assert [one.image.size for one in found.chosen().values()] == [(256, 128)] * 2


def test_the_digest_tells_pixels_names_and_classes():
    one = kept(Found("a", "x", picture(0)), Found("b", "y", picture(1)))
    turned = kept(Found("b", "y", picture(1)), Found("a", "x", picture(0)))
    others = [
        kept(Found("a", "x", picture(0)), Found("b", "y", picture(2))),
        kept(Found("a", "x", picture(0)), Found("b", "z", picture(1))),
        kept(Found("a", "x", picture(0)), Found("a", "y", picture(1))),
    ]
    assert one.digest() == turned.digest()
    assert len({one.digest(), *(other.digest() for other in others)}) == 4


def test_a_package_that_holds_something_else_is_refused():
    with pytest.raises(DataError, match="digits: the package holds"):
        check("digits", kept(Found("0", "00000", picture(0))))


def test_what_is_written_is_a_labelled_folder(tmp_path):
    found = kept(*(Found(label, f"{number}", picture(number)) for number in range(6) for label in "ab"[number % 2]))
    write(tmp_path / "set", "About it.", "A licence.", found)
    labelled = read_labelled(tmp_path / "set")
    assert labelled.classes == ("a", "b")
    assert labelled.counts.tolist() == [3, 3]
    assert "6 of 6 pictures" in (tmp_path / "set" / "README.txt").read_text()
    assert (tmp_path / "set" / "LICENCE.txt").read_text() == "A licence."
    for number in range(6):
        written = Image.open(tmp_path / "set" / "ab"[number % 2] / f"{number}.png")
        np.testing.assert_array_equal(np.asarray(written), np.asarray(picture(number)))


def test_a_set_that_is_there_is_not_touched(tmp_path, monkeypatch, capsys):
    (tmp_path / "digits").mkdir()
    monkeypatch.setattr(sys, "argv", ["labelled-data", str(tmp_path)])
    monkeypatch.setattr(labelled_data, "run", lambda *command, folder: pytest.fail("something was downloaded"))
    assert labelled_data.main() == 5
    assert "is there already" in capsys.readouterr().err
