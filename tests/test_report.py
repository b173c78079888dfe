"""The report of a run: one page, whole, harmless, and true to the run folder."""

import base64
import io
import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from maehub.errors import CheckpointError, UsageError
from maehub.train.curves import Series, chart, decimated, smoothed, tick_words
from maehub.train.report import read_metrics, write_report

CONFIG = {
    "data": "photos/",
    "out": "runs/a",
    "model": "vit-nano",
    "from_": "",
    "image_size": [],
    "mask_ratio": 0.75,
    "strategy": "random",
    "target": "pixels",
    "steps": 40,
    "epochs": None,
    "batch_size": 16,
    "crop_scale": [0.2, 1.0],
    "hflip": True,
    "seed": 7,
    "environment": {"maehub": "0.1.0", "device": "a CPU", "memory_gb": 25.3, "processes": 2},
}
VOID = {"meta", "img", "br", "i"}


class Page(HTMLParser):
    """The page's elements, its words, and whether what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert set(self.open) <= {"html"}, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


def write_run(folder, *, config=CONFIG, steps=40, validations=(0, 20, 40), state="completed", lines=(), pictures=()):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    saved = {"state": state, "exit_code": 0, "last_good_step": 40, "reason": "secret/place/patient.jpg is broken"}
    (folder / "run.json").write_text(json.dumps(saved))
    entries = []
    for step in range(steps + 1):
        if step:
            rate = {"images_per_second": 32.0, "data_wait": 0.25, "memory_gb": 1.5}
            entries.append({"step": step, "loss": 1 + 1 / step, "lr": 1e-3 * step / 40} | rate)
        if step in validations:
            simple = {"mean_fill": 1.25, "interpolation": 0.5, "effective_rank": 10.0 + step}
            entries.append({"step": step, "val_loss": 2 - step / 40 if step < 40 else 1.5} | simple)
    text = "\n".join([*map(json.dumps, entries), *lines])
    (folder / "metrics.jsonl").write_text(text + "\n")
    (folder / "pictures").mkdir(exist_ok=True)
    for step in pictures:
        noise = np.random.default_rng(step).integers(0, 255, (60, 1400, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"step-{step}.png")
    return folder


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_facts_of_a_finished_run(tmp_path):
    page = page_of(write_run(tmp_path / "my run", pictures=(20, 40)))
    assert page.text.startswith("my run")
    for fact in (
        "completed",
        "A fresh vit-nano, trained to predict pixels of the 75 % of patches that are hidden (random) in crops of 96×96",
        "40 steps of 16 views",
        "steps 40 of 40",
        "views seen 640",
        "validation loss 1.5 at the end",
        "best validation loss 1.5 at step 20",
        "loss of mean fill 1.25; the model has 1.20 of it",
        "loss of linear interpolation 0.5; the model has 3.00 of it",
        "effective rank 50 at the end, 10 at first",
        "images/s 32, the median",
        "time of the steps 20.0 s",
        "waiting for pictures 25.0 % of the time",
        "memory 1.5 GB at most",
        "newest checkpoint step 40",
        "device a CPU",
        "memory, GB 25.3",
        "Step 20",
        "Step 40",
    ):
        assert fact in page.text, fact
    assert "patient" not in page.text  # the reason in run.json may name the user's files


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = page_of(write_run(tmp_path / "run", pictures=(20, 40)))
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("href", "srcset")]
    assert len(page.values("src")) == 2
    assert all(value.startswith("data:image/") for value in page.values("src"))
    text = (tmp_path / "run" / "report.html").read_text()
    assert "default-src 'none'" in text
    assert "http" not in re.sub(r'content="[^"]*"|http-equiv', "", text)
    assert "url(" not in text


def test_pictures_are_spread_and_made_smaller(tmp_path):
    steps = range(10, 210, 10)
    page = page_of(write_run(tmp_path / "run", pictures=steps))
    shown = [int(step) for step in re.findall(r"Step (\d+)", page.text)]
    assert shown[0] == 10
    assert shown[-1] == 200
    assert len(shown) == 6
    gaps = np.diff(shown)
    assert gaps.max() - gaps.min() <= 10
    picture = Image.open(io.BytesIO(base64.b64decode(page.values("src")[0].partition(",")[2])))
    assert picture.size == (1000, 43)


def test_a_broken_picture_is_said_and_left_out(tmp_path):
    run = write_run(tmp_path / "run", pictures=(10, 20))
    (run / "pictures" / "step-20.png").write_bytes(b"\x89PNG broken")
    (run / "pictures" / "step-x.png").write_bytes(b"")
    page = page_of(run)
    assert "The picture of step 20 cannot be read." in page.text
    assert len(page.values("src")) == 1


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


def test_names_cannot_put_elements_into_the_page(tmp_path):
    config = dict.fromkeys(CONFIG, EVIL) | {EVIL: EVIL, "environment": {EVIL: EVIL, "device": [EVIL]}}
    lines = [json.dumps({"step": 5, EVIL: 1.0, "val_loss": EVIL, "loss": None})]
    run = write_run(tmp_path / "<b onmouseover=x>run", config=config, state=EVIL, lines=lines, pictures=(1,))
    page = page_of(run)
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert "b" not in [tag for tag, _, _ in page.attributes]
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<b onmouseover=x>run" in page.text
    assert page.text.count("alert(1)") >= len(CONFIG) - 1


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            "preempted",
            "It was stopped from outside and goes on with --resume. The newest checkpoint is that of step 40.",
        ),
        ("running", "It was still running when this page was written, or was killed."),
        ("diverged", "The loss or a gradient was not finite."),
        ("failed", "It ended with exit code 0. The newest checkpoint is that of step 40. run.json says why."),
    ],
)
def test_a_run_that_was_stopped(tmp_path, state, words):
    page = page_of(write_run(tmp_path / "run", steps=13, validations=(), state=state, lines=['{"step": 14, "lo']))
    assert words in page.text
    assert "steps 13 of 40" in page.text
    assert "validation loss" not in page.text


def test_a_run_of_a_single_step(tmp_path):
    page = page_of(write_run(tmp_path / "run", steps=1, validations=(0,)))
    assert "1 step of 16 views" in page.text
    assert "steps 1 of 40" in page.text
    assert page.tags.count("svg") >= 4
    assert not re.search(r"\b(nan|inf)\b", (tmp_path / "run" / "report.html").read_text().lower())


@pytest.mark.parametrize("metrics", [None, "", "\n\n", "[]\n{}\nnull\n", '{"step": 1, "loss": null}\n'])
def test_a_run_without_numbers(tmp_path, metrics):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "run.json").unlink()
    if metrics is not None:
        (run / "metrics.jsonl").write_text(metrics)
    page = page_of(run)
    assert "No step was written yet." in page.text
    assert "unknown" in page.text
    assert "svg" not in page.tags


def test_what_is_no_number_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 2, "loss": 1.5, "a": true, "b": "x", "c": [1], "d": 1e999}\n\xff\xfe\n{"step": "3", "loss": 1}\n'
        b'{"step": 1, "loss": 2}\n{"step": -1, "loss": 2}\n{"loss": 3}\n{"step": 3, "loss": NaN}\n{"step": 4, "lo'
    )
    found = read_metrics(path)
    assert list(found) == ["loss"]
    assert found["loss"].steps.tolist() == [1, 2]
    assert found["loss"].values.tolist() == [2, 1.5]


def test_settings_that_are_not_the_default_are_marked(tmp_path):
    write_report(write_run(tmp_path / "run"))
    text = (tmp_path / "run" / "report.html").read_text()
    marked = re.findall(r'<tr class="changed"><th>([^<]*)', text)
    assert marked == ["data", "out", "target", "steps", "batch-size", "seed"]
    assert "<tr><th>crop-scale</th><td>0.2 1</td>" in text
    assert "<tr><th>hflip</th><td>yes</td>" in text


def test_a_hundred_thousand_steps_are_fast_and_small(tmp_path):
    run = write_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    with open(run / "metrics.jsonl", "w") as file:
        for step, noise in enumerate(rng.normal(0, 0.01, 100_000), start=1):
            facts = {"step": step, "loss": 0.5 + noise, "lr": 1e-3, "images_per_second": 1000.0, "data_wait": 0.0}
            file.write(json.dumps(facts) + "\n")
    start = time.perf_counter()
    path = write_report(run)
    assert time.perf_counter() - start < 10
    assert path.stat().st_size < 200_000
    assert "100,000 steps of 16 views" in Page(path.read_text()).text


def test_decimation_keeps_the_ends_and_every_peak():
    values = np.zeros(50_000)
    values[[7, 31_234]] = 5, -3
    steps, kept = decimated(np.arange(50_000), values)
    assert len(kept) <= 602
    assert (steps[0], steps[-1]) == (0, 49_999)
    assert {5, -3} <= set(kept)
    assert (np.diff(steps) > 0).all()


def test_smoothing_is_the_mean_of_the_window():
    values = np.array([0.0, 3, 6, 3, 0, 9])
    assert smoothed(values, 3).tolist() == [0, 3, 4, 3, 4, 9]
    assert smoothed(values, 1).tolist() == values.tolist()
    assert smoothed(np.full(100, 2.5), 11) == pytest.approx(2.5)


def coordinates(svg):
    return [tuple(map(float, pair)) for pair in re.findall(r"(?<=[ML])(-?[\d.]+) (-?[\d.]+)", svg)]


@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0], [-4.0, 2.0, -1.0], [1e-6, 1.0, 1e6], [1e-300] * 3, [3.0]],
)
def test_curves_stay_inside_the_axes(values):
    svg = chart([Series("loss", np.arange(len(values)), np.array(values))], "loss")
    found = coordinates(svg)
    assert len(found) >= len(values)
    assert all(0 <= x <= 440 and 0 <= y <= 210 for x, y in found)
    assert "nan" not in svg
    assert "inf" not in svg


def test_higher_is_higher_and_later_is_further_right():
    (x0, y0), (x1, y1) = coordinates(chart([Series("", np.array([0, 10]), np.array([1.0, 2.0]))], ""))[-2:]
    assert x1 > x0
    assert y1 < y0
    assert chart([Series("", np.array([]), np.array([]))], "") == ""


def test_tick_words():
    numbers = (0, 0.25, 12_000, 3e6, 1.5e-4, 2e-4, -0.5)
    assert [tick_words(number) for number in numbers] == ["0", "0.25", "12k", "3M", "1.5e-4", "2e-4", "-0.5"]


def test_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "report.html").mkdir()
    with pytest.raises(CheckpointError, match=r"report\.html"):
        write_report(run)
