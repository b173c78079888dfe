"""Folders, files and lists to samples."""

import gc
import os
import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import own
from PIL import Image
from rights import as_nobody, let_enter, needs_root

from maehub import rng
from maehub.data.listing import search
from maehub.data.loader import StepKeys, batches_of
from maehub.data.sources import Pictures, as_samples, find_images, find_samples, groups, select
from maehub.errors import DataError, UsageError
from maehub.images.augment import Augmentation
from maehub.train.pretraining import views
from maehub.train.pretraining.views import Crops


@pytest.fixture
def tree(tmp_path):
    for name in ("b.jpg", "a/2.PNG", "a/10.jpeg", "B.webp", "a/notes.txt", "c/d/e.tiff", "readme", "x.psd", "y.psd",
                 ".hidden.jpg", ".cache/z.jpg", "a/._2.png"):  # fmt: skip
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
    return tmp_path / "photos"


def test_a_folder_is_searched_to_the_bottom_and_sorted_by_bytes(tree):
    samples = find_images(tree)
    names = [samples.name(index) for index in range(len(samples))]
    assert names == [b"B.webp", b"a/10.jpeg", b"a/2.PNG", b"b.jpg", b"c/d/e.tiff"]
    assert list(samples.paths()) == [os.fsencode(tree) + b"/" + name for name in names]
    assert [samples.path(index) for index in range(5)] == list(samples.paths())


def test_ids_follow_from_the_name_below_the_folder(tree, tmp_path):
    samples = find_images(tree)
    assert samples.sample_id(2) == rng.sample_id(b"a/2.PNG")
    moved = tmp_path / "elsewhere"
    tree.rename(moved)
    again = find_images(str(moved))
    assert [again.sample_id(i) for i in range(5)] == [samples.sample_id(i) for i in range(5)]
    assert again.digest() == find_images(os.fsencode(moved)).digest()


def test_one_file_and_a_list_keep_what_was_given(tree):
    samples = find_images(tree / "x.psd")  # named itself, so its ending does not matter
    assert list(samples.paths()) == [os.fsencode(tree / "x.psd")]
    given = [tree / "b.jpg", str(tree / "a/2.PNG"), b"gone.jpg", tree / "b.jpg"]
    assert list(find_images(given).paths()) == [os.fsencode(path) for path in given]


def test_row_46_nothing_there(tree, tmp_path):
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find_images(tmp_path / "foto")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"0 images in .*found nothing"):
        find_images(tmp_path / "empty")
    for name in ("b.jpg", "a/2.PNG", "a/10.jpeg", "B.webp", "c/d/e.tiff"):
        (tree / name).unlink()
    with pytest.raises(DataError) as caught:
        find_images(tree)
    assert f"0 images in {tree}; found 2 .psd, 1 .txt, 1 without an ending" in str(caught.value).replace(
        "1 without an ending, 1 .txt", "1 .txt, 1 without an ending"
    )
    assert len(str(caught.value).splitlines()) <= 6
    with pytest.raises(DataError, match="empty"):
        find_images([])


def test_row_46_loops_of_links_are_cut(tree):
    (tree / "a" / "up").symlink_to(tree)
    (tree / "self").symlink_to("self")
    (tree / "c" / "again").symlink_to(tree / "a")
    names = [os.path.relpath(os.fsdecode(path), tree) for path in find_images(tree).paths()]
    assert [name for name in names if "up" in name or "self" in name] == []
    assert "c/again/2.PNG" in names  # a link that is no loop is followed
    assert len(names) == 7


def test_row_46_odd_names(tmp_path):
    odd = [b"a\nb.jpg", b"\xff\xfe.png", "猫.gif".encode(), b"space .bmp", b'quo"te,.jpg']
    for name in odd:
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(b"x")
    samples = find_images(tmp_path)
    assert [samples.name(index) for index in range(5)] == sorted(odd)
    assert all(os.path.exists(path) for path in samples.paths())


@needs_root
def test_row_46_a_folder_that_may_not_be_read(tree):
    let_enter(tree)
    (tree / "a").chmod(0)
    with as_nobody(), pytest.raises(DataError, match=r"photos/a.* cannot be searched: Permission denied"):
        find_images(tree)
    (tree / "a").chmod(0o755)


def test_row_50_a_million_names_take_little_more_than_their_letters():
    count = 200_000
    samples = find_images([b"folder/picture-%06d.jpg" % index for index in range(count)])
    assert len(samples) == count
    assert samples.name(123_456) == b"folder/picture-123456.jpg"
    assert isinstance(samples.names.letters, bytes)
    assert len(samples.names.letters) + samples.names.ends.nbytes == count * (25 + 8)


def test_row_51_the_digest_tells_another_folder_from_this_one(tree):
    first = find_images(tree).digest()
    assert find_images(tree).digest() == first
    (tree / "b.jpg").write_bytes(b"another size")
    second = find_images(tree).digest()
    (tree / "new.png").write_bytes(b"")
    third = find_images(tree).digest()
    (tree / "new.png").rename(tree / "newer.png")
    assert len({first, second, third, find_images(tree).digest()}) == 4
    samples = find_images(tree)
    before = samples.digest(0, 2)
    (tree / "c/d/e.tiff").unlink()  # the last but one: the first two are as before
    assert find_images(tree).digest(0, 2) == before
    assert samples.digest(3) != find_images(tree).digest(3)  # it is gone, and no error


def test_pictures_in_memory():
    image, array = Image.new("RGB", (4, 3)), np.zeros((3, 4, 3), np.uint8)
    assert len(as_samples(image)) == 1
    both = as_samples([image, array])
    assert isinstance(both, Pictures)
    assert both.path(1) == b"1"
    assert both.digest(0, 1) == both.digest(1, 2) != both.digest()
    stack = as_samples(np.zeros((5, 3, 4, 3), np.uint8))
    assert stack.items[0].shape == (3, 4, 3)
    tensor = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    assert (as_samples(tensor).items[1] == tensor[1].permute(1, 2, 0).numpy()).all()
    ready = as_samples(torch.rand(2, 3, 8, 8))
    assert ready.items[0].shape == (3, 8, 8)
    for wrong in (np.zeros((3, 4, 3), np.uint8), torch.rand(3, 4, 4), ["a.jpg", image], [3]):
        with pytest.raises(UsageError):
            as_samples(wrong)
    with pytest.raises(DataError):
        as_samples(torch.rand(0, 3, 8, 8))


# -- what a run is given


@given(
    st.lists(st.lists(st.sampled_from(["a", "a-", "a.", "b", "a.jpg", "Z", "ä"]), min_size=1, max_size=4), max_size=12)
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_folder_comes_in_the_order_of_the_bytes_of_its_paths(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("tree")
    written = set()
    for parts in paths:
        path = root.joinpath(*parts[:-1], parts[-1] + ".png")
        if not any(above.is_file() for above in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            written.add(os.fsencode(path.relative_to(root)))
    assert list(search(os.fsencode(root), frozenset([b".png"]), Counter())) == sorted(written)


def test_row_50_a_folder_is_searched_in_the_memory_of_one_folder(tmp_path):
    for folder in range(20):
        (tmp_path / f"{folder:02}").mkdir()
        for number in range(200):
            (tmp_path / f"{folder:02}" / f"{'n' * 60}-{number:03}.png").touch()
    find_images(tmp_path)
    tracemalloc.start()
    samples = find_images(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept = len(samples.names.letters) + samples.names.ends.nbytes
    assert len(samples) == 4000
    assert peak < 3 * kept  # a list of them would be more than that alone


class Measured(Crops):
    """By how many kB what a process that reads takes for itself has grown since it began, after each batch."""

    before = None

    def __getitems__(self, keys):
        if self.before is None:
            self.before = own()
        assert len(super().__getitems__(keys).pixels) == len(keys)
        gc.collect()  # as may happen at any time; it writes into every object that it looks at
        return own() - self.before


@pytest.mark.parametrize(("count", "letters"), [(30_000, 440), pytest.param(200_000, 180, marks=pytest.mark.slow)])
def test_row_50_processes_that_read_take_no_more_after_three_epochs(count, letters, monkeypatch):
    """Neither do they copy the names that they share, as counting references does, nor keep what they were asked for.

    As the loop of pretraining reads; nothing is decoded.
    """
    blank = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(views, "crop", lambda source, *_: blank)
    samples = find_images([b"%s/%06d.jpg" % (b"f" * letters, index) for index in range(count)])
    view = views.View((8, 8), 4, 3, Augmentation(), "random", 0.75)
    keys = StepKeys(samples, 500, seed=0, first_step=0, steps=3 * count // 500)
    with batches_of(Measured(samples, view, cache=False), keys, workers=1, pin=False) as batches:
        grown = list(batches)
    assert len(grown) == 3 * count // 500
    assert max(grown) < len(samples.names.letters) / 1024 / 2, grown[:: len(grown) // 9]


def test_what_a_source_says_of_a_file(tree):
    samples = find_samples(tree)
    assert samples.source(0) == samples.path(0) == os.fsencode(tree / "B.webp")
    assert samples.where(0) == str(tree / "B.webp")
    assert samples.size(0) == len("B.webp")
    (tree / "B.webp").unlink()
    assert samples.size(0) == -1
    assert samples.prefetch([0, 1]) is None
    assert find_samples(str(tree / "x.psd")).name(0) == os.fsencode(tree / "x.psd")
    again = pickle.loads(pickle.dumps(samples))  # noqa: S301
    assert again.digest() == samples.digest()


def test_a_list_names_files_line_by_line(tree, tmp_path):
    lines = ["# chosen by hand", "", "photos/b.jpg", f"{tree}/a/2.PNG", "  ", "photos/x.psd", "photos/b.jpg"]
    for end, start in (("\n", ""), ("\r\n", "\ufeff")):
        (tmp_path / "list.txt").write_bytes((start + end.join(lines)).encode())
        samples = find_samples(tmp_path / "list.txt")
        assert [samples.name(i) for i in range(4)] == [
            b"photos/b.jpg", os.fsencode(tree / "a/2.PNG"), b"photos/x.psd", b"photos/b.jpg"
        ]  # fmt: skip
        assert samples.source(0) == os.fsencode(tmp_path / "photos/b.jpg")
        assert samples.source(1) == os.fsencode(tree / "a/2.PNG")
    (tmp_path / "list.txt").write_text("photos/b.jpg\n\nphotos/gone.jpg\n")
    with pytest.raises(DataError, match=r"list\.txt, line 3: there is no file photos/gone\.jpg"):
        find_samples(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("photos\n")
    with pytest.raises(DataError, match="line 1"):  # a folder is no picture
        find_samples(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match="names no file"):
        find_samples(tmp_path / "list.txt")


def test_a_list_moves_with_its_pictures(tree, tmp_path):
    (tmp_path / "list.txt").write_text("photos/b.jpg\nphotos/a/2.PNG\n")
    first = find_samples(tmp_path / "list.txt")
    digest = first.digest()
    moved = tmp_path / "moved"
    moved.mkdir()
    tree.rename(moved / "photos")
    (tmp_path / "list.txt").rename(moved / "list.txt")
    again = find_samples(moved / "list.txt")
    assert again.digest() == digest
    assert [again.sample_id(i) for i in range(2)] == [first.sample_id(i) for i in range(2)]


def test_row_46_what_is_no_source(tmp_path):
    for given_as in (tmp_path / "nothing", tmp_path / "nothing.txt"):
        with pytest.raises(DataError, match="neither a file nor a folder"):
            find_samples(given_as)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"0 images in .*found 1 \.md"):
        find_samples(tmp_path)


def test_a_selection_keeps_names_and_ids(tree):
    samples = find_samples(tree)
    some = select(samples, np.array([3, 0]))
    assert [some.name(i) for i in range(len(some))] == [samples.name(3), samples.name(0)]
    assert some.sample_id(0) == samples.sample_id(3)
    assert (some.source(1), some.where(1), some.size(1)) == (samples.source(0), samples.where(0), samples.size(0))
    assert some.digest() != samples.digest(0, 2)
    assert some.digest(1) == samples.digest(0, 1)
    fewer = select(some, np.array([1]))
    assert fewer.whole is samples
    assert fewer.name(0) == samples.name(0)
    with pytest.raises(DataError, match="no sample"):
        select(samples, np.array([], np.int64))
    for wrong in ([5], [-1]):
        with pytest.raises(UsageError, match="there are 5 samples"):
            select(samples, np.array(wrong))


def test_groups_by_folder(tree):
    samples = find_samples(tree)  # B.webp a/10.jpeg a/2.PNG b.jpg c/d/e.tiff
    deep = select(samples, np.array([1, 4, 2]))
    assert groups(deep, 1).tolist() == [0, 1, 0]
    assert groups(deep, 1).dtype == np.int64
    assert groups(select(samples, np.array([4])), 2).tolist() == [0]
    with pytest.raises(UsageError, match=r"first 1 folders of a name, and B\.webp has 0"):
        groups(samples, 1)
    with pytest.raises(UsageError, match=r"a/10\.jpeg has 1"):
        groups(deep, 2)
    with pytest.raises(UsageError, match="1 or more"):
        groups(deep, 0)
