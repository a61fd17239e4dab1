"""Sets of an evaluation: which class is which, what was left out, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpmmd import export
from dpmmd import run as runs
from dpmmd.data import write_npz
from dpmmd.evaluate.sets import EvaluationError, Sets
from dpmmd.recipe import EvaluateSection

pytest.importorskip("sklearn")

SETTINGS = EvaluateSection(classifiers=["gaussian_nb"])
NAMES = ("bar", "cross", "dot")


def bars(n: int, seed: int = 0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images with a bar whose place is the class: easy to tell apart."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 60, (n, 1, 8, 8), dtype=np.uint8)
    y = np.arange(n, dtype=np.int64) % classes
    for i, k in enumerate(y):
        x[i, 0, 2 * k : 2 * k + 2] += 150
    return x, y


def folder(path: Path, names: dict[int, str], n: int = 30, seed: int = 1) -> Path:
    """A folder of class folders; of bars of each place, the folder's name."""
    x, y = bars(n, seed, classes=4)
    for label, name in names.items():
        (path / name).mkdir(parents=True)
        for i in np.flatnonzero(y == label):
            Image.fromarray(x[i, 0]).save(path / name / f"{i:02d}.png")
    return path


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A perfect synthetic set with names."""
    return write_npz(tmp_path / "made.npz", *bars(90), classes=NAMES)


def read(
    made: Path, test: Any, real: Any = None, num_classes: int | None = 3, **options: Any
) -> Sets:
    return runs.read_sets(
        made,
        test=(str(test), "test"),
        real=None if real is None else (str(real), "train"),
        num_classes=num_classes,
        **options,
    )


def scores(found: Sets) -> dict[str, float]:
    accuracy = runs.accuracies(found, SETTINGS, progress=False)["gaussian_nb"]
    return {kind: round(value, 3) for kind, value in accuracy.items()}


# ----------------------------------------------------------------------------- by name


def test_a_test_folder_that_lacks_a_class_scores_a_perfect_set_right(
    made: Path, tmp_path: Path
) -> None:
    """Its folders are numbered from 0 on: without names the second would be taken for the first."""
    found = read(made, folder(tmp_path / "t", {0: "bar", 2: "dot"}))
    assert scores(found) == {"synthetic": 1.0}
    assert found.without_test_images == (1,)
    told = found.facts()["classes"]
    assert told == {
        "number": 3, "names": list(NAMES), "matched_by": {"test": "name"},
        "without_test_images": ["cross"],
    }  # fmt: skip
    assert found.lines()[-1] == (
        "no test images of cross: accuracies are those on the other classes"
    )


def test_classes_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    x, y = bars(90)
    made = write_npz(tmp_path / "m.npz", x, 2 - y, classes=("dot", "cross", "bar"))
    test = folder(tmp_path / "t", {0: "Bar ", 1: "CROSS", 2: "dot"})
    real = write_npz(tmp_path / "r.npz", *bars(60, 5), classes=("bar", "cross", "dot"))
    shifted = write_npz(tmp_path / "s.npz", x, (y + 1) % 3, classes=("dot", "bar", "cross"))
    for other in (real, shifted):
        found = read(made, test, other)
        assert scores(found) == {"synthetic": 1.0, "real": 1.0}
        assert found.facts()["classes"]["matched_by"] == {"test": "name", "real": "name"}


def test_exports_of_every_kind_are_matched_by_name(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    names = ("T-shirt/top", "Bag", "ankle boot")
    x, y = bars(90)
    test = write_npz(tmp_path / "t.npz", *bars(30, 1), classes=names)
    lacking = folder(tmp_path / "f", {0: "t-shirt", 1: "bag"})
    (lacking / "t-shirt").rename(lacking / "Ankle Boot")
    for path in (tmp_path / "s.npz", tmp_path / "s.parquet", tmp_path / "s"):
        export.write(path, x, y, format=export.format_of(path), classes=names)
        assert scores(read(path, test)) == {"synthetic": 1.0}
        found = read(path, lacking)  # bars of the first place under the name of the third class
        assert scores(found) == {"synthetic": 0.5}
        assert sorted(set(found.test.labels.tolist())) == [1, 2]


def test_test_classes_that_the_synthetic_set_lacks_are_refused(made: Path, tmp_path: Path) -> None:
    more = folder(tmp_path / "t", {0: "bar", 1: "cross", 2: "dot", 3: "star"})
    with pytest.raises(EvaluationError, match=r"^test: source 't' .* lacks \(star\); .*bar, cross"):
        read(made, more)
    same = folder(tmp_path / "same", {0: "bar", 1: "cross", 2: "dot"})
    other = folder(tmp_path / "o", {0: "a", 1: "b", 2: "c"})
    with pytest.raises(EvaluationError, match=r"^test: source 'o' .* \(a, b, c\)"):
        read(made, other)
    with pytest.raises(EvaluationError, match=r"^real: source 't' .* \(star\)"):
        read(made, same, more)


def test_real_training_images_need_every_class_that_is_tested(made: Path, tmp_path: Path) -> None:
    test = folder(tmp_path / "t", {0: "bar", 1: "cross", 2: "dot"})
    less = folder(tmp_path / "r", {0: "bar", 2: "dot"}, seed=3)
    with pytest.raises(EvaluationError, match=r"^real: there are no images of cross"):
        read(made, test, less)
    assert scores(read(made, folder(tmp_path / "u", {2: "dot", 0: "bar"}), less)) == {
        "synthetic": 1.0, "real": 1.0
    }  # fmt: skip


def test_a_synthetic_set_without_images_of_a_tested_class_is_refused(tmp_path: Path) -> None:
    x, y = bars(90)
    made = write_npz(tmp_path / "m.npz", x[y != 1], y[y != 1], classes=NAMES)
    with pytest.raises(EvaluationError, match=r"^synthetic: there are no images of cross"):
        read(made, folder(tmp_path / "t", {0: "bar", 1: "cross"}))
    assert scores(read(made, folder(tmp_path / "u", {0: "bar", 2: "dot"}))) == {"synthetic": 1.0}


# ----------------------------------------------------------------------------- without names


def test_without_names_the_numbers_of_classes_must_agree(made: Path, tmp_path: Path) -> None:
    x, y = bars(90)
    plain = write_npz(tmp_path / "m.npz", x, y)
    test = write_npz(tmp_path / "t.npz", *bars(30, 1))
    for one, other in (
        (plain, test),
        (made, test),
        (plain, folder(tmp_path / "f", dict(enumerate(NAMES)))),
    ):
        found = read(one, other)
        assert scores(found) == {"synthetic": 1.0}
        assert found.matched_by == {"test": "number"}
        assert any("those of test by number" in line for line in found.lines())
    lacking = folder(tmp_path / "g", {0: "bar", 2: "dot"})
    fewer = write_npz(tmp_path / "u.npz", *bars(30, 1, classes=2))
    for one, other in ((plain, lacking), (plain, fewer), (made, fewer)):
        with pytest.raises(EvaluationError, match=r"^test: .* 2 classes .* 3 classes .*must agree"):
            read(one, other)
    with pytest.raises(EvaluationError, match=r"^real: .* 2 classes .*must agree"):
        read(plain, test, fewer)


def test_names_that_are_numbers_say_no_more_than_labels(tmp_path: Path) -> None:
    """As a Parquet file has them whose classes nobody named."""
    pytest.importorskip("pyarrow")
    export.write(tmp_path / "m.parquet", *bars(90), format="parquet")
    found = read(tmp_path / "m.parquet", folder(tmp_path / "f", dict(enumerate(NAMES))))
    assert scores(found) == {"synthetic": 1.0}
    assert found.matched_by == {"test": "number"}
    found = read(tmp_path / "m.parquet", folder(tmp_path / "g", {0: "0", 2: "02"}))
    assert scores(found) == {"synthetic": 1.0}
    assert found.matched_by == {"test": "name"}


@pytest.mark.parametrize("num_classes", [2, 4, 10])
@pytest.mark.parametrize("named", [True, False])
def test_another_number_of_classes_than_declared_is_refused(
    named: bool, num_classes: int, tmp_path: Path
) -> None:
    made = write_npz(tmp_path / "m.npz", *bars(90), classes=NAMES if named else None)
    test = folder(tmp_path / "t", dict(enumerate(NAMES)))
    with pytest.raises(EvaluationError, match=f"num_classes={num_classes}: .*give num_classes=3"):
        read(made, test, num_classes=num_classes)


def test_one_class_is_no_problem_for_a_classifier(tmp_path: Path) -> None:
    made = write_npz(tmp_path / "m.npz", *bars(9, classes=1))
    test = write_npz(tmp_path / "t.npz", *bars(9, 1, classes=1))
    with pytest.raises(EvaluationError, match="num_classes=1: a classifier of one class"):
        read(made, test, num_classes=1)


# ----------------------------------------------------------------------------- left out


def test_it_is_said_how_many_images_count_and_why_others_do_not(made: Path, tmp_path: Path) -> None:
    test = folder(tmp_path / "t", dict(enumerate(NAMES)), n=160)  # 120 of three classes
    broken = sorted((test / "dot").iterdir())[:3]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(b"not an image")
    data = broken[2].read_bytes()
    broken[2].write_bytes(data[: len(data) // 2])
    found = read(made, test, image_size=8, channels=1)
    assert scores(found) == {"synthetic": 1.0}
    told = found.facts()["images"]
    assert set(told) == {"synthetic", "test"}
    assert told["synthetic"] == {"used": 90, "left_out": {}, "passed_over": {}}
    assert told["test"]["used"] == 117
    assert sum(told["test"]["left_out"].values()) == 3
    assert any("decoded" in why or "image" in why for why in told["test"]["left_out"])
    line = next(line for line in found.lines() if line.startswith("test (t): "))
    assert line.startswith("test (t): 117 images used; 3 left out (")
    unlabelled = read(made, test, num_classes=None, image_size=8, channels=1)
    assert unlabelled.facts()["images"] == told
    assert "classes" not in unlabelled.facts()


def test_much_left_out_is_refused_with_the_numbers(made: Path, tmp_path: Path) -> None:
    options = {"image_size": 8, "channels": 1}
    test = folder(tmp_path / "t", dict(enumerate(NAMES)), n=160)
    for path in sorted((test / "dot").iterdir())[:7]:  # 7 of 120: above 5 %
        path.write_bytes(b"")
    for num_classes in (3, None):
        with pytest.raises(EvaluationError, match=r"^test \(t\): 113 images used; 7 left out.* 5%"):
            read(made, test, num_classes=num_classes, **options)
    good = folder(tmp_path / "g", dict(enumerate(NAMES)), n=160)
    with pytest.raises(EvaluationError, match=r"^real \(t\): 113 images used; 7 left out"):
        read(made, good, test, **options)
    x, y = bars(90)
    x = x / np.float32(255)
    x[:5] = 2.0
    np.savez(tmp_path / "m.npz", x=x, y=y)
    with pytest.raises(EvaluationError, match=r"^synthetic .*85 images used; 5 left out .5 x val"):
        read(tmp_path / "m.npz", good, **options)


@pytest.mark.parametrize(("lost", "refused"), [(1, False), (2, True), (3, True)])
def test_half_a_class_left_out_is_refused(
    made: Path, tmp_path: Path, lost: int, refused: bool
) -> None:
    """Of few images among many: below 5 % of all."""
    test = folder(tmp_path / "t", {0: "bar", 1: "cross", 2: "dot"}, n=400)
    few = sorted((test / "cross").iterdir())
    for path in few[3:]:
        path.unlink()
    for path in few[:lost]:
        path.write_bytes(b"")
    options = {"image_size": 8, "channels": 1}
    if not refused:
        assert scores(read(made, test, **options)) == {"synthetic": 1.0}
        return
    with pytest.raises(EvaluationError, match=f"^test: .* 3 images of class cross, .* {lost} cann"):
        read(made, test, **options)
    assert read(made, test, num_classes=None, **options).test.classes is None


# ----------------------------------------------------------------------------- wrong input


def test_the_same_images_twice_are_refused(made: Path, tmp_path: Path) -> None:
    """A file without splits is read whole, whatever the split."""
    test = folder(tmp_path / "t", dict(enumerate(NAMES)))
    (tmp_path / "link").symlink_to(test)
    for other in (test, tmp_path / "link"):
        with pytest.raises(EvaluationError, match=r"^test and real are the same images"):
            read(made, test, other)
    with pytest.raises(EvaluationError, match=r"^synthetic and test are the same images"):
        read(made, made)


def test_wrong_input_is_refused_and_gives_no_figure(made: Path, tmp_path: Path) -> None:
    x, y = bars(90)
    test = folder(tmp_path / "t", dict(enumerate(NAMES)))
    splits = tmp_path / "splits"
    for name in ("train", "test"):
        shutil.copytree(test, splits / name)
    np.savez(tmp_path / "x.npz", x=x)
    with pytest.raises(ValueError, match="which are splits and not classes"):
        read(made, splits)
    with pytest.raises(EvaluationError, match=r"^test: source 'x.npz' has no labels"):
        read(made, tmp_path / "x.npz")
    with pytest.raises(EvaluationError, match=r"^test: source 'bar' has no labels"):
        read(made, test / "bar")
    with pytest.raises(EvaluationError, match=r"^synthetic: source 'x.npz' has no labels"):
        read(tmp_path / "x.npz", test)
    np.savez(tmp_path / "b.npz", x=x, y=y, classes=np.array(NAMES[:2]))
    with pytest.raises(ValueError, match=r"num_classes=2: .*b.npz"):  # a label without a name
        read(made, tmp_path / "b.npz")
    for wrong in (x.repeat(2, 2).repeat(2, 3), x.repeat(3, 1)):
        other = write_npz(tmp_path / "w.npz", wrong, y, classes=NAMES, overwrite=True)
        with pytest.raises(ValueError, match=r"^(test|synthetic): images are|give image_size"):
            scores(read(made, other))
        with pytest.raises(ValueError, match="give image_size"):
            scores(read(other, test))
    resized = write_npz(
        tmp_path / "l.npz", x.repeat(2, 2).repeat(2, 3).repeat(3, 1), y, classes=NAMES
    )
    assert scores(read(made, resized, image_size=8, channels=1)) == {"synthetic": 1.0}
