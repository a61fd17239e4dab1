"""Recipes: what is read, and what is refused before anything is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpmmd
from dpmmd import recipe
from dpmmd.bounds import BOUNDS
from dpmmd.data import photographs
from dpmmd.evaluate import CLASSIFIERS
from dpmmd.nn import ESTIMATORS
from dpmmd.privacy.sensitivity import ADJACENCIES
from dpmmd.recipe import RecipeError, parse, read, revised, with_changes

MINIMAL = """
[data]
source = "images.npz"

[release]
epsilon = 1.0
delta = 1e-5
adjacency = "replace-one"
"""


def test_a_minimal_recipe_takes_the_defaults() -> None:
    settings = parse(MINIMAL)
    assert settings.data.num_classes is None
    assert settings.release.epsilon == 1.0
    assert settings.release.moments == (1,)
    assert settings.encoder.name == "squeezenet1.1"
    assert settings.train.estimator in ESTIMATORS
    assert settings.evaluate is None


@pytest.mark.parametrize("name", recipe.names())
def test_packaged_recipes(name: str) -> None:
    settings, text = read(name)
    assert parse(text) == settings
    assert settings.description.endswith(".")
    assert settings.release.delta < 1 / 60_000 or "fashion" not in name


def test_there_is_a_demo() -> None:
    assert "fashion-demo" in recipe.names()


@pytest.mark.parametrize("side", [32, 64])
def test_the_photographs_make_their_data_by_themselves(side: int) -> None:
    settings, _ = read(f"photos{side}")
    assert settings.data.source == "photographs"
    assert settings.data.image_size == side  # one of the sizes that patches are cut in
    assert side in photographs.SIZES
    assert settings.data.num_classes == len(photographs.NAMES)
    assert settings.release.delta < 1 / 12_100
    # Classes in turn: every class has its two images in a batch, which "unbiased" asks for.
    assert settings.train.batch_size >= 2 * len(photographs.NAMES)
    assert settings.encoder.constant is not None  # or contrast is lost
    # A covariance of each class: one for all gives grey classes the colour of the others.
    assert settings.release.weights is not None
    assert settings.release.weights["class_products"] > 0


def test_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL + "[train]\nsteps = 7\n")
    assert read(path)[0].train.steps == 7
    assert read(str(path))[0] == read(path)[0]
    (tmp_path / "fashion-demo").mkdir()  # a run's folder of the same name is no recipe
    monkeypatch.chdir(tmp_path)
    assert read("fashion-demo")[0].data.source == "fashion-mnist"


REFUSED: dict[str, tuple[str, str]] = {
    "unknown section": (MINIMAL + "[trian]\n", r"unknown key 'trian' \(known here: .*train"),
    "unknown key": (
        MINIMAL + "[train]\nstep = 3\n",
        r"unknown key 'train\.step' \(known here: steps, batch_size, lr",
    ),
    "unknown key of an optional section": (
        MINIMAL + "[evaluate]\nclassifier = 3\n",
        r"unknown key 'evaluate\.classifier' \(known here: classifiers, num_train, seeds\)",
    ),
    "two faults": (
        MINIMAL + "[train]\nstep = 3\n[sample]\nimages = 3\n",
        r"unknown key 'train\.step'.*; unknown key 'sample\.images'",
    ),
    "no epsilon": (MINIMAL.replace("epsilon = 1.0", ""), r"'release\.epsilon' is missing"),
    "no delta": (MINIMAL.replace("delta = 1e-5", ""), r"'release\.delta' is missing"),
    "no adjacency": (
        MINIMAL.replace('adjacency = "replace-one"', ""),
        r"'release\.adjacency' is missing",
    ),
    "no release": ('[data]\nsource = "x"\n', "'release' is missing"),
    "no source": (MINIMAL.replace("source", "split"), r"'data\.source' is missing"),
    "epsilon": (MINIMAL.replace("1.0", "0"), r"release\.epsilon = 0: .*greater than 0"),
    "delta": (MINIMAL.replace("1e-5", "1.0"), r"release\.delta = 1\.0: .*less than 1"),
    "adjacency": (
        MINIMAL.replace("replace-one", "replace"),
        r"release\.adjacency = 'replace': .*'replace-one', 'zero-out' or 'add-remove'",
    ),
    "bound": (MINIMAL + 'bound = "cube"\n', r"release\.bound = 'cube': .*'sphere'"),
    "moment": (MINIMAL + "moments = [1, 3]\n", r"release\.moments.* = 3: .*1 or 2"),
    "a word for a number": (
        MINIMAL + '[train]\nsteps = "many"\n',
        r"train\.steps = 'many': .*valid integer",
    ),
    "a fraction for an integer": (
        MINIMAL + "[train]\nsteps = 1.5\n",
        r"train\.steps = 1\.5: .*valid integer",
    ),
    "a number for a section": (MINIMAL.replace("[data]", "train = 3\n[data]"), "train = 3: "),
    "below its range": (MINIMAL + "[train]\nsteps = 0\n", r"train\.steps = 0: .*1"),
    "above its range": (MINIMAL + "[train]\nema_decay = 1.0\n", r"train\.ema_decay = 1\.0: .*1"),
    "estimator": (MINIMAL + '[train]\nestimator = "sum"\n', r"train\.estimator = 'sum': .*'adam'"),
    "no seeds": (MINIMAL + "[evaluate]\nseeds = []\n", r"evaluate\.seeds = \(?\[?\]?\)?: .*1"),
    "the number of images under add-remove": (
        MINIMAL.replace("replace-one", "add-remove").replace("[data]", "[data]\nnum_images = 9"),
        r"data\.num_images = 9: .*private under add-remove.*leave the key out",
    ),
    "the number of images of groups": (
        MINIMAL.replace("[data]", '[data]\nnum_images = 9\ngroup_by = "patient"'),
        r"data\.num_images = 9: .*private with data\.group_by",
    ),
    "not TOML": ("[data\n", "not valid TOML: .*line 1"),
    "twice": (MINIMAL + MINIMAL, "not valid TOML"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_fault_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"mine.toml: .*{message}"):
        read(path)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'fashion': neither a \.toml file nor one of .*-demo"):
        read("fashion")
    with pytest.raises(RecipeError, match=r"absent\.toml'.*no such file"):
        read(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.toml: not a text file in UTF-8"):
        read(tmp_path / "binary.toml")


def test_revised() -> None:
    section = parse(MINIMAL).train
    changed = revised(section, {"steps": 5, "lr": None, "batch_size": None})
    assert changed == section.model_copy(update={"steps": 5})
    assert section.steps != 5
    with pytest.raises(RecipeError, match="steps = 0"):
        revised(section, {"steps": 0})
    with pytest.raises(RecipeError, match="unknown key 'stpes'"):
        revised(section, {"stpes": 1})


def test_a_graph_is_left_to_the_device_unless_the_recipe_says() -> None:
    assert parse(MINIMAL).train.graph is None
    assert parse(MINIMAL + '[train]\nmemory = "8GiB"').train.graph is None  # which excludes a graph
    for graph in (True, False):
        settings, written = with_changes(MINIMAL, [f"train.graph={str(graph).lower()}"])
        assert parse(written).train.graph is settings.train.graph is graph
    settings, written = with_changes(MINIMAL, ["train.seed=3"])
    assert "graph" not in written
    assert revised(settings.train, {"steps": 5, "graph": None}).graph is None


PAPER_EPSILONS = (10, 5, 2, 1, 0.5, 0.2, float("inf"))


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipe_with_changes_is_written_whole(name: str) -> None:
    settings, text = read(name)
    for epsilon in PAPER_EPSILONS:
        changed, written = with_changes(text, [f"release.epsilon={epsilon}"], name)
        assert parse(written) == changed
        release = settings.release.model_copy(update={"epsilon": epsilon})
        assert changed == settings.model_copy(update={"release": release})


def test_changes_are_toml_or_bare_words() -> None:
    changes = [
        "encoder.name=vgg19", 'data.root="C:\\\\a b"', "release.moments=[1, 2]",
        "release.weights={phi2 = 0.5}", "train.seed = 3", "description=it's 1 \u0001 \u007f é",
        "metrics.weights={inception-v3 = 'a/b', \"resnet18\" = 'c'}",
    ]  # fmt: skip
    settings, written = with_changes(MINIMAL, changes)
    assert parse(written) == settings
    assert settings.encoder.name == "vgg19"
    assert settings.data.root == "C:\\a b"
    assert settings.release.moments == (1, 2)
    assert settings.release.weights == {"phi2": 0.5}
    assert settings.train.seed == 3
    assert settings.description == "it's 1 \u0001 \u007f é"
    assert settings.metrics is not None
    assert settings.metrics.weights == {"inception-v3": "a/b", "resnet18": "c"}
    assert settings.data.source == "images.npz"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("release.epsilon", "expected SECTION.KEY=VALUE"),
        ("=1", "expected SECTION.KEY=VALUE"),
        ("release.epsilon=-1", "release.epsilon = -1: .*greater than 0"),
        ("release.epsilom=1", "unknown key 'release.epsilom'"),
        ("data.source.x=1", "source is a value, not a section"),
        ("train.steps=many", "train.steps = 'many'"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        with_changes(MINIMAL, [change])


def test_one_seed_is_a_list_of_one_and_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match=r"seeds = \[0\]"):
        settings = parse(MINIMAL + "[evaluate]\nseed = 4\n")
    assert settings.evaluate is not None
    assert settings.evaluate.seeds == (4,)


def test_the_papers_recipes_have_its_settings() -> None:
    """arXiv 2205.12900v4 and the commands of its code: batch, steps, and the two learning rates."""
    rates = {
        "celeba32": (3e-4, 1e-4),
        "celeba64": (3e-4, 3e-4),
        "cifar10": (1e-3, 1e-4),
        "cifar10-unlabelled": (1e-3, 1e-3),
    }
    for name, (lr, estimator_lr) in rates.items():
        train = read(f"paper-{name}")[0].train
        assert (train.lr, train.estimator_lr) == (lr, estimator_lr)
        assert (train.batch_size, train.steps, train.betas[0]) == (128, 200_000, 0.5)
        assert (train.estimator, train.schedule, train.ema_decay) == ("adam", "constant", 0)
    assert {"paper-mnist", "paper-fashion", "paper-lsun32"} <= set(recipe.names())


def test_the_choices_are_those_of_the_library() -> None:
    """A choice is written down twice, as a type here and where it is used."""

    def choices(section: type[Any], key: str) -> tuple[str, ...]:
        return section.model_fields[key].annotation.__args__

    assert set(choices(recipe.ReleaseSection, "adjacency")) == set(ADJACENCIES)
    assert set(choices(recipe.ReleaseSection, "bound")) == set(BOUNDS)
    assert set(choices(recipe.TrainSection, "estimator")) == set(ESTIMATORS)
    assert set(recipe.EvaluateSection().classifiers) <= set(CLASSIFIERS)


@pytest.mark.parametrize(
    ("section", "function"),
    [
        (recipe.EncoderSection, dpmmd.encoders.load),
        (recipe.GeneratorSection, dpmmd.generators.build),
        (recipe.ReleaseSection, dpmmd.release),
    ],
)
def test_a_section_has_the_arguments_of_its_function(
    section: type[Any], function: Callable[..., Any]
) -> None:
    assert section.model_fields.keys() <= inspect.signature(function).parameters.keys()


def test_a_generator_with_blanks_is_not_built() -> None:
    look = recipe.GeneratorSection(z_dim=5)
    with pytest.raises(ValueError, match=r"settings: name=None.*settings\.completed\("):
        look.arguments()
    assert look.completed((3, 64, 64)).arguments()["name"] == "resnet"
