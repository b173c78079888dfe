"""The report of a run: one page, whole, harmless, and true to the run folder."""

import base64
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

from maehub.errors import SPACES, CheckpointError, DivergedError, UsageError, visible
from maehub.figures.plots import Series, curves_picture, curves_svg, decimated, number_text, smoothed
from maehub.models.encoder import PRESETS, EncoderConfig
from maehub.train import FinetuneConfig, PretrainConfig, finetune
from maehub.train.evaluation.scores import score
from maehub.train.finetuning import job as finetuning
from maehub.train.reports.report import read_metrics, write_report

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


def kind_of(folder):
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        return PretrainConfig
    return FinetuneConfig if isinstance(config, dict) and config.get("kind") == "finetune" else PretrainConfig


def page_of(folder):
    path = write_report(folder, kind_of(folder))
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


@pytest.mark.parametrize("name", ["\x1b]0;title\x07", "\x9b2J", "\u202egpj.exe", "fl\udce8che"])
def test_names_cannot_steer_the_terminal_that_shows_the_page(tmp_path, name):
    run = write_run(tmp_path / "run", config=dict.fromkeys(CONFIG, name) | {name: name}, state=name)
    page_of(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert ascii(name)[1:-1] in text
    assert visible(text, SPACES) == text


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
    write_report(write_run(tmp_path / "run"), PretrainConfig)
    text = (tmp_path / "run" / "report.html").read_text()
    assert marked(text) == ["data", "out", "target", "steps", "batch-size", "seed"]
    assert "<tr><th>crop-scale</th><td>0.2 1</td>" in text
    assert "<tr><th>hflip</th><td>yes</td>" in text


def test_a_hundred_thousand_steps_are_fast_and_small(tmp_path):
    run = write_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    with open(run / "metrics.jsonl", "w") as file:
        for step, noise in enumerate(rng.normal(0, 0.01, 100_000), start=1):
            facts = {"step": step, "loss": 0.5 + noise, "lr": 1e-3, "images_per_second": 1000.0, "data_wait": 0.0}
            file.write(json.dumps(facts) + "\n")
    start = time.process_time()
    path = write_report(run, PretrainConfig)
    assert time.process_time() - start < 10
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


def coordinates(svg, colour=0):
    """Of the curves of a colour."""
    paths = re.findall(rf'<path d="([^"]*)" style="fill: none; [^"]*stroke: var\(--c{colour}\)', svg)
    return [tuple(map(float, pair)) for path in paths for pair in re.findall(r"[ML] (\S+) (\S+)", path)]


EXTREME = [
    *([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0], [-4.0, 2.0, -1.0], [1e-6, 1.0, 1e6], [1e-300] * 3, [3.0]),
    *([1e300, 2e300], [7.0, 7.0 + 1e-12]),
]


@pytest.mark.parametrize("values", EXTREME)
def test_curves_stay_inside_the_axes(values):
    series = [Series("loss", np.arange(len(values)), np.array(values))]
    svg = curves_svg("loss", series)
    found = coordinates(svg)
    assert len(found) >= len(values) > 1 or svg.count("<use") == len(values) == 1
    assert all(0 <= x <= 440 and 0 <= y <= 210 for x, y in found)
    assert "nan" not in svg
    assert "inf" not in svg
    picture = curves_picture("loss", series)
    assert picture.size == (900, 380)
    assert len(picture.getcolors(2**16)) > 10


def test_higher_is_higher_and_later_is_further_right():
    (x0, y0), (x1, y1) = coordinates(curves_svg("", [Series("", np.array([0, 10]), np.array([1.0, 2.0]))]))
    assert x1 > x0
    assert y1 < y0
    nothing = [Series("", np.array([]), np.array([]))]
    assert curves_svg("", nothing) == ""
    assert curves_picture("", nothing) is None


def test_axes_say_what_they_count():
    rates = curves_svg("", [Series("", np.array([0, 20_000]), np.array([1e-6, 1e-3]))])
    words = r"<text[^>]*>([^<]*)<"
    assert re.findall(words, rates) == ["0", "5000", "10k", "15k", "20k", "1e-6", "1e-5", "1e-4", "0.001"]
    few = curves_svg("", [Series("", np.array([1, 2]), np.array([1.25, 1.255]))])
    assert re.findall(words, few) == ["1", "2", "1.25", "1.252", "1.254"]
    alone = curves_svg("", [Series("", np.array([7]), np.array([0.5]))])
    assert re.findall(words, alone)[0] == "7"


def test_curves_have_the_colours_of_the_page_and_the_same_bytes_each_time():
    series = [
        Series("$a$", np.arange(100), np.arange(100.0), colour, style)
        for colour, style in enumerate(("line", "faint", "dashed", "points"))
    ]
    svg = curves_svg('"a" & <b>', series)
    assert all(f"stroke: var(--c{colour})" in svg for colour in range(4))
    assert not re.search(r"#(?!m\w+\")", svg)  # but for marks, which are named by their content
    assert 'aria-label="&quot;a&quot; &amp; &lt;b&gt;: 0 at first, 99 at the end"' in svg
    assert svg.count("<text") == svg.count("</text>") > 4
    assert curves_svg('"a" & <b>', series) == svg
    assert curves_picture("a", series).tobytes() == curves_picture("a", series).tobytes()


def test_settings_of_matplotlib_are_neither_used_nor_changed():
    series = [Series("a", np.arange(3), np.arange(3.0))]
    plain, drawn = curves_svg("a", series), curves_picture("a", series).tobytes()
    with matplotlib.rc_context({"text.usetex": True, "lines.linestyle": ":", "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        assert curves_svg("a", series) == plain
        assert curves_picture("a", series).tobytes() == drawn
        assert dict(matplotlib.rcParams) == before


def test_nothing_is_imported_before_something_is_drawn():
    code = """
import sys, numpy as np
from maehub.figures.plots import Series, curves_svg
import maehub.train.evaluation.plots, maehub.train.reports.report, maehub.publishing.repository
assert not {"matplotlib", "jinja2", "sklearn"} & set(sys.modules)
assert curves_svg("a", [Series("a", np.arange(3), np.arange(3.0))])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_short_numbers():
    numbers = (0, 0.25, 12_000, 3e6, 1.5e-4, 2e-4, -0.5)
    assert [number_text(number) for number in numbers] == ["0", "0.25", "12k", "3M", "1.5e-4", "2e-4", "-0.5"]


def test_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path, PretrainConfig)
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path, PretrainConfig)


def test_a_report_that_cannot_be_written(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "report.html").mkdir()
    with pytest.raises(CheckpointError, match=r"report\.html"):
        write_report(run, PretrainConfig)


# --- runs of fine-tuning ----------------------------------------------------------------------------------------------


TINY = EncoderConfig(32, 8, 3, 32, 2, 2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "vit-tiny", TINY)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Noise, of three classes that cannot be told apart."""
    folder = tmp_path_factory.mktemp("labelled")
    for number, kind in enumerate(("ash & elm", "birch", "cedar")):
        (folder / kind).mkdir()
        for tree in range(10):
            noise = np.random.default_rng(100 * number + tree).integers(0, 255, (36, 40, 3))
            Image.fromarray(noise.astype(np.uint8)).save(folder / kind / f"tree-{tree}.png")
    return folder


def settings_of(data, out, **changes):
    usual = {"model": "untrained/vit-tiny", "steps": 8, "batch_size": 8, "workers": 0, "device": "cpu", "quiet": True}
    return FinetuneConfig(str(data), out, **(usual | {"skip_twins": True, "validate_every": 3} | changes))


def written(run):
    """The page that the run itself wrote."""
    return Page((run / "report.html").read_text(encoding="utf-8"))


def marked(text):
    return re.findall(r'<tr class="changed"><th>([^<]*)', text)


def class_rows(run):
    table = re.search(r'<table class="classes.*?</table>', (run / "report.html").read_text(), re.DOTALL)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table[0].split("</tr>")[1:-1]]


@pytest.fixture(scope="module")
def finished(labelled, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "vit-tiny", TINY)
        out = tmp_path_factory.mktemp("finished") / "run"
        return finetune(settings_of(labelled, out, hflip=False, mixup=0.3, warmup=0.25))


def test_a_finished_fine_tuning_run(finished):
    page, scores = written(finished.run), finished.scores
    for fact in (
        "completed",
        "vit-tiny from fresh weights, trained by the recipe scratch on 24 pictures of 3 classes: 8 steps of 8 ",
        f"top-1 {scores.top1:.1f} % (95 % interval {scores.low:.1f} to {scores.high:.1f}, Wilson; n = 6)",
        f"balanced accuracy {scores.balanced_accuracy:.1f} %",
        f"calibration error {scores.calibration_error:.1f} %",
        f"loss {scores.loss:.4g} nats",
        "33.3 % for always the most frequent class",
        "pictures held out by --seed, at the last step",
        "not looked for (--skip-twins)",
        "; of mixed labels, smoothed labels",
        "steps 8 of 8",
        "pictures seen 64",
        "Step 3",
        "Step 6",
        "Step 8",
        "Hardware and versions",
    ):
        assert fact in page.text, fact
    assert "top-5" not in page.text  # of three classes it says nothing
    assert "best" not in page.text  # nothing is chosen on the held-out pictures
    labels = page.values("aria-label")
    for curve in ("Calibration", "Loss", "Right on held-out", "Learning rate", "Images a second", "Norm"):
        assert sum(label.startswith(curve) for label in labels) == 1, curve
    pictures = page.values("alt")
    assert pictures[0] == "The confusion matrix"
    assert pictures[-3:] == [f"Held-out pictures at step {step}" for step in (3, 6, 8)]


def test_the_page_of_a_classifier_needs_nothing_and_names_no_picture(finished):
    page = written(finished.run)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert all(value.startswith("data:image/") for value in page.values("src"))
    assert "tree-" not in page.text
    assert not [value for _, _, value in page.attributes if "tree-" in value]


def test_settings_of_the_recipe_and_of_the_run_are_marked_where_they_were_given(finished):
    page = (finished.run / "report.html").read_text()
    recipe, settings = page[page.index("<h2>Recipe") :].split("<h2>Settings")
    assert marked(recipe) == ["batch-size", "mixup", "steps", "warmup"]
    assert "<th>randaugment</th><td>rand-m9-mstd0.5-inc1</td>" in recipe
    assert "<th>mixup</th><td>0.3</td>" in recipe
    rates = read_metrics(finished.run / "metrics.jsonl")["lr"].values
    assert f"<th>peak-lr</th><td>{rates.max():g}</td>" in recipe
    given = ["data", "out", "model", "hflip", "skip-twins", "validate-every", "precision"]
    given += ["device", "workers", "quiet"]
    assert marked(settings) == given
    assert "<th>val-share</th><td>0.2</td>" in settings
    assert "mixup" not in settings


def test_classes_stand_worst_first(finished):
    rows = class_rows(finished.run)
    ranked = sorted(finished.scores.per_class, key=lambda row: row.recall)
    assert [html.unescape(row[0]) for row in rows] == [row.name for row in ranked]
    assert {row[0] for row in rows} == {"ash &amp; elm", "birch", "cedar"}
    for cells, row in zip(rows, ranked, strict=True):
        assert cells[1] == str(row.n) == "2"
        assert f"width:{row.recall:.0f}%" in cells[2]
        assert cells[2].endswith(f"{row.recall:.1f} %")
        wrong = f"{html.escape(row.taken_for)} ({row.times} of 2)" if row.taken_for else ""
        assert cells[4] == wrong


def test_of_many_classes_the_worst_thirty(finished, tmp_path):
    rng = np.random.default_rng(0)
    names = [EVIL, *(f"class {number}" for number in range(1, 45))]
    labels = np.concatenate([np.zeros(10, int), rng.integers(0, 40, 2000)])  # 40 to 44 are never shown
    logits = rng.normal(size=(len(labels), 45)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += rng.uniform(0, 4, 45)[labels]
    logits[labels == 0, 0] = -9
    run = shutil.copytree(finished.run, tmp_path / "run")
    scored = {"split": "as given", "scores": score(logits, labels, names).to_dict()}
    (run / "scores.json").write_text(json.dumps(scored))
    page = page_of(run)
    recall = metrics.recall_score(labels, logits.argmax(axis=1), labels=range(40), average=None)
    rows = class_rows(run)
    assert len(rows) == 30
    assert [row[2].split(">")[-1] for row in rows] == [f"{100 * share:.1f} %" for share in np.sort(recall)[:30]]
    assert html.unescape(rows[0][0]) == EVIL[:31] + "…"
    assert "10 better classes are left out. 5 of the classes have no held-out picture." in page.text
    assert "held out as the data say" in page.text
    assert f"top-5 {100 * metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(45)):.1f} %" in page.text
    assert "script" not in page.tags


def test_pictures_with_several_labels(labelled, tmp_path, tiny):
    rows = [
        f"{labelled}/{kind}/tree-{tree}.png,{kind}{'|<i>odd</i>' if tree % 2 else ''}"
        for kind in ("birch", "cedar")
        for tree in range(8)
    ]
    table = tmp_path / "trees.csv"
    table.write_text("path,label\n" + "\n".join(rows) + "\n")
    result = finetune(settings_of(table, tmp_path / "run", steps=2, class_weights="balanced"))
    page = written(result.run)
    assert f"mean average precision {result.scores.mean_average_precision:.1f} %" in page.text
    assert f"interval {result.scores.low:.1f} to {result.scores.high:.1f}, Wilson; n = {result.scores.n})" in page.text
    assert "where the surest class is one of theirs" in page.text
    assert "; of weighted classes" in page.text
    assert "onfusion" not in page.text
    rows = class_rows(result.run)
    precise = {row.name: f"{row.average_precision:.1f} %" for row in result.scores.per_class}
    assert {html.unescape(row[0]): row[2].split(">")[-1] for row in rows} == precise
    assert "<i>odd</i>" in precise


def test_twins_are_counted(labelled, tmp_path, tiny):
    for side, trees in (("train", range(6)), ("val", range(6, 9))):
        for kind in ("birch", "cedar"):
            (tmp_path / "data" / side / kind).mkdir(parents=True)
            for tree in trees:
                shutil.copy(labelled / kind / f"tree-{tree}.png", tmp_path / "data" / side / kind)
    for name in ("here.png", "there\nnear,.png"):
        shutil.copy(labelled / "birch" / "tree-0.png", tmp_path / "data" / "val" / "birch" / name)
    result = finetune(settings_of(tmp_path / "data", tmp_path / "run", steps=1, skip_twins=False))
    page = written(result.run)
    assert "2 of 8 held-out pictures are in training too: 2 the same file. The scores may be too high." in page.text
    assert "here.png" not in page.text
    assert "not looked for" not in page.text


def at_step(monkeypatch, wanted, action):
    real = finetuning.engine.learning_rate

    def rate(step, *rest):
        if step == wanted:
            action()
        return real(step, *rest)

    monkeypatch.setattr(finetuning.engine, "learning_rate", rate)


def test_a_fine_tuning_run_that_was_stopped(labelled, tmp_path, tiny, monkeypatch):
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = finetune(settings_of(labelled, tmp_path / "run"))
    assert result.exit_code == 75
    page, measured = written(result.run), read_metrics(result.run / "metrics.jsonl")["val_top1"]
    assert (
        "It was stopped from outside and goes on with --resume. The newest checkpoint is that of step 5." in page.text
    )
    assert "5 steps of 8 pictures" in page.text
    assert "steps 5 of 8" in page.text
    assert measured.steps.tolist() == [3]
    assert f"top-1 so far {measured.values[0]:.4g} % at step 3" in page.text
    assert "95 % interval" not in page.text  # nothing that looks like a result
    assert "worst first" not in page.text
    assert page.values("alt") == ["Held-out pictures at step 3"]


def test_a_fine_tuning_run_that_diverged(labelled, tmp_path, tiny, monkeypatch):
    def spoil():
        monkeypatch.setattr(finetuning.Objective, "forward", lambda *_: torch.full((), torch.nan, requires_grad=True))

    at_step(monkeypatch, 1, spoil)
    with pytest.raises(DivergedError):
        finetune(settings_of(labelled, tmp_path / "run"))
    assert "trained by the recipe scratch on 24 pictures" in written(tmp_path / "run").text
    page = page_of(tmp_path / "run")  # once more, now that run.json says how it ended
    assert "diverged" in page.text
    assert "The loss or a gradient was not finite." in page.text
    assert "steps 1 of 8" in page.text
    assert "so far" not in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "vit-b"}, "vit-b, fine-tuned by the recipe"),
        ({"blocks": 3}, "The last 3 blocks of vit-tiny from fresh weights, trained by the recipe"),
        ({"blocks": 1, "model": "vit-b"}, "The last block of vit-b, fine-tuned by the recipe"),
        ({"blocks": 0.5, "model": "vit-b"}, "Half of the last block of vit-b, fine-tuned by the recipe"),
        ({"blocks": 0, "model": "vit-b"}, "The head of vit-b, fine-tuned by the recipe"),
        ({"head": "normed", "model": "vit-b"}, "A linear probe on vit-b, trained by the recipe"),
        ({"head": "attentive", "model": "vit-b"}, "An attentive probe on vit-b, trained by the recipe"),
        ({"image_size": [64, 96]}, "of 3 classes at 64×96 pixels: 8 steps"),
    ],
)
def test_what_was_trained(finished, tmp_path, changes, words):
    config = json.loads((finished.run / "config.json").read_text())
    settings = config["settings"] | {name: value for name, value in changes.items() if name == "head"}
    (tmp_path / "config.json").write_text(json.dumps(config | changes | {"settings": settings}))
    shutil.copy(finished.run / "metrics.jsonl", tmp_path)
    assert words in page_of(tmp_path).text


@pytest.mark.parametrize("broken", [EVIL, {"scores": EVIL}, {"scores": {"per_class": [{EVIL: 1}]}}, {"scores": None}])
def test_nothing_that_is_broken_stops_the_page_of_a_classifier(finished, tmp_path, broken):
    run = tmp_path / "run"
    run.mkdir()
    config = json.loads((finished.run / "config.json").read_text())
    settings = dict.fromkeys(config["settings"], EVIL)
    evil = dict.fromkeys(config, EVIL) | {"kind": "finetune", "settings": settings, "classes": [EVIL]}
    (run / "config.json").write_text(json.dumps(evil))
    (run / "scores.json").write_text(json.dumps(broken))
    (run / "twins.csv").write_bytes(b'near,"\xff')
    page = page_of(run)
    assert "1 held-out picture is in training too: 1 nearly the same picture." in page.text
    assert not {"script", "img"} & set(page.tags)
    assert "No step was written yet." in page.text
    assert "95 %" not in page.text
    (run / "config.json").write_text(json.dumps(config | {"settings": EVIL, "classes": EVIL}))
    assert "8 steps" not in page_of(run).text
