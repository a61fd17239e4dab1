"""A release file whose parts contradict each other is refused, by the name of the field.

Every edit is made by somebody who computes the hashes again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dpmmd
from dpmmd.privacy import PrivacyError, Release, accounting
from dpmmd.privacy.metadata import Statement, array_hash
from dpmmd.privacy.release_file import FURTHER, RULE
from tests.conftest import images, nonnegative_encoder, small_encoder, small_modes

Tensors = dict[str, Tensor]
Edit = Callable[[dict[str, Any], Tensors], None]


@cache
def origin() -> Statement:
    """Of the release that the modes of another were fitted to."""
    made = dpmmd.release(
        images(40), None, pixel_moments=3, epsilon=1.0, delta=1e-3, adjacency="replace-one",
        progress=False,
    )  # fmt: skip
    return made.metadata.statement


@cache
def made(kind: str) -> Release:
    options: dict[str, Any] = {
        "plain": {},
        "unlabelled": {"num_classes": None},
        "add-remove": {"adjacency": "add-remove"},
        "zero-out": {"adjacency": "zero-out"},
        "grouped": {},
        "pixels": {"pixel_moments": 3, "weights": {"class_products": 0.5}},
        "selection": {"selection": nonnegative_encoder()},
        "shared": {"shared_taps": 1, "moments": (1, 2), "joint_weight": 2.0},
        "pooled": {},
        "modes": {"modes": small_modes(origin=origin()), "selection": nonnegative_encoder()},
        "public modes": {"modes": small_modes(classes=1), "num_classes": None, "pixel_moments": 3},
        "alone": {"pixel_moments": 3, "weights": {"class_products": 0.5}},
        "constant": {},
    }[kind]
    source: Any = images(40)
    if kind == "grouped":
        x, y = source
        source = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
        source.patients = [i // 2 for i in range(40)]
        options |= {"group_by": "patients"}
    encoder = small_encoder(
        pool=2 if kind == "pooled" else None, constant=3.0 if kind == "constant" else None
    )
    encoder = None if kind == "alone" else encoder
    given = {"epsilon": 2.0, "delta": 1e-3, "adjacency": "replace-one", "num_classes": 3}
    return dpmmd.release(source, encoder, **{**given, **options}, progress=False)


def forged(path: Path, kind: str, edit: Edit, *, rehash: bool = True) -> Path:
    """A file that says of itself what `edit` made of it, with hashes that are right."""
    release = made(kind)
    fields = json.loads(release.metadata.model_dump_json())
    tensors = {
        name: tensor.clone()
        for name in ("sums", "counts", *FURTHER)
        if (tensor := getattr(release, name)) is not None
    }
    if release.modes is not None:
        rule = release.modes.directions, release.modes.thresholds
        tensors |= {name: array.clone() for name, array in zip(RULE, rule, strict=True)}
    edit(fields, tensors)
    if rehash:
        arrays = [tensors.get(name) for name in ("sums", "counts", *FURTHER)]
        fields["array_sha256"] = array_hash(*arrays)  # type: ignore[arg-type]
    text = json.dumps(fields)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, path, {"dpmmd": text, "sha256": sha256})
    return path


def put(*path: str | int, value: Any, array: bool = False) -> Edit:
    """Sets one field, or one number of an array."""

    def edit(fields: dict[str, Any], tensors: Tensors) -> None:
        where: Any = tensors if array else fields
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = value

    return edit


def block(kind: str, name: str) -> int:
    return [b.name for b in made(kind).metadata.blocks].index(name)


def halved(fields: dict[str, Any], tensors: Tensors) -> None:
    """Signed taps that are said to be non-negative: sqrt(2) less noise is claimed to do."""
    fields["blocks"][0]["nonnegative"] = True
    fields["sensitivity"] = fields["sensitivity"] / 2**0.5
    fields["sd"] = fields["sensitivity"] / fields["mu"]
    fields["noise_sd"] = fields["sd"] / 2**30


def smaller_epsilon(fields: dict[str, Any], tensors: Tensors) -> None:
    """All numbers of a claim that the noise does not keep, but the blocks."""
    level = accounting.calibrate(epsilon=1.0, delta=1e-3)
    fields |= {"epsilon": 1.0, "mu": level.mu}


def dropped(*names: str) -> Edit:
    def edit(fields: dict[str, Any], tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return edit


def scaled(fields: dict[str, Any], tensors: Tensors) -> None:
    fields["grid_bits"] = 300_000_000


def twice(fields: dict[str, Any], tensors: Tensors) -> None:
    fields["encoder"]["taps"][1]["name"] = fields["encoder"]["taps"][0]["name"]


def unlabelled(fields: dict[str, Any], tensors: Tensors) -> None:
    fields["labelled"] = False


def doubled(fields: dict[str, Any], tensors: Tensors) -> None:
    fields["blocks"].append(fields["blocks"][0])


def reversed_blocks(fields: dict[str, Any], tensors: Tensors) -> None:
    fields["blocks"].reverse()


def asymmetric(name: str) -> Edit:
    def edit(fields: dict[str, Any], tensors: Tensors) -> None:
        tensors[name][..., 0, 1] += 1

    return edit


def with_rule(fields: dict[str, Any], tensors: Tensors) -> None:
    """A release without modes whose file has their arrays."""
    rule = made("modes").modes
    assert rule is not None
    tensors |= dict(zip(RULE, (rule.directions, rule.thresholds), strict=True))


def nudged(name: str) -> Edit:
    def edit(fields: dict[str, Any], tensors: Tensors) -> None:
        tensors[name].view(-1)[0] += 1

    return edit


def with_encoder(fields: dict[str, Any], tensors: Tensors) -> None:
    """Moments of pixels alone that are said to stand beside features."""
    fields["encoder"] = json.loads(made("plain").metadata.model_dump_json())["encoder"]


def decoded(orientation: str, background: str) -> dict[str, str]:
    return {"orientation": orientation, "background": background}


NAN, INF = float("nan"), float("inf")
EDITS: list[tuple[str, str, Edit, str]] = [
    # what is claimed
    ("plain", "signs", halved, r"blocks\.phi1\.nonnegative = True, expected False"),
    ("selection", "signs", put("blocks", 1, "nonnegative", value=False), "selection.nonnegative"),
    ("pixels", "signs", put("blocks", 1, "nonnegative", value=True), r"blocks\.pixels\.nonneg"),
    ("plain", "a sign", put("encoder", "taps", 0, "sign", value="positive"), r"taps\[0\]\.sign"),
    ("plain", "taps' signs", put("encoder", "taps", 0, "sign", value="nonnegative"), "phi1.nonneg"),
    ("plain", "claim", smaller_epsilon, "sd = .*the claim .* does not follow"),
    ("plain", "epsilon", put("epsilon", value=-1.0), "epsilon = -1.0"),
    ("plain", "epsilon", put("epsilon", value=0.0), "epsilon = 0.0"),
    ("plain", "epsilon", put("epsilon", value=1.9999), "mu = .*does not follow"),
    ("plain", "epsilon", put("epsilon", value=NAN), "epsilon: .*finite"),
    ("plain", "epsilon", put("epsilon", value=INF), "epsilon: .*finite"),
    ("plain", "epsilon", put("epsilon", value="2.0"), "epsilon: .*number"),
    ("plain", "epsilon", put("epsilon", value=None), "epsilon: .*number"),
    ("plain", "delta", put("delta", value=-1e-3), "delta = -0.001"),
    ("plain", "delta", put("delta", value=1.0), "delta = 1.0"),
    ("plain", "delta", put("delta", value=1e-4), "mu = .*does not follow"),
    ("plain", "mu", put("mu", value=-0.5), "mu = -0.5"),
    ("plain", "mu", put("mu", value=0.5), "mu = 0.5"),
    ("plain", "sd", put("sd", value=0.0), "sd = 0.0"),
    ("plain", "sd", put("sd", value=-1.0), "sd = -1.0"),
    ("plain", "sd", put("sd", value=1e9), r"sd = 1000000000\.0, expected"),
    ("plain", "noise_sd", put("noise_sd", value=0.1), "noise_sd = 0.1"),
    ("plain", "noise_sd", put("noise_sd", value=NAN), "noise_sd: .*finite"),
    ("plain", "sensitivity", put("sensitivity", value=1.0), "sensitivity = 1.0"),
    ("plain", "adjacency", put("adjacency", value="zero-out"), "sensitivity = .*zero-out"),
    ("plain", "adjacency", put("adjacency", value="x"), "adjacency = 'x'"),
    ("plain", "private", put("private", value=1), "private: .*boolean"),
    # units
    ("add-remove", "N", put("num_units", value=40), "num_units = 40, expected null"),
    ("plain", "N", put("num_units", value=None), "num_units = None, expected at least 1"),
    ("zero-out", "N", put("num_units", value=None), "num_units = None, expected at least 1"),
    ("plain", "N", put("num_units", value=-1), "num_units = -1"),
    ("unlabelled", "N", put("num_units", value=41), r"counts = \[40\.0\], expected \[num_units\]"),
    ("plain", "unit", put("unit", value="pixel"), "unit = 'pixel'"),
    ("plain", "unit", put("unit", value="group by "), "unit = 'group by '"),
    ("plain", "unit", put("unit", value="group by x"), r"blocks\.phi1\.spread = False"),
    ("grouped", "unit", put("unit", value="image"), r"blocks\.phi1\.spread = True"),
    # the layout
    ("plain", "grid", scaled, "grid_bits = 300000000, expected 30"),
    ("plain", "bound", put("bound", value="box"), "bound = 'box'"),
    ("plain", "moments", put("moments", value=[3]), r"moments = \(3,\)"),
    ("plain", "moments", put("moments", value=[1, 2]), r"blocks = \['phi1', 'counts'\]"),
    ("plain", "clip", put("clip", value=-1.0), r"clip = -1\.0"),
    ("plain", "clip", put("clip", value=2.0), "noise_sd = "),
    ("plain", "joint", put("joint_weight", value=1.0), r"joint_weight = 1\.0"),
    ("plain", "shared", put("shared_taps", value=1), r"blocks\.phi1\.spread"),
    ("plain", "shared", put("shared_taps", value=-1), "shared_taps = -1"),
    ("shared", "shared", put("shared_taps", value=2), "shared_taps = 2"),
    ("shared", "shared", put("shared_taps", value=0), r"blocks\.phi1\+phi2\.spread"),
    ("plain", "classes", put("num_classes", value=0), "num_classes = 0"),
    ("plain", "classes", put("num_classes", value=4), r"blocks\.phi1\.size = 264, expected 352"),
    ("plain", "classes", unlabelled, "num_classes = 3, expected .* labelled is false"),
    ("plain", "shape", put("image_shape", value=[2, 8, 8]), r"image_shape = \(2, 8, 8\)"),
    ("plain", "shape", put("image_shape", value=[1, 8, 0]), r"image_shape = \(1, 8, 0\)"),
    ("pixels", "shape", put("image_shape", value=[3, 8, 8]), r"pixel_encoder\.name"),
    ("plain", "name", put("blocks", 0, "name", value="phi9"), r"blocks = \['phi9'"),
    ("plain", "kind", put("blocks", 0, "kind", value="counts"), r"blocks\.phi1\.kind"),
    ("plain", "size", put("blocks", 0, "size", value=7), r"blocks\.phi1\.size = 7"),
    ("plain", "shared", put("blocks", 0, "shared", value=7), r"blocks\.phi1\.shared = 7"),
    ("plain", "weight", put("blocks", 0, "bound", value=0.0), r"blocks\.phi1\.bound = 0\.0"),
    ("plain", "weight", put("blocks", 0, "bound", value=1.5), r"blocks\.phi1\.bound = 1\.5"),
    ("plain", "weight", put("blocks", 0, "bound", value=0.3), r"blocks\.phi1\.bound = 0\.3"),
    ("plain", "weight", put("blocks", 0, "bound", value=0.5), "sensitivity = "),
    ("plain", "blocks", put("blocks", value=[]), r"blocks = \[\]"),
    ("plain", "blocks", doubled, "blocks = "),
    ("plain", "blocks", reversed_blocks, "blocks = "),
    ("plain", "key", put("blocks", 0, "more", value=1), "blocks.0.more: extra"),
    ("plain", "key", put("more", value=1), "more: extra"),
    # encoders
    ("plain", "encoder", put("encoder", value={}), r"encoder\.name = None"),
    ("plain", "taps", put("encoder", "taps", value=[]), r"encoder\.taps = \[\]"),
    ("plain", "taps", put("encoder", "taps", value=[1]), r"encoder\.taps\[0\] = 1"),
    ("plain", "taps", twice, r"encoder\.taps = \['a', 'a'\]"),
    ("plain", "taps", put("encoder", "taps", 0, "shape", value=[4, 4]), r"taps\[0\]\.shape"),
    ("plain", "taps", put("encoder", "taps", 0, "shape", value=[4, True, 4]), r"taps\[0\]\.shape"),
    ("plain", "taps", put("encoder", "taps", 0, "shape", value=[5, 4, 4]), r"phi1\.size"),
    ("pooled", "taps", put("encoder", "pool", value=1), r"encoder\.taps\[0\]\.shape"),
    ("constant", "constant", put("encoder", "constant", value=0.0), r"encoder\.constant = 0\.0"),
    ("constant", "constant", put("encoder", "constant", value="3"), r"encoder\.constant = '3'"),
    ("constant", "taps", put("encoder", "taps", 2, "name", value="c"), r"encoder\.taps = .*'c'"),
    ("plain", "constant", put("encoder", "constant", value=3.0), r"encoder\.taps = .*constant"),
    ("pixels", "constant", put("pixel_encoder", "constant", value=3.0), r"encoder\.taps = "),
    ("plain", "pool", put("encoder", "pool", value=0), r"encoder\.pool = 0"),
    ("plain", "size", put("encoder", "image_size", value=[8]), r"encoder\.image_size = \[8\]"),
    ("plain", "layout", put("encoder", "layout", value="NCHW"), r"encoder\.layout = 'NCHW'"),
    ("plain", "precision", put("encoder", "precision", value="int8"), r"encoder\.precision"),
    ("plain", "sha", put("encoder", "weights_sha256", value=3), r"weights_sha256 = 3"),
    ("selection", "none", put("selection_encoder", value=None), "blocks = .*expected phi1, counts"),
    ("selection", "taps", put("selection_encoder", "taps", value=0), r"encoder\.taps = 0"),
    ("pixels", "side", put("pixel_encoder", "image_size", value=[3, 4]), r"pixel_encoder\.image_s"),
    ("pixels", "none", put("pixel_encoder", value=None), "blocks = "),
    # what no encoder and no source records
    ("plain", "sha", put("encoder", "weights_sha256", value="zz"), r"weights_sha256 = 'zz'"),
    ("plain", "sha", put("encoder", "weights_sha256", value=""), r"encoder\.weights_sha256 = ''"),
    ("selection", "sha", put("selection_encoder", "weights_sha256", value="A" * 64), "weights_"),
    ("plain", "key", put("encoder", "extra", value=1), r"encoder\.extra = 1, .*no such"),
    ("plain", "key", put("encoder", "extra", value=NAN), r"encoder\.extra = nan"),
    ("plain", "key", put("encoder", "taps", 0, "x", value={"a": INF}), r"taps\[0\]\.x = "),
    ("selection", "key", put("selection_encoder", "extra", value=1), r"selection_encoder\.extra"),
    ("pixels", "key", put("pixel_encoder", "extra", value=1), r"pixel_encoder\.extra"),
    ("plain", "size", put("encoder", "image_size", value=[8, INF]), r"encoder\.image_size"),
    ("plain", "decoding", put("decoding", value={}), r"decoding = \{\}"),
    ("plain", "decoding", put("decoding", value={"orientation": "EXIF"}), "decoding = "),
    ("plain", "decoding", put("decoding", value={"a": "b"}), "decoding = "),
    ("plain", "decoding", put("decoding", value=decoded("none", "#ffffff")), "decoding = "),
    ("plain", "decoding", put("decoding", value=decoded("EXIF", "#fffff")), "decoding = "),
    ("plain", "decoding", put("decoding", value={**decoded("EXIF", "#ffffff"), "a": "b"}), "deco"),
    ("plain", "N", put("num_units", value=10**30), r"num_units = 10+, expected .* at most"),
    ("plain", "shape", put("image_shape", value=[3, 10**15, 8]), r"image_shape = .*at most"),
    ("plain", "format", put("format", value=3.0), r"format 3\.0"),
    # modes
    ("modes", "sha", put("modes", "sha256", value="0" * 64), r"modes\.sha256 = '000"),
    ("modes", "C", put("modes", "per_class", value=8), r"modes\.per_class = 8, expected 4"),
    ("modes", "C", put("modes", "per_class", value=0), r"modes\.per_class = 0, expected 4"),
    ("modes", "C", put("modes", "per_class", value=4.0), r"modes\.per_class: .*integer"),
    ("modes", "side", put("modes", "side", value=9), r"modes = 'directions: \[1, 2, 64\]"),
    ("modes", "side", put("modes", "side", value=-8), "modes = 'side=-8"),
    ("modes", "side", put("modes", "side", value=10**30), "modes = 'side="),
    ("modes", "channels", put("modes", "channels", value=3), "modes = 'directions"),
    ("modes", "more", put("modes", "more", value=1), r"modes\.more: extra"),
    ("modes", "none", put("modes", value=None), "modes = None, expected null, and no arrays"),
    ("plain", "arrays", with_rule, "modes = None, expected null, and no arrays of modes"),
    ("modes", "arrays", dropped("mode_thresholds"), "modes = 'without arrays'"),
    ("modes", "arrays", dropped(*RULE), "modes = 'without arrays'"),
    ("modes", "rule", nudged("mode_directions"), r"modes\.sha256"),
    ("modes", "rule", nudged("mode_thresholds"), r"modes\.sha256"),
    ("modes", "rule", put("mode_directions", ..., value=2**21, array=True), "whole numbers"),
    ("modes", "rule", put("mode_thresholds", value=torch.ones(3, 2), array=True), "int64 tensor"),
    ("modes", "classes", put("mode_thresholds", value=torch.ones(4, 2).long(), array=True),
     r"modes\.num_classes = 4, expected 3"),
    ("modes", "bits", put("mode_thresholds", value=torch.ones(3, 1).long(), array=True), "modes ="),
    ("modes", "classes", put("num_classes", value=4), r"modes\.num_classes = 3, expected 4"),
    ("modes", "shape", put("image_shape", value=[3, 8, 8]), r"modes\.channels = 1, expected 3"),
    ("modes", "format", put("format", value=3), r"modes = .*expected null"),
    ("modes", "origin", put("modes", "origin", value=None), r"modes\.sha256"),
    ("modes", "origin", put("modes", "origin", "array_sha256", value="z"), r"origin\.array_sha256"),
    ("modes", "origin", put("modes", "origin", "array_sha256", value="0" * 64), r"modes\.sha256"),
    ("modes", "origin", put("modes", "origin", "mu", value=0.01), r"modes\.origin\.mu = 0\.01"),
    ("modes", "origin", put("modes", "origin", "epsilon", value=0.5), r"modes\.origin\.mu"),
    ("modes", "origin", put("modes", "origin", "epsilon", value=-1.0), r"origin\.epsilon = \(-1"),
    ("modes", "origin", put("modes", "origin", "delta", value=1e-9), r"modes\.origin\.mu"),
    ("modes", "origin", put("modes", "origin", "adjacency", value="x"), r"origin\.adjacency = 'x'"),
    ("modes", "origin", put("modes", "origin", "adjacency", value="zero-out"), r"modes\.sha256"),
    ("modes", "origin", put("modes", "origin", "private", value=False), r"modes\.origin = .*noise"),
    ("modes", "origin", put("modes", "origin", "more", value=1), r"modes\.origin\.more: extra"),
    ("modes", "counts", put("counts", 0, value=1e6, array=True), "counts = .*expected at most"),
    ("modes", "counts", put("counts", 0, value=-9.123456789, array=True), "counts = -9.*multiple"),
    ("modes", "counts", put("counts", value=torch.ones(3).double(), array=True), r"counts is .*3"),
    ("modes", "sums", put("sums", value=torch.ones(1, 3, 88), array=True), r"\[1, 12, 88\]"),
    ("modes", "size", put("blocks", 0, "size", value=264), r"blocks\.phi1\.size = 264, .* 1056"),
    ("public modes", "spread", put("blocks", 1, "spread", value=False), r"pixels\.spread = False"),
    # moments of pixels alone
    ("alone", "encoder", with_encoder, r"moments = \(\)"),
    ("alone", "moments", put("moments", value=[1]), r"moments = \(1,\), expected \(\)"),
    ("alone", "bound", put("bound", value="ball"), "bound = 'ball', expected 'sphere'"),
    ("alone", "clip", put("clip", value=2.0), r"clip = 2\.0, expected 1\.0"),
    ("alone", "none", put("pixel_encoder", value=None), "encoder = None"),
    ("alone", "format", put("format", value=3), "encoder = None"),
    ("alone", "shared", put("shared_taps", value=1), "shared_taps = 1"),
    ("alone", "sums", put("sums", value=torch.ones(1, 3, 1), array=True), "sums is .*1, 3, 1"),
    ("plain", "encoder", put("encoder", value=None), r"moments = \(1,\), expected \(\)"),
    # arrays
    *(
        (kind, name, put(name, ..., value=value, array=True), f"{name} = .*expected at most")
        for kind, name in (
            ("plain", "sums"), ("grouped", "sums"), ("unlabelled", "sums"), ("zero-out", "sums"),
            ("shared", "sums"), ("shared", "shared"), ("pixels", "pixels"), ("pixels", "products"),
            ("pixels", "class_products"), ("selection", "selection"), ("plain", "counts"),
        )
        for value in (1e6,)
    ),
    ("plain", "sums", put("sums", 0, 0, 0, value=-1e4, array=True), r"sums = 10000\.0"),
    ("plain", "counts", put("counts", 0, value=9.123456789, array=True), "counts = 9.*multiple of"),
    ("add-remove", "counts", put("counts", 0, value=1e300, array=True), "counts = .*64 bits"),
    ("add-remove", "counts", put("counts", 0, value=20 + 1e-9, array=True), "counts = .*multiple"),
    *(
        (kind, name, put(name, ..., value=value, array=True), f"{name} = 'not finite'")
        for kind, name in (
            ("plain", "sums"), ("plain", "counts"), ("shared", "shared"),
            ("pixels", "pixels"), ("pixels", "products"), ("pixels", "class_products"),
            ("selection", "selection"),
        )
        for value in (NAN, INF)
    ),
    ("plain", "counts", put("counts", 0, value=0.5, array=True), r"counts = 0\.5, expected at le"),
    ("plain", "counts", put("counts", 0, value=-3.0, array=True), r"counts = -3\.0"),
    ("plain", "counts", put("counts", value=torch.ones(3), array=True), "counts is torch.float32"),
    ("unlabelled", "counts", put("counts", 0, value=9.0, array=True), r"counts = \[9\.0\]"),
    ("pixels", "products", asymmetric("products"), "products = 'not symmetric'"),
    ("pixels", "products", asymmetric("class_products"), "class_products = 'not symmetric'"),
    ("pixels", "products", dropped("products"), "products is missing"),
    ("pixels", "pixels", dropped("pixels", "products", "class_products"), "pixels is missing"),
    ("selection", "selection", dropped("selection"), "selection is missing"),
    ("shared", "shared", dropped("shared"), "shared is missing"),
    ("plain", "more", put("shared", value=torch.ones(1, 1, 1), array=True), "shared is .*none"),
    ("plain", "sums", put("sums", value=torch.ones(1, 3, 9), array=True), r"\[1, 3, 9\], expected"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "edit", "message"),
    EDITS,
    ids=[f"{i}-{e[0]}-{e[1]}" for i, e in enumerate(EDITS)],
)
def test_a_contradiction_is_refused_by_its_field(
    tmp_path: Path, kind: str, name: str, edit: Edit, message: str
) -> None:
    path = forged(tmp_path / "r.safetensors", kind, edit)
    with pytest.raises(PrivacyError, match=message):
        Release.load(path)


BEFORE_MODES = (
    "plain", "unlabelled", "add-remove", "zero-out", "grouped", "pixels", "selection", "shared",
    "pooled",
)  # fmt: skip
KINDS = (*BEFORE_MODES, "constant", "modes", "public modes", "alone")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_released_contradicts_nothing(tmp_path: Path, kind: str) -> None:
    release = made(kind)
    again = Release.load(release.save(tmp_path / "r.safetensors"))
    assert again.metadata == release.metadata
    assert again.metadata.format == 4
    forged(tmp_path / "same.safetensors", kind, lambda *_: None)
    Release.load(tmp_path / "same.safetensors")


@pytest.mark.parametrize("kind", BEFORE_MODES)
def test_files_of_format_3_are_read(tmp_path: Path, kind: str) -> None:
    def earlier(fields: dict[str, Any], tensors: Tensors) -> None:
        del fields["modes"]
        fields["format"] = 3

    again = Release.load(forged(tmp_path / "r.safetensors", kind, earlier))
    assert again.metadata == made(kind).metadata.model_copy(update={"format": 3})
    assert torch.equal(again.target, made(kind).target)


@pytest.mark.parametrize("kind", BEFORE_MODES)
def test_files_of_format_2_are_read(tmp_path: Path, kind: str) -> None:
    """What was added since then has the value of before; mu was rounded less carefully."""

    def earlier(fields: dict[str, Any], tensors: Tensors) -> None:
        for key in set(fields) - BEFORE:
            del fields[key]
        fields["format"] = 2
        fields["mu"] *= 1 + 1e-9
        fields["sd"] /= 1 + 1e-9
        fields["noise_sd"] /= 1 + 1e-9

    path = forged(tmp_path / "r.safetensors", kind, earlier)
    again = Release.load(path)
    assert again.metadata.format == 2
    assert torch.equal(again.sums, made(kind).sums)
    assert "(2, 0.001)" in again.report()

    def later(fields: dict[str, Any], tensors: Tensors) -> None:
        earlier(fields, tensors)
        fields["format"] = 3

    with pytest.raises(PrivacyError, match=r"delta = 0\.001, expected at least 0\.00100000"):
        Release.load(forged(path, kind, later))


BEFORE = {
    "format", "version", "private", "adjacency", "unit", "epsilon", "delta", "mu", "sd",
    "sensitivity", "noise_sd", "grid_bits", "moments", "bound", "clip", "joint_weight",
    "blocks", "num_classes", "labelled", "num_units", "image_shape", "source",
    "encoder", "pixel_encoder", "selection_encoder", "shared_taps", "array_sha256",
}  # fmt: skip


def test_arrays_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = made("pixels").save(tmp_path / "r.safetensors")
    release = Release.load(path)
    with open(path, "r+b") as file:
        file.seek(-64, 2)
        file.write(b"\xff" * 64)
        size = file.tell()
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    for name in ("sums", "counts", *FURTHER):
        ours, theirs = getattr(release, name), getattr(made("pixels"), name)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", ["modes", "alone"])
def test_a_damaged_byte_is_found(tmp_path: Path, kind: str) -> None:
    """Wherever it is: the file is refused, or holds the same."""
    path = made(kind).save(tmp_path / "r.safetensors")
    data = path.read_bytes()
    begin = len(data) - sum(t.nbytes for t in load_file(path).values())
    places = np.random.default_rng(0).integers(0, len(data), 40).tolist()
    places += np.random.default_rng(1).integers(0, begin, 20).tolist()
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        try:
            again = Release.load(path)
        except PrivacyError:
            continue
        assert place < begin
        assert again.metadata == made(kind).metadata
        assert torch.equal(again.counts, made(kind).counts)


@pytest.mark.parametrize("key", ['"epsilon": ', '"sign": '])
def test_a_key_that_stands_there_twice_is_refused(tmp_path: Path, key: str) -> None:
    """Another reader could take the other value."""
    path = made("plain").save(tmp_path / "r.safetensors")
    text = json.dumps(json.loads(made("plain").metadata.model_dump_json()))
    text = text.replace(key, f"{key}0.01, {key}", 1)
    kept = {"dpmmd": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file({"sums": made("plain").sums, "counts": made("plain").counts}, path, kept)
    with pytest.raises(PrivacyError, match=rf"metadata have '{key[1:-3]}' twice"):
        Release.load(path)


def test_what_no_file_could_record_costs_nothing(tmp_path: Path) -> None:
    encoder = small_encoder()
    encoder.weights_sha256 = "mine"
    with pytest.raises(ValueError, match=r"weights_sha256 = 'mine'.*Nothing was spent"):
        dpmmd.release(
            images(40), encoder, epsilon=1, delta=1e-3, adjacency="replace-one", progress=False,
            ledger=tmp_path / "ledger",
        )  # fmt: skip
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "null", '"x"', "{", "[" * 100_000, '{"format": [3]}', '{"format": 3}',
        '{"format": NaN}', '{"format": ' + "9" * 5000 + "}", '{"format": 3, "epsilon": 1e999}',
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_metadata_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.safetensors"
    kept = {"dpmmd": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file({"sums": torch.ones(1), "counts": torch.ones(1)}, path, kept)
    with pytest.raises(PrivacyError, match=r"not a readable release|dpmmd reads"):
        Release.load(path)
