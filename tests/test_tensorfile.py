"""Fault rows 22 to 24 and 36: what a safetensors file must not do to its reader."""

import gzip
import json
import os
import pickle
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak
from safetensors.torch import load_file, save_file

from maehub.errors import IntegrityError, UsageError
from maehub.files import sha256_file
from maehub.weights.tensorfile import MAX_HEADER_BYTES, read_header, read_tensors, write_tensors

TENSORS = {
    "blocks.0.weight": torch.arange(12.0).reshape(3, 4),
    "half": torch.arange(5).half(),
    "brain": torch.arange(3).bfloat16(),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
    "whole": torch.arange(3),
}


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    write_tensors(path, TENSORS, {"format": "pt", "by": "maehub"})
    return path


def test_what_is_written_is_read_by_us_and_by_safetensors(good):
    assert_same(read_tensors(good).tensors, TENSORS)
    assert read_tensors(good).metadata == {"format": "pt", "by": "maehub"}
    assert_same(load_file(good), TENSORS)


def test_what_safetensors_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"a": "b"})
    assert_same(read_tensors(tmp_path / "theirs.safetensors").tensors, TENSORS)


def test_the_same_content_gives_the_same_bytes_and_its_hash(tmp_path):
    metadata = {str(number): "x" for number in range(20)}
    first = write_tensors(tmp_path / "a", TENSORS, metadata)
    backwards = dict(reversed(TENSORS.items()))
    second = write_tensors(tmp_path / "b", backwards, dict(reversed(metadata.items())))
    assert first == second == sha256_file(tmp_path / "a") == sha256_file(tmp_path / "b")


def test_dtype_is_of_the_floating_tensors(tmp_path):
    write_tensors(tmp_path / "a", TENSORS, dtype=torch.bfloat16)
    dtypes = {name: entry.dtype for name, entry in read_header(tmp_path / "a").tensors.items()}
    assert dtypes.pop("whole") == torch.int64
    assert set(dtypes.values()) == {torch.bfloat16}


def test_an_existing_file_is_not_written_over(good):
    with pytest.raises(FileExistsError):
        write_tensors(good, TENSORS)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_row_36_file_mode_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a", TENSORS)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=400))
def test_row_22_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("random") / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(IntegrityError):
        read_tensors(path)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_row_22_any_truncation_or_growth_is_refused(good, tmp_path_factory, data):
    content = good.read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    path.write_bytes(content[:length] if data.draw(st.booleans()) else content + content[: length + 1])
    with pytest.raises(IntegrityError):
        read_tensors(path)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_row_22_any_bit_flip_is_refused_harmless_or_caught_by_the_hash(good, tmp_path_factory, data):
    content = bytearray(good.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, header - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "x.safetensors"
    path.write_bytes(content)
    assert sha256_file(path) != sha256_file(good)  # which is how a flip in the data is caught
    try:
        tensors = read_tensors(path).tensors
    except IntegrityError:
        return
    if place >= header:
        return  # a flip in the data

    def table(tensors):
        return {name: (value.dtype, value.shape) for name, value in tensors.items()}

    if table(tensors) == table(TENSORS):  # other names or shapes are refused by the strict build
        assert_same(tensors, TENSORS)


def file_of(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.zeros(3)}
    if kind == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 343223968\n")
    elif kind == "html":
        path.write_text("\n<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>")
    elif kind == "zip":
        torch.save(tensors, path)
        assert zipfile.is_zipfile(path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    elif kind == "gzip":
        path.write_bytes(gzip.compress(b"x" * 100))
    elif kind == "json":
        path.write_text('{"error": "Repository not found"}')
    elif kind == "empty":
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("lfs", "Git LFS pointer.*git lfs pull"),
        ("html", "HTML"),
        ("zip", "PyTorch pickle.*maehub convert"),
        ("pickle", "Python pickle.*maehub convert"),
        ("gzip", "gzip"),
        ("json", "JSON.*error message"),
        ("empty", "empty.*0 bytes"),
    ],
)
def test_row_23_the_error_says_what_it_is_instead(kind, words, tmp_path):
    with pytest.raises(IntegrityError, match=words) as caught:
        read_tensors(file_of(kind, tmp_path))
    assert str(caught.value).count("\n") < 6
    assert "model.safetensors" in str(caught.value)


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path):
    """A header of 640 bytes begins with the bytes of a pickle."""
    names = {"x" * 500: torch.zeros(1)}
    for length in range(520, 700):
        path = tmp_path / str(length)
        write_tensors(path, names, {"pad": "p" * (length - 520)})
        assert read_header(path).tensors
        if path.read_bytes()[:2] == b"\x80\x02":
            return
    raise AssertionError("no header of 640 bytes was made")


def crafted(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "header over 100 MB": crafted({"a": entry()}, bytes(8), length=200_000_000),
    "header over the file": crafted({"a": entry()}, bytes(8), length=2**63),
    "deep JSON": crafted(b'{"a":' + b"[" * 5_000_000),
    "deep objects": crafted(b'{"a":' * 1_000_000),
    "overlap": crafted({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "the same range twice": crafted({"a": entry(), "b": entry()}, bytes(8)),
    "hole": crafted({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "bytes at the end": crafted({"a": entry()}, bytes(9)),
    "duplicate key": crafted(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "duplicate inside": crafted(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "unknown dtype": crafted({"a": entry("F33")}, bytes(8)),
    "dtype no text": crafted({"a": entry([])}, bytes(8)),
    "negative shape": crafted({"a": entry(shape=(-1, -2))}, bytes(8)),
    "huge shape": crafted({"a": entry(shape=(2**62, 2**62))}, bytes(8)),
    "overflowing shape": crafted({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "huge number": crafted(b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,8]}}' % (b"9" * 100_000), bytes(8)),
    "many dimensions": crafted({"a": entry(shape=(1,) * 1000 + (2,))}, bytes(8)),
    "float shape": crafted({"a": entry(shape=(2.0,))}, bytes(8)),
    "bool shape": crafted({"a": entry(shape=(True, 2))}, bytes(8)),
    "negative offsets": crafted({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "offsets past the end": crafted({"a": entry(offsets=(0, 2**40))}, bytes(8)),
    "three offsets": crafted({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
    "extra field": crafted({"a": entry() | {"more": 1}}, bytes(8)),
    "entry no object": crafted({"a": 3}),
    "metadata no text": crafted({"__metadata__": {"a": 1}, "b": entry()}, bytes(8)),
    "metadata no object": crafted({"__metadata__": "a", "b": entry()}, bytes(8)),
    "no tensors": crafted({}),
    "no JSON": crafted(b"{nonsense}"),
    "no UTF-8": crafted(b'{"\xff\xfe":1}'),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_row_24_hostile_headers_are_refused_at_once(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[kind])
    start = time.process_time()
    with peak() as grown, pytest.raises(IntegrityError) as caught:
        read_tensors(path)
    assert time.process_time() - start < 1
    assert grown[0] < 50_000  # kB
    assert len(str(caught.value)) < 600


def test_row_24_a_large_header_of_duplicates_is_refused_at_once(tmp_path):
    many = b",".join(b'"%d":1' % number for number in range(400_000))
    path = tmp_path / "x.safetensors"
    path.write_bytes(crafted(b'{%b,"0":1}' % many))
    assert path.stat().st_size < MAX_HEADER_BYTES
    start = time.process_time()
    with pytest.raises(IntegrityError, match="'0' is given twice"):
        read_tensors(path)
    assert time.process_time() - start < 2


def test_no_file_a_folder_and_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match=r"no file|not a file"):
            read_tensors(path)
