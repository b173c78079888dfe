"""Recipes: the command in a docstring is the configuration, its hours are the plan's, its numbers are the papers'."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from maehub.cli.parsing import parsed
from maehub.models.masking import kept_count
from maehub.train import recipes
from maehub.train.engine.optim import peak_rate
from maehub.train.planning.planning import plan
from maehub.train.pretraining.config import PlanConfig, PretrainConfig

SECTIONS = ("Source", "Command", "Hours", "Expected")
IMAGENET = 1_281_167


def section(recipe, name):
    """One section of a docstring, on one line."""
    found = re.search(rf"^    {name}:\n((?:        .*\n|\n)+)", recipe.__doc__ + "\n", re.MULTILINE)
    assert found, f"{recipe.__name__} says nothing of its {name}"
    return " ".join(found[1].split())


@pytest.fixture(params=recipes.RECIPES, ids=lambda recipe: recipe.__name__)
def recipe(request):
    return request.param


def test_docstring_says_source_command_hours_and_result(recipe):
    for name in SECTIONS:
        assert section(recipe, name)


def test_the_command_does_the_same(recipe):
    program, command, *words = shlex.split(section(recipe, "Command"))
    assert (program, command) == ("maehub", "pretrain")
    assert parsed(command, PretrainConfig, words) == recipe("DATA", "RUN")


def test_every_function_is_listed():
    functions = [value for value in vars(recipes).values() if callable(value) and value.__module__ == recipes.__name__]
    assert set(functions) == set(recipes.RECIPES)


def device_hours(config, images=IMAGENET):
    """What a plan says for one compiled H100."""
    settings = asdict(config) | {"images": images, "on": "h100", "compile": True, "data": ""}
    return plan(PlanConfig(**settings)).hours


def test_hours_are_the_plans():
    hours = [device_hours(recipes.paper("DATA", "RUN", model, 1600)) for model in ("vit-b", "vit-l", "vit-h")]
    text = section(recipes.paper, "Hours")
    for name, value in zip(("ViT-B", "ViT-L", "ViT-H"), hours, strict=True):
        assert float(re.search(rf"{name} (\d+)", text)[1]) == pytest.approx(value, rel=0.05)
    for recipe, images in (
        (recipes.tiny, IMAGENET),
        (recipes.domain_continuation, 200_000),
        (recipes.vit_masked_patch_prediction, IMAGENET),
        (recipes.beit_like, IMAGENET),
    ):
        written = float(re.search(r"plan: ([\d.]+) H100 hours", section(recipe, "Hours"))[1])
        assert written == pytest.approx(device_hours(recipe("DATA", "RUN"), images), rel=0.05), recipe.__name__


@pytest.mark.parametrize(("epochs", "warmup"), [(400, 0.1), (800, 0.05), (1600, 0.025)])
def test_the_papers_warm_up_is_40_epochs(epochs, warmup):
    config = recipes.paper("DATA", "RUN", "vit-l", epochs)
    assert config.warmup == pytest.approx(warmup)
    assert config.warmup * epochs == pytest.approx(40)


def test_peak_rates_are_the_published_ones():
    for recipe, rate in (
        (recipes.paper, 2.4e-3),  # He et al. 2021, table 8: 1.5e-4 × 4096 / 256
        (recipes.vit_masked_patch_prediction, 2e-4),  # Dosovitskiy et al. 2020, B.1.2
        (recipes.beit_like, 1.5e-3),  # Bao et al. 2021
    ):
        config = recipe("DATA", "RUN")
        assert peak_rate(config.base_lr, config.batch_size) == pytest.approx(rate)


def test_masks_of_the_variants():
    vit, beit = recipes.vit_masked_patch_prediction("DATA", "RUN"), recipes.beit_like("DATA", "RUN")
    assert 196 - kept_count(196, vit.mask_ratio) == 98
    assert 196 - kept_count(196, beit.mask_ratio) == 79
    assert vit.corruption == (0.8, 0.1, 0.1)
    for config in (vit, beit):
        assert (config.target, config.mask_tokens, config.decoder_depth) == ("tokens", "encoder", 0)


def test_paths_may_be_paths(recipe):
    assert recipe(Path("DATA"), Path("RUN")) == recipe("DATA", "RUN")


def test_the_page_shows_the_same_commands():
    """docs/recipes.md has one command for each recipe, in their order."""
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    block = re.search(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1]
    lines = block.replace("\\\n", " ").splitlines()
    for line, recipe in zip(lines, recipes.RECIPES, strict=True):
        _, command, *words = shlex.split(line)
        config = parsed(command, PretrainConfig, words)
        assert config == recipe(config.data, config.out), recipe.__name__
        assert f"`{recipe.__name__}`" in text
