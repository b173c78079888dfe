"""Saved datasets and Parquet files, written by the datasets library and by pyarrow."""

import io
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from maehub import rng
from maehub.data import tables
from maehub.data.sources import find_samples, groups, select
from maehub.errors import DataError, MissingDependencyError, UsageError
from maehub.images.decoding import open_image

datasets = pytest.importorskip("datasets")
arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def png(number):
    file = io.BytesIO()
    Image.new("L", (8 + number, 6), number).save(file, "PNG")
    return file.getvalue()


def dataset(numbers, column="picture"):
    rows = {"label": list(numbers), column: [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]}
    return datasets.Dataset.from_dict(rows).cast_column(column, datasets.Image())


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """Two Parquet files with several row groups."""
    (tmp_path / "data").mkdir()
    dataset(range(7)).to_parquet(tmp_path / "data" / "a-0.parquet", batch_size=3)
    dataset(range(7, 9)).to_parquet(tmp_path / "data" / "a-1.parquet")
    return tmp_path / "data"


def check_all(samples):
    assert len(samples) == 9
    assert [samples.source(index).getvalue() for index in range(9)] == [png(number) for number in range(9)]
    assert [samples.size(index) for index in range(9)] == [len(png(number)) for number in range(9)]
    assert open_image(samples.source(8)).size == (16, 6)


def test_parquet_files(folder, tmp_path):
    samples = find_samples(folder, index_dir=tmp_path / "index")
    check_all(samples)
    assert samples.name(8) == b"a-1.parquet/1"
    assert samples.where(8) == f"{folder}/a-1.parquet, row 1"
    assert samples.sample_id(6) == rng.sample_id(b"a-0.parquet/6")
    assert groups(samples, 1).tolist() == [0] * 7 + [1] * 2
    assert select(samples, np.array([8])).source(0).getvalue() == png(8)
    assert any((tmp_path / "index").rglob("*.arrow"))
    for pattern in (f"{folder}/*.parquet", f"{folder}/a-{{0,1}}.parquet"):
        again = find_samples(pattern, index_dir=tmp_path / "index")
        check_all(again)
        assert again.digest() == samples.digest()
    one = find_samples(folder / "a-1.parquet")
    assert [one.name(index) for index in range(len(one))] == [b"a-1.parquet/0", b"a-1.parquet/1"]


def test_a_file_that_changed_is_copied_again(folder, tmp_path):
    before = find_samples(folder, index_dir=tmp_path / "index").digest()
    dataset(range(7, 10)).to_parquet(folder / "a-1.parquet")
    os.utime(folder / "a-1.parquet", ns=(10**18, 10**18))
    samples = find_samples(folder, index_dir=tmp_path / "index")
    assert len(samples) == 10
    assert samples.source(9).getvalue() == png(9)
    assert samples.digest() != before


def test_a_saved_dataset(tmp_path):
    dataset(range(9)).save_to_disk(tmp_path / "saved", num_shards=2)
    samples = find_samples(tmp_path / "saved")
    check_all(samples)
    assert (samples.name(4), samples.where(4)) == (b"4", f"{tmp_path}/saved, row 4")
    with pytest.raises(UsageError, match="0 has 0"):
        groups(samples, 1)
    shuffled = dataset(range(9)).select([3, 1, 2])  # an index over the table
    shuffled.save_to_disk(tmp_path / "some")
    some = find_samples(tmp_path / "some")
    assert [some.source(index).getvalue() for index in range(3)] == [png(3), png(1), png(2)]
    assert [some.size(index) for index in range(3)] == [len(png(number)) for number in (3, 1, 2)]


def test_splits_are_named_one_by_one(tmp_path):
    datasets.DatasetDict({"train": dataset(range(2)), "test": dataset(range(1))}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="several splits; name one: test, train"):
        find_samples(tmp_path / "saved")
    assert len(find_samples(tmp_path / "saved" / "train")) == 2


def test_the_column_of_pictures(tmp_path):
    rows = dataset(range(2)).add_column("raw", [b"a", b"b"])
    rows.save_to_disk(tmp_path / "image-and-bytes")
    assert find_samples(tmp_path / "image-and-bytes").column == "picture"
    two = rows.add_column("other", [{"bytes": png(5), "path": None}] * 2).cast_column("other", datasets.Image())
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(UsageError, match="several columns of pictures: picture, other"):
        find_samples(tmp_path / "two")
    chosen = find_samples(tmp_path / "two", column="other")
    assert chosen.source(0).getvalue() == png(5)
    with pytest.raises(UsageError, match="no column 'nothing'; its columns: label, picture"):
        find_samples(tmp_path / "two", column="nothing")
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="no column of pictures; its columns: x"):
        find_samples(tmp_path / "none")


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_parquet_that_another_program_wrote(tmp_path, kind):
    cells = [png(1), png(2)]
    if kind == "struct":
        column = arrow.array([{"bytes": cell, "path": None} for cell in cells])
    else:
        column = arrow.array(cells, getattr(arrow, kind)())
    parquet.write_table(arrow.table({"id": [7, 8], "scan": column}), tmp_path / "x.parquet")
    samples = find_samples(tmp_path / "x.parquet")
    assert samples.column == "scan"
    assert [samples.source(index).getvalue() for index in range(2)] == cells


def test_rows_without_a_picture(tmp_path):
    column = arrow.array([{"bytes": png(1), "path": None}, {"bytes": None, "path": "far/away.png"}, None])
    parquet.write_table(arrow.table({"scan": column}), tmp_path / "x.parquet")
    samples = find_samples(tmp_path / "x.parquet")
    assert [samples.size(index) for index in range(3)] == [len(png(1)), -1, -1]
    with pytest.raises(DataError, match=r"x\.parquet, row 1: its column 'scan' holds only the path 'far/away.png'"):
        samples.source(1)
    with pytest.raises(DataError, match=r"x\.parquet, row 2: its column 'scan' holds nothing"):
        samples.source(2)


def test_files_that_cannot_be_read(folder, tmp_path):
    (folder / "a-2.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"a-2\.parquet cannot be read"):
        find_samples(folder)
    parquet.write_table(arrow.table({"x": [1]}), folder / "a-2.parquet")
    with pytest.raises(DataError, match=r"a-0\.parquet and its like cannot be read as one table"):
        find_samples(folder)
    with pytest.raises(DataError, match=r"gone\.parquet cannot be read: No such file"):
        find_samples(folder / "gone.parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a saved dataset"):
        find_samples(tmp_path / "saved")
    parquet.write_table(arrow.table({"x": arrow.array([], arrow.binary())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError):
        find_samples(tmp_path / "empty.parquet")


def _read_all(samples, queue):
    queue.put([samples.source(index).getvalue() for index in range(len(samples))])


def test_other_processes_read_the_same(folder):
    samples = find_samples(folder)
    expected = [png(number) for number in range(9)]
    assert samples.source(3).getvalue() == png(3)
    again = pickle.loads(pickle.dumps(samples))  # noqa: S301
    assert [again.source(index).getvalue() for index in range(9)] == expected
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_read_all, args=(samples, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()


def test_without_the_library(folder, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(tables.importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'maehub\[data\]'"):
        find_samples(folder)
