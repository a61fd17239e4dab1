"""Names of classes: from the source to the release, its report, samples and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import dpmmd
from dpmmd import export, train
from dpmmd.data import ArraySource, open_source, write_npz
from dpmmd.data.classes import are_numbers, check_class_names, correspondence, folder_names, listed
from dpmmd.privacy import PrivacyError, Release, ledger
from dpmmd.privacy.report import facts
from tests.conftest import images, no_noise, small_encoder

NAMES = ("T-shirt/top", "Bag", "ankle boot")  # neither in order nor names of folders


def folder_of(root: Path, *names: str, each: int = 4) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(images(each, seed=number)[0][i, 0]).save(root / name / f"{i}.png")
    return root


def released(source: Any, **options: Any) -> Release:
    arguments = {"epsilon": 5.0, "delta": 1e-3, "adjacency": "replace-one", "num_classes": 3}
    return dpmmd.release(source, small_encoder(), progress=False, **{**arguments, **options})


def named(n: int = 30, names: Any = NAMES) -> ArraySource:
    return ArraySource(*images(n), class_names=names)


# ----------------------------------------------------------------------------- the release


def test_every_kind_of_source_has_names(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    x, y = images(12)
    write_npz(tmp_path / "s.npz", x, y, classes=NAMES)
    export.write(tmp_path / "s.parquet", x, y, format="parquet", classes=NAMES)
    data = TensorDataset(torch.from_numpy(x).float()[:, 0] / 255, torch.from_numpy(y))
    data.classes = list(NAMES)  # type: ignore[attr-defined]
    items = [(image, label) for image, label in zip(x[:, 0], y.tolist(), strict=True)]

    class Items(torch.utils.data.Dataset[Any]):
        classes = NAMES

        def __len__(self) -> int:
            return len(items)

        def __getitem__(self, index: int) -> Any:
            return items[index]

    for source in (tmp_path / "s.npz", tmp_path / "s.parquet", Items(), named(12)):
        release = released(source)
        assert release.metadata.class_names == NAMES
        assert released(source, num_classes=None).metadata.class_names is None
    folder = folder_of(tmp_path / "f", "cat", "dog", "emu")
    assert released(folder).metadata.class_names == ("cat", "dog", "emu")
    assert released((x, y)).metadata.class_names is None


def test_names_are_in_the_file_and_listed_as_public(tmp_path: Path) -> None:
    release = Release.load(released(named()).save(tmp_path / "r.safetensors"))
    assert release.metadata.class_names == NAMES
    told = facts(release)
    assert told["class_names"] == list(NAMES)
    assert "the 3 classes and their names (T-shirt/top, Bag, ankle boot)" in told["assumed_public"]
    assert "T-shirt/top, Bag, ankle boot" in release.report()
    assert facts(released(images(30)))["class_names"] is None


@pytest.mark.parametrize(
    "names", [NAMES[:2], (*NAMES, "hat"), ("a", "b", "a"), ("", "", "")], ids=str
)
def test_a_file_with_other_names_than_classes_is_refused(tmp_path: Path, names: Any) -> None:
    release = released(images(30))
    wrong = release.metadata.model_copy(update={"class_names": names})
    path = Release(release.sums, release.counts, wrong).save(tmp_path / "r.safetensors")
    with pytest.raises(PrivacyError, match=r"class_names has \d names .* num_classes = 3"):
        Release.load(path)
    unlabelled = released(images(30), num_classes=None)
    wrong = unlabelled.metadata.model_copy(update={"class_names": ("a",)})
    path = Release(unlabelled.sums, unlabelled.counts, wrong).save(tmp_path / "u.safetensors")
    with pytest.raises(PrivacyError, match="class_names has 1 names"):
        Release.load(path)


def test_another_number_of_names_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    x, y = images(12)
    write_npz(tmp_path / "s.npz", x, y, classes=NAMES)
    export.write(tmp_path / "s.parquet", x, y, format="parquet", classes=NAMES)
    data = TensorDataset(torch.from_numpy(x).float()[:, 0] / 255, torch.from_numpy(y))

    class Named(TensorDataset):
        classes = NAMES

    sources = {
        "s.npz": tmp_path / "s.npz", "s.parquet": tmp_path / "s.parquet", "arrays": named(12),
        "f": folder_of(tmp_path / "f", *"abc"),
        "Named": torch.utils.data.Subset(Named(*data.tensors), range(12)),
    }  # fmt: skip
    book = tmp_path / "ledger"
    for name, source in sources.items():
        shown = "a, b, c" if name == "f" else "T-shirt/top, Bag, ankle boot"
        for classes in (2, 4, 1):
            with pytest.raises(ValueError, match=f"num_classes={classes}: .*3 class.*{shown}"):
                released(source, num_classes=classes, ledger=book)
    assert not book.exists()
    with pytest.raises(ValueError, match=r"several classes of one name \(Bag\)"):
        released(named(names=("Bag", "Bag", "boot")), ledger=book)
    with pytest.raises(ValueError, match="class_names are not all text"):
        released(named(names=(1, 2, 3)), ledger=book)
    assert not book.exists()
    assert ledger  # the module is there: a spend would have made the file


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Cat", "cat"), ("01", "1"), ("1", "00001"), ("class 01", "class 1"),
        ("caf\u00e9", "cafe\u0301"), ("\u00e9", "e\u0301"), ("cat ", "cat"),
        ("cat\u3164", "cat"), ("a", " a"), ("0", "00"),
    ],
)  # fmt: skip
def test_two_spellings_of_one_class_are_refused_with_both(one: str, other: str) -> None:
    for names in ((one, "dog", other), ("dog", other, one)):
        with pytest.raises(ValueError, match=r"source 'x' has the classes .* most likely one") as e:
            check_class_names(names, 3, "x")
        assert listed([one]) in str(e.value)
        assert listed([other]) in str(e.value)


def test_names_that_differ_in_more_are_those_of_two_classes() -> None:
    for names in (("a", "A"), ("1.10", "1.1"), ("10", "1"), ("caf\u00e9", "cafe"), ("1.01", "1.1"),
                  ("0", "1"), ("'", "-"), ("n01440764", "n01443537")):  # fmt: skip
        check_class_names(names, 2, "x")


def test_two_folders_of_one_class_are_refused_before_anything_is_spent(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", "01", "1", "2")
    with pytest.raises(ValueError, match="has the classes 01 and 1, which differ only"):
        released(folder, ledger=tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def test_names_of_an_npz_are_different_texts(tmp_path: Path) -> None:
    x, y = images(3)
    y[:] = range(3)
    for wrong in (["a", "b", "a"], [1, 2, 3], [["a", "b", "c"]], []):
        np.savez(tmp_path / "s.npz", x=x, y=y, classes=np.array(wrong))
        assert open_source(tmp_path / "s.npz", num_classes=3).class_names is None
    np.savez(tmp_path / "s.npz", x=x, y=y, classes=np.array([b"a", b"b", b"c"]))
    assert open_source(tmp_path / "s.npz", num_classes=3).class_names == ("a", "b", "c")
    np.savez(tmp_path / "s.npz", x=x, classes=np.array(["a", "b"]))
    assert open_source(tmp_path / "s.npz").class_names is None  # without labels there are none


def test_a_name_that_is_no_text_is_written_as_one(tmp_path: Path) -> None:
    """The name of a folder need not be UTF-8."""
    try:
        folder = folder_of(tmp_path / "f", "a", "caf\udce9", "z")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system has names in UTF-8 alone")
    release = released(folder)
    assert release.metadata.class_names == ("a", "caf\\udce9", "z")
    assert Release.load(release.save(tmp_path / "r.safetensors")).report()


def test_torchvisions_mnist_has_the_names_of_the_named_set() -> None:
    from dpmmd.data.dataset import _class_names

    MNIST = type("MNIST", (), {"__module__": "torchvision.datasets.mnist"})
    MNIST.classes = ["0 - zero", "1 - one"]  # type: ignore[attr-defined]
    assert _class_names(MNIST()) == ("0", "1")


def test_names_in_messages_are_on_one_line() -> None:
    assert listed(["a\x1b[31m\nb", "\u202e", ""]) == "a\\x1b[31m\\nb, \\u202e, ''"
    assert listed([str(i) for i in range(30)]).endswith("18, 19, and 10 more")
    assert listed([]) == "none"


# ----------------------------------------------------------------------------- samples and files


def test_names_go_through_training_into_the_samples(tmp_path: Path) -> None:
    from dpmmd import run
    from dpmmd.recipe import GeneratorSection, SampleSection, TrainSection

    encoder = small_encoder()
    release = dpmmd.release(
        named(), encoder, epsilon=5.0, delta=1e-3, adjacency="replace-one", num_classes=3,
        progress=False,
    )  # fmt: skip
    trained = train.train(
        release, encoder, settings=TrainSection(steps=1, batch_size=6), out=tmp_path,
        generator_settings=GeneratorSection(image_size=8, base_channels=4), progress=False,
    )  # fmt: skip
    assert trained.class_names == NAMES
    again = train.load_generator(tmp_path)
    assert again.class_names == NAMES
    six = SampleSection(num_images=6)
    for path in (tmp_path / "s.npz", tmp_path / "s.parquet", tmp_path / "s"):
        run.write_samples(
            again, path, six, picture=path.with_suffix(".png"), card=path.with_suffix(".md"),
            release=release, format=export.format_of(path), progress=False, overwrite=True,
        )  # fmt: skip
        source = open_source(path, num_classes=3)
        assert source.class_names == NAMES
        assert source.arrays()[1].bincount().tolist() == [2, 2, 2]
        card = path.with_suffix(".md").read_text()
        assert "Classes: 0 is T-shirt/top; 1 is Bag; 2 is ankle boot." in card
    with np.load(tmp_path / "s.npz") as file:
        assert file["classes"].tolist() == list(NAMES)
        assert file["classes"].dtype.kind == "U"

    # A checkpoint of an earlier version has no names; its release has them.
    state = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    del state["class_names"]
    torch.save(state, tmp_path / "checkpoints" / "last.pt")
    old = train.load_generator(tmp_path)
    assert old.class_names is None
    run.write_samples(
        old, tmp_path / "o.npz", six, picture=tmp_path / "o.png", release=release, progress=False
    )
    assert open_source(tmp_path / "o.npz").class_names == NAMES


def test_parquet_has_names_that_datasets_shows(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    export.write(tmp_path / "s.parquet", *images(12), format="parquet", classes=NAMES)
    told = json.loads(pq.read_schema(tmp_path / "s.parquet").metadata[b"huggingface"])
    assert told["info"]["features"]["label"] == {"names": list(NAMES), "_type": "ClassLabel"}


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (("cat", "dog", "emu"), ["cat", "dog", "emu"]),  # as a source of folders has them
        (tuple("0123456789"), list("0123456789")),
        (NAMES, ["0-T-shirt_top", "1-Bag", "2-ankle boot"]),
        (("dog", "cat"), ["0-dog", "1-cat"]),
        (("Cat", "cat"), ["0-Cat", "1-cat"]),
        (("é", "e\u0301"), ["0-é", "1-e\u0301"]),
        (("test", "train"), ["0-test", "1-train"]),
        (("AUX.1", "b"), ["0-AUX.1", "1-b"]),
        (("__MACOSX", "a"), ["0-__MACOSX", "1-a"]),
        (("a/b", "a:b", "a?b"), ["0-a_b", "1-a_b", "2-a_b"]),
        (("", ".", "..", "../x"), ["0-_", "1-_", "2-_", "3-_._x"]),
        (("a.", "b "), ["0-a", "1-b"]),
        (("a\n", "b\x1b[31m"), ["0-a_", "1-b_[31m"]),
        (("x" * 300, "y"), ["0-" + "x" * 100, "1-y"]),
        (("ü" * 100, "y"), ["0-" + "ü" * 50, "1-y"]),
        (tuple(map(str, range(12))), [f"{k:02d}-{k}" for k in range(12)]),
        (("10", "9"), ["0-10", "1-9"]),
        (("01", "1"), ["0-01", "1-1"]),
    ],
    ids=str,
)
def test_class_folders_are_in_order_and_names_come_back(
    names: tuple[str, ...], folders: list[str], tmp_path: Path
) -> None:
    assert export.class_folders(names) == folders
    x, _ = images(len(names))
    y = np.arange(len(names))[::-1].copy()
    export.write(tmp_path / "s", x, y, format="folder", classes=names)
    made = sorted(entry.name for entry in (tmp_path / "s").iterdir() if entry.is_dir())
    assert made == folders  # in order for who sorts them, as torchvision.datasets.ImageFolder
    source = open_source(tmp_path / "s")  # names that are much alike are refused for a release
    assert source.class_names == names
    again, labels = source.arrays()
    assert labels.tolist() == list(range(len(names)))
    np.testing.assert_array_equal(again.numpy(), x[::-1])


def test_a_file_of_names_that_names_other_folders_is_left_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", "a", "b")
    for wrong in ('["x", "y"]', '{"a": "x"}', '{"a": "x", "b": "x"}', "{", '{"a": 1, "b": 2}',
                  '{"a": "x", "b": "y", "c": "z"}', "7", ""):  # fmt: skip
        (folder / "classes.json").write_text(wrong)
        assert folder_names(folder, ["a", "b"]) == ("a", "b")
    (folder / "classes.json").write_text('{"b": "y", "a": "x"}')
    assert open_source(folder, num_classes=2).class_names == ("x", "y")


def test_names_that_do_not_fit_the_labels_are_not_written(tmp_path: Path) -> None:
    x, y = images(12)
    for path in (tmp_path / "s.npz", tmp_path / "s.parquet", tmp_path / "s"):
        if path.suffix == ".parquet":
            pytest.importorskip("pyarrow")
        for wrong in (NAMES[:2], ("a", "b", "a")):
            with pytest.raises(ValueError, match=r"classes=.*a name of its own"):
                export.write(path, x, y, format=export.format_of(path), classes=wrong)
        assert not path.exists()
    with pytest.raises(ValueError, match="give labels with them"):
        write_npz(tmp_path / "s.npz", x, classes=NAMES)


def test_a_card_shows_names_as_they_are() -> None:
    release = released(named(names=("<b>|*a*", "`x`\n# y", "[red]")), insecure_test_noise=no_noise)
    text = export.card(
        release, name="s", format="npz", shape=(6, 1, 8, 8), step=1, temperature=1.0, seed=0
    )
    line = next(line for line in text.splitlines() if line.startswith("Classes: "))
    assert line == r"Classes: 0 is &lt;b&gt;\|\*a\*; 1 is \`x\`\\n# y; 2 is \[red\]."


# ----------------------------------------------------------------------------- which is which


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ("abc", "abc", [0, 1, 2]),
        ("abc", "cab", [2, 0, 1]),
        ("abc", "ca", [2, 0]),
        ("abc", "abcd", None),
        ("abc", "xyz", None),
        (["Cat", "dog"], ["DOG ", "cat"], [1, 0]),
        (["Cat", "cat"], ["cat", "Cat"], [1, 0]),
        (["Cat", "cat"], ["CAT"], None),
        (["é"], ["e\u0301"], [0]),
        (["0", "1", "2"], ["02", "00"], [2, 0]),
        (["none", "unknown"], ["unknown", "none"], [1, 0]),  # names of classes, not of nobody
        (["a", "b"], ["a", "A"], None),
    ],
)
def test_correspondence(ours: Any, theirs: Any, found: list[int] | None) -> None:
    assert correspondence(tuple(ours), tuple(theirs)) == found


def test_names_that_are_numbers() -> None:
    assert are_numbers(["0", "1", "2"])
    assert are_numbers(["00", "01", "02"])
    assert not are_numbers(["0", "2", "1"])
    assert not are_numbers(["1", "2"])
    assert not are_numbers(["zero", "one"])
