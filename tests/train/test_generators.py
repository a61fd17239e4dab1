"""The generators: shapes, range, classes, initial weights, and that they can learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpmmd import generators
from dpmmd.generators import NAMES, build
from dpmmd.generators.layers import ClassNorm, UpsampledConv, to_pixels


def small(name: str, num_classes: int | None = 3, **options: object) -> nn.Module:
    torch.manual_seed(0)
    defaults = {"image_size": 32, "channels": 1, "z_dim": 5, "base_channels": 4}
    return build(name, num_classes=num_classes, **{**defaults, **options})  # type: ignore[arg-type]


def latents(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("conv", 8, 1),
        ("conv", 28, 1),
        ("conv", 32, 3),
        ("conv-by-class", 32, 3),
        ("dcgan", 32, 3),
        ("dcgan", 64, 1),
        ("dcgan", 128, 3),
        ("resnet", 32, 3),
        ("resnet", 64, 1),
        ("resnet", 128, 3),
        ("resnet", 256, 3),
        ("resnet", 512, 3),
    ],
)
@pytest.mark.parametrize("classes", [None, 3])
def test_shape_range_and_attributes(
    name: str, size: int, channels: int, classes: int | None
) -> None:
    generator = small(name, classes, image_size=size, channels=channels)
    assert (generator.z_dim, generator.num_classes) == (5, classes)
    assert (generator.image_size, generator.channels) == (size, channels)
    images = generator(latents(2), None if classes is None else torch.tensor([0, 2]))
    assert images.shape == (2, channels, size, size)
    assert images.dtype == torch.float32
    assert bool(((images >= 0) & (images <= 1)).all())
    assert images.std() > 0.01  # neither constant nor saturated at the start
    assert bool(((images > 0.001) & (images < 0.999)).float().mean() > 0.9)


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_batch_of_one_in_eval_mode(name: str) -> None:
    generator = small(name).eval()
    assert generator(latents(1), torch.tensor([1])).shape == (1, 1, 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_in_eval_mode_an_image_does_not_depend_on_its_batch(name: str) -> None:
    generator = small(name).eval()
    z, y = latents(6), torch.arange(6) % 3
    alone = torch.cat([generator(z[i : i + 1], y[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(generator(z, y), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_class_and_the_latent_both_change_the_image(name: str) -> None:
    generator = small(name).eval()
    z = latents(2)
    zero, one = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    first, second = generator(z, zero), generator(z, one)
    assert (first - second).abs().amax() > 1e-3
    assert (first[0] - first[1]).abs().amax() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_and_the_latent(name: str) -> None:
    generator = small(name)
    z = latents(6).requires_grad_()
    (generator(z, torch.arange(6) % 3) * torch.linspace(0, 1, 32)).sum().backward()
    for key, parameter in generator.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key
    assert z.grad is not None
    assert bool((z.grad.abs().sum(dim=1) > 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_it_can_learn_an_image_for_each_class(name: str) -> None:
    generator = small(name, image_size=32, base_channels=8)
    targets = torch.zeros(3, 1, 32, 32)
    for k in range(3):
        targets[k, :, 10 * k : 10 * k + 10] = 1.0
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    y = torch.arange(12) % 3
    for step in range(120 if name == "dcgan" else 40):
        loss = (generator(latents(12, step), y) - targets[y]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02  # a constant image has 0.22


def test_by_class_one_class_may_vary_less_than_another() -> None:
    generator = small("conv-by-class", 2)
    norms = [m for m in generator.modules() if isinstance(m, ClassNorm)]
    assert len(norms) == 3
    with torch.no_grad():
        norms[0].scale[0] = 0
        norms[0].shift[0] = 1
    images = generator(latents(8), torch.arange(8) % 2).detach()
    torch.testing.assert_close(images[::2], images[:1].expand(4, -1, -1, -1))
    assert float(images[1::2].std(0).mean()) > 0.01
    unlabelled = small("conv-by-class", None)
    assert not any(isinstance(m, ClassNorm) for m in unlabelled.modules())


@pytest.mark.parametrize("name", NAMES)
def test_the_initial_weights_follow_the_seed(name: str) -> None:
    first, again = small(name).state_dict(), small(name).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_dcgan_is_radfords() -> None:
    """From 4 x 4 to the image in four doublings, each output pixel from 2 x 2 inputs."""
    generator = build("dcgan", num_classes=None, image_size=64, channels=3)
    convolutions = [m for m in generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [m.in_channels for m in convolutions] == [512, 256, 128, 64]
    assert convolutions[-1].out_channels == 3
    for layer in convolutions:
        spread = float(layer.weight.detach().std()) * (4 * layer.in_channels / 2) ** 0.5
        assert abs(spread - 1) < 5 / layer.weight.numel() ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_are_he_normal_and_biases_zero(name: str) -> None:
    generator = small(name, base_channels=16)
    for key, layer in generator.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            spread = float(layer.weight.detach().std() * (fan_in / 2) ** 0.5)
            assert abs(spread - 1) < 5 / layer.weight.numel() ** 0.5, key
            assert layer.bias is None or not layer.bias.any(), key


def test_the_paper_generators_size() -> None:
    generator = build("resnet", num_classes=10, image_size=32, channels=3)
    assert generator.z_dim == 100
    assert generator.to_image.in_channels == 64
    assert len(generator.blocks) == 3  # 4, 8, 16, 32


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        (32, [512, 256, 128]),
        (256, [512, 512, 512, 512, 256, 128]),
        (512, [512, 512, 512, 512, 512, 256, 128]),
    ],
)
def test_the_paper_generators_widths(size: int, widths: list[int]) -> None:
    """base_channels at full resolution, doubled with every halving up to eight times."""
    with torch.device("meta"):
        generator = build("resnet", num_classes=None, image_size=size, channels=3)
    assert [block.conv1.in_channels for block in generator.blocks] == widths
    assert generator.to_image.in_channels == 64


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_required_exactly_where_there_are_classes(name: str) -> None:
    with pytest.raises(ValueError, match="num_classes=3"):
        small(name)(latents(2), None)
    with pytest.raises(ValueError, match="num_classes=None"):
        small(name, None)(latents(2), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("conv", 30, "multiple of 4"),
        ("conv", 4, "at least 8"),
        ("dcgan", 28, "32, 64 or 128"),
        ("resnet", 28, "32, 64, 128"),
        ("resnet", 1024, "256 or 512"),
    ],
)
def test_a_size_it_cannot_make_is_refused(name: str, size: int, expected: str) -> None:
    with pytest.raises(ValueError, match=f"image_size={size}.*{expected}"):
        small(name, image_size=size)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'stylegan'.*conv, conv-by-class, dcgan, resnet"):
        small("stylegan")


def test_the_registry_names_what_it_exports() -> None:
    assert set(NAMES) == {"conv", "conv-by-class", "dcgan", "resnet"}
    assert isinstance(small("conv"), generators.ConvGenerator)
    assert isinstance(small("dcgan"), generators.DCGANGenerator)
    assert isinstance(small("resnet"), generators.ResNetGenerator)


def under_autocast(generator: nn.Module, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        images: torch.Tensor = generator(z, y)
    return images


@pytest.mark.parametrize("name", NAMES)
def test_in_mixed_precision_images_statistics_and_gradients_are_float32(name: str) -> None:
    plain, mixed = small(name), small(name)
    z, y = latents(4), torch.arange(4) % 3
    kinds: dict[str, tuple[torch.dtype, bool]] = {}
    for key, module in mixed.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):

            def note(_: Any, inputs: Any, output: torch.Tensor, key: str = key) -> None:
                channels_last = output.is_contiguous(memory_format=torch.channels_last)
                kinds[key] = output.dtype, channels_last

            module.register_forward_hook(note)
    expected, images = plain(z, y), under_autocast(mixed, z, y)
    assert images.dtype == torch.float32
    assert set(kinds.values()) == {(torch.bfloat16, True)}  # no layer falls back to float32
    assert images.unique().numel() > 1000  # bfloat16 has 256 values between 1/2 and 1
    torch.testing.assert_close(images, expected, rtol=0, atol=0.06)
    images.square().mean().backward()
    expected.square().mean().backward()
    for (key, a), b in zip(mixed.named_parameters(), plain.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == torch.float32
        if b.grad.norm() > 1e-6:  # a batch norm takes the bias before it away again
            assert F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.98, key
    for key, buffer in mixed.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64), key
        torch.testing.assert_close(buffer, plain.get_buffer(key), rtol=0.03, atol=0.03)


def test_pixels_of_half_precision_are_float32() -> None:
    x = torch.tensor([-9.0, 0.0, 9.0])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(to_pixels(x.to(dtype)), torch.sigmoid(x))
    assert to_pixels(x.double()).dtype == torch.float64


def test_upsampled_conv_is_convolution_after_nearest_upsampling() -> None:
    """And so are its gradients, the second one included."""
    layer = UpsampledConv(5, 3).double()
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)
    found = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight), create_graph=True)
    truth = torch.autograd.grad(expected.square().sum(), (x, layer.weight), create_graph=True)
    torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-13)
    twice, true = (
        torch.autograd.grad(sum(g.square().sum() for g in pair), layer.weight)
        for pair in (found, truth)
    )
    torch.testing.assert_close(twice, true, rtol=1e-12, atol=1e-12)


def test_its_kernel_has_the_bits_of_products_with_zeros_and_ones() -> None:
    """Sums over rows, then columns: a training that was begun with them goes on with the same."""
    layer = UpsampledConv(5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 5, 7, 6).contiguous(memory_format=torch.channels_last)
    spread = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    rows = torch.einsum("ku,oiuv->okiv", spread, layer.weight)
    kernel = torch.einsum("okiv,lv->iokl", rows, spread)
    expected = F.conv_transpose2d(x, kernel, stride=2, padding=1)
    assert torch.equal(layer(x), expected)
    (found,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    (truth,) = torch.autograd.grad(expected.square().sum(), layer.weight)
    assert torch.equal(found, truth)
    assert found.stride() == layer.weight.stride()  # the optimizer copies none
    assert list(layer.state_dict()) == ["weight"]


def test_a_generator_compiles_into_one_graph() -> None:
    generator = small("conv", image_size=8)
    z, y = latents(4), torch.arange(4) % 3
    compiled = torch.compile(generator, backend="aot_eager", fullgraph=True)
    found, truth = (
        torch.autograd.grad(run(z, y).square().sum(), list(generator.parameters()))
        for run in (compiled, generator)
    )
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
