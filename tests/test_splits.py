"""Splits: given ones as they are; made ones by hashes of names, with whole groups and every class on both sides."""

import logging
import shutil
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_files import lay, table, words, write_csv, write_tar
from sklearn.model_selection import StratifiedGroupKFold

from maehub.data.labels import Labelled
from maehub.data.listing import Names
from maehub.data.sources import Samples
from maehub.data.splits import folds, inner_split, measured_part, split_labelled
from maehub.errors import DataError, UsageError


def names(labelled):
    return {labelled.samples.name(index) for index in range(len(labelled))}


def made_of(labels, groups=None):
    """Labelled pictures that are nowhere."""
    labels = np.asarray(labels)
    samples = Samples(b"", Names.of(b"%d.png" % number for number in range(len(labels))))
    classes = tuple("abcdefghijkl"[: labels.shape[1] if labels.ndim == 2 else labels.max() + 1])
    return Labelled(samples, labels, classes, None if groups is None else np.asarray(groups, np.int64))


def classes_of(labelled, indices):
    return set(np.flatnonzero(labelled.take(indices).counts).tolist())


# --- given splits -----------------------------------------------------------------------------------------------------


def test_train_and_val_are_used_as_they_are(tmp_path, caplog):
    folder = lay(tmp_path / "d", *(f"train/{name}/{n}.png" for name in ("dog", "ant", "cat") for n in range(3)))
    lay(folder, "val/cat/7.png", "val/ant/8.png", "val/cat/9.png")
    split = split_labelled(folder)
    assert not split.made
    assert (len(split.training), split.training.classes) == (9, ("ant", "cat", "dog"))
    assert split.testing.classes == ("ant", "cat", "dog")
    assert words(split.testing) == {"ant/8.png": "ant", "cat/7.png": "cat", "cat/9.png": "cat"}
    assert "no picture to measure on of the classes dog" in caplog.text
    assert names(measured_part(folder)) == names(split.testing)
    lay(folder, "val/emu/1.png", "val/emu/2.png")
    with pytest.raises(DataError, match=r"d/val has classes .* not among the 3 known ones: emu \(pictures: 2\)"):
        split_labelled(folder)


def test_other_names_of_the_testing_side(tmp_path, caplog):
    folder = lay(tmp_path / "d", *(f"{side}/{name}/1.png" for side in ("train", "test") for name in ("ant", "cat")))
    assert len(split_labelled(folder).testing) == 2
    assert caplog.text == ""
    lay(folder, "validation/ant/2.png", "validation/cat/2.png")
    assert names(split_labelled(folder).testing) == {b"ant/2.png", b"cat/2.png"}
    assert "d/validation; test in" in caplog.text


def test_a_group_on_both_sides_of_a_given_split(tmp_path):
    sides = {"train": ("p1", "p2", "p3", "p4", "p5"), "val": ("p6", "p7")}
    folder = tmp_path / "d"
    for side, patients in sides.items():
        lay(folder, *(f"{side}/{name}/{patient}/{n}.png" for name in "ab" for patient in patients for n in (1, 2)))
    split = split_labelled(folder, group="2")
    assert not set(split.training.groups.tolist()) & set(split.testing.groups.tolist())
    lay(folder, "val/a/p2/9.png")
    with pytest.raises(
        DataError, match=r"1 groups .* p2 \(pictures to train on: 4, to measure on: 1\)\. Move"
    ) as raised:
        split_labelled(folder, group="2")
    assert raised.value.exit_code == 5
    lay(folder, *(f"val/a/{patient}/9.png" for patient in ("p1", "p4", "p5")))
    with pytest.raises(DataError, match=r"4 groups .* p1 \(.* p2 \(.* p4 \([^)]*\), …\."):
        split_labelled(folder, group="2")
    assert not split_labelled(folder).made  # nobody asked


def test_a_split_in_a_csv(tmp_path, caplog):
    lay(tmp_path, *(f"{n}.png" for n in range(6)))
    lines = ["0.png,cat,train,p", "1.png,dog,Train,q", "2.png,dog,train,q", "3.png,cat,test,r", "4.png,dog,val,s"]
    path = write_csv(tmp_path, "\n".join(["path,label,split,who", *lines]))
    split = split_labelled(path, group="who")
    assert words(split.training) == {"0.png": "cat", "1.png": "dog", "2.png": "dog"}
    assert words(split.testing) == {"4.png": "dog"}
    assert "measured on its rows of val; those of test are not read" in caplog.text
    assert "no picture to measure on of the classes cat" in caplog.text
    assert not split.made
    assert names(measured_part(path)) == {b"4.png"}
    for line, match in (
        ("5.png,emu,val,t", r"not among the 2 known ones: emu \(pictures: 1\)"),
        (
            "5.png,cat,val,q",
            r"1 groups are on both sides of the split: q \(pictures to train on: 2, to measure on: 1\)",
        ),
    ):
        with pytest.raises(DataError, match=match):
            split_labelled(write_csv(tmp_path, "\n".join(["path,label,split,who", *lines, line])), group="who")
    for rows, match in (
        (["0.png,cat,train,p", "1.png,dog,train,p"], "no row in it is to measure on, only train"),
        (["0.png,cat,val,p", "1.png,dog,test,p"], "no row in it is to train on, only test, val"),
        (["0.png,cat,train,p", "1.png,dog,test,p"], "for training are of one class, cat"),
    ):
        with pytest.raises(DataError, match=match):
            split_labelled(write_csv(tmp_path, "\n".join(["path,label,split,who", *rows])))


def test_a_saved_dataset_with_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {"train": table({"label": ["a", "b", "b"]}), "validation": table({"label": ["b", "a"]})}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    split = split_labelled(tmp_path / "saved")
    assert (split.training.labels.tolist(), split.testing.labels.tolist(), split.made) == ([0, 1, 1], [1, 0], False)


def test_shards_of_two_folders_may_have_the_same_names(tmp_path):
    for side in ("train", "val"):
        write_tar(tmp_path / side / "0.tar", [("p/a", 0), ("p/b", 1)])
    assert len(split_labelled(tmp_path, group="shard").testing) == 2
    with pytest.raises(DataError, match="1 groups are on both sides of the split: p "):
        split_labelled(tmp_path, group="1")


# --- made splits ------------------------------------------------------------------------------------------------------


def test_a_split_is_made_of_every_class(tmp_path):
    sizes = {"ant": 20, "bee": 7, "cat": 2}
    folder = lay(tmp_path / "d", *(f"{name}/{n}.png" for name, size in sizes.items() for n in range(size)))
    split = split_labelled(folder)
    assert split.made
    assert not names(split.training) & names(split.testing)
    assert split.testing.counts.tolist() == [4, 1, 1]
    assert split.training.counts.tolist() == [16, 6, 1]
    assert names(split_labelled(folder, seed=1).testing) != names(split.testing)
    assert split_labelled(folder, share=0.5).testing.counts.tolist() == [10, 3, 1]
    assert len(measured_part(folder)) == 29
    shutil.move(folder, tmp_path / "elsewhere")
    assert names(split_labelled(tmp_path / "elsewhere").testing) == names(split.testing)
    lay(tmp_path / "elsewhere", *(f"ant/more-{n}.png" for n in range(5)))
    grown = split_labelled(tmp_path / "elsewhere")
    was_there = {name for name in names(grown.testing) if b"more" not in name}
    assert len(was_there ^ names(split.testing)) <= 2
    shutil.move(tmp_path / "elsewhere", folder / "train")
    assert names(split_labelled(folder).testing) == names(grown.testing)  # DIR/train without DIR/val


def test_groups_stay_whole(tmp_path):
    folder = lay(tmp_path / "d", *(f"{name}/p{n % 10}/{n}.png" for name in ("ant", "bee") for n in range(40)))
    split = split_labelled(folder, group="2")
    assert split.testing.counts.tolist() == [8, 8]
    assert len(set(split.testing.groups.tolist())) == 2
    assert not set(split.training.groups.tolist()) & set(split.testing.groups.tolist())


def test_splits_that_cannot_be_made(tmp_path):
    folder = lay(tmp_path / "d", *(f"{name}/p{n % 3}/{n}.png" for name in ("ant", "bee") for n in range(6)))
    with pytest.raises(UsageError, match="above 0 and below 1, not 1"):
        split_labelled(folder, share=1)
    lay(folder, "cat/p1/1.png")
    with pytest.raises(
        DataError, match=r"leave class cat out of one side: it has one picture, .*cat/p1/1\.png"
    ) as raised:
        split_labelled(folder)
    assert raised.value.exit_code == 5
    lay(folder, "cat/p1/2.png")
    assert split_labelled(folder).testing.counts.tolist() == [1, 1, 1]
    with pytest.raises(DataError, match="leave class cat out of one side: all 2 pictures of it are in one group, p1"):
        split_labelled(folder, group="2")


def test_groups_that_cannot_leave_every_class_on_both_sides(tmp_path, caplog):
    pairs = ("a/1", "a/2", "b/2", "b/3", "c/1", "c/3")  # whichever goes, the others must stay
    folder = lay(tmp_path / "d", *(f"{pair}/{n}.png" for pair in pairs for n in range(3)))
    split = split_labelled(folder, group="2")
    assert (split.training.counts > 0).all()
    assert (split.testing.counts > 0).sum() == 2
    assert "no picture to measure on of the classes" in caplog.text


def test_several_labels_are_split_too(tmp_path, caplog):
    lay(tmp_path, *(f"{n}.png" for n in range(40)))
    cells = ["|".join(name for name, step in (("a", 2), ("b", 3), ("c", 5)) if n % step == 0) for n in range(40)]
    cells[7] = "rare"
    split = split_labelled(write_csv(tmp_path, "path,label\n" + "".join(f"{n}.png,{c}\n" for n, c in enumerate(cells))))
    assert split.training.multi_label
    counts = dict(zip(split.testing.classes, split.testing.counts.tolist(), strict=True))
    assert counts.pop("rare") == 0
    whole = {name: sum(name in cell.split("|") for cell in cells) for name in "abc"}
    assert all(abs(counts[name] - 0.2 * whole[name]) <= 1 for name in "abc")
    assert "to measure on of the classes rare" in caplog.text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=80), st.integers(0, 9), st.floats(0.05, 0.95))
def test_an_inner_split_is_stratified(labels, seed, share):
    labels = [0, 0, *labels]
    labelled = made_of(labels)
    train, held = inner_split(labelled, share=share, seed=seed)
    assert sorted([*train, *held]) == list(range(len(labels)))
    for number, count in enumerate(np.bincount(labels)):
        taken = (labelled.labels[held] == number).sum()
        if count > 1:
            assert 1 <= taken < count
            assert abs(taken - share * count) <= 1
        elif count:
            assert taken == 0
    again = inner_split(made_of(labels), share=share, seed=seed)
    assert again.held.tolist() == held.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=6, max_size=80), st.integers(0, 9), st.data()
)
def test_groups_are_never_on_both_sides(pairs, seed, data):
    labels, members = (list(column) for column in zip(*pairs, strict=True))
    labelled = made_of(labels, members)
    order = np.array(data.draw(st.permutations(range(len(pairs)))))
    try:
        train, held = inner_split(labelled, seed=seed)
    except DataError:
        spread = {label: {group for other, group in pairs if other == label} for label in labels}
        assert all(any(len(spread[label]) == 1 for label, other in pairs if other == group) for group in members)
        return
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert not set(labelled.groups[train].tolist()) & set(labelled.groups[held].tolist())
    assert classes_of(labelled, train) == set(labels)
    again = inner_split(labelled.take(order), seed=seed).held  # the same groups, in whatever order the pictures are
    assert {members[place] for place in order[again]} == {members[place] for place in held}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(2, 7), st.integers(0, 9))
def test_folds_are_stratified(labels, count, seed):
    labels = [0, 0, *labels]
    labelled = made_of(labels)
    made = folds(labelled, count, seed)
    of_class = np.bincount(labels)
    assert len(made) == min(count, of_class[of_class > 1].sum())
    held = np.concatenate([fold.held for fold in made])
    assert sorted(held) == [place for place, label in enumerate(labels) if of_class[label] > 1]
    for fold in made:
        assert len(fold.held)
        assert sorted([*fold.train, *fold.held]) == list(range(len(labels)))
        assert classes_of(labelled, fold.train) == set(labels)
    counts = np.array([np.bincount(np.array(labels)[fold.held], minlength=4) for fold in made])
    assert (np.ptp(counts, axis=0) <= 1).all()
    again = folds(made_of(labels), count, seed)
    assert all((one.held == other.held).all() for one, other in zip(made, again, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=4, max_size=60), st.integers(2, 5))
def test_folds_of_groups(pairs, count):
    labels, members = (list(column) for column in zip(*pairs, strict=True))
    labelled = made_of(labels, members)
    try:
        made = folds(labelled, count, 0)
    except DataError:
        return
    held = np.concatenate([fold.held for fold in made])
    assert len(held) == len(set(held.tolist()))
    for fold in made:
        assert len(fold.held)
        assert not {members[place] for place in fold.train} & {members[place] for place in fold.held}


def test_folds_of_groups_as_even_as_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    ours, theirs = [], []
    for seed in range(10):
        members = np.repeat(np.arange(60), generator.integers(1, 20, 60))
        labels = (members % 4 + (generator.random(len(members)) < 0.3)) % 4
        labelled = made_of(labels, members)
        parts = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, members)
        for made, found in ((folds(labelled, 5, seed), ours), (parts, theirs)):
            counts = np.array([np.bincount(labels[held], minlength=4) for _, held in made])
            found.append(np.abs(counts / np.bincount(labels) - 0.2).max())
        _, held = inner_split(labelled, seed=seed)
        assert np.abs(np.bincount(labels[held], minlength=4) / np.bincount(labels) - 0.2).max() < 0.08
    assert np.mean(ours) <= 1.1 * np.mean(theirs)


def test_what_folds_say(caplog):
    with pytest.raises(UsageError, match="2 folds or more, not 1"):
        folds(made_of([0, 0, 1, 1]), 1, 0)
    with pytest.raises(DataError, match="4 training pictures cannot be cross-validated"):
        folds(made_of([0, 0, 1, 1], [0, 0, 1, 1]), 2, 0)
    with pytest.raises(DataError, match="2 training pictures cannot be split once more"):
        inner_split(made_of([0, 1]))
    assert len(folds(made_of([0, 1, 0, 1, 2]), 2, 0)) == 2
    assert "since they are in one picture: the classes c" in caplog.text
    with caplog.at_level(logging.WARNING, "maehub"):
        made = folds(made_of([0, 1, 0, 2, 1, 2], [0, 0, 1, 1, 2, 2]), 2, 0)  # three groups, each two of three classes
    assert len(made) == 2
    assert "is fitted on no picture of the classes" in caplog.text


def test_a_large_split_is_quick():
    labelled = made_of(np.random.default_rng(0).integers(0, 12, 20_000))
    started = time.perf_counter()
    _, held = inner_split(labelled)
    folds(labelled, 5, 0)
    assert time.perf_counter() - started < 20  # one second on a free core
    assert abs(len(held) - 4000) <= 12
