"""Triton's kernels of generators' and encoders' layers against PyTorch in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.core import interpreted
from tests.core.interpreted import small_blocks  # noqa: F401

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
else:
    from dpmmd import generators
    from dpmmd._choices import CHOICES
    from dpmmd.encoders import layers
    from dpmmd.generators import fused, resnet
    from dpmmd.generators.fused import AddUpsampled, NormRelu
    from dpmmd.generators.layers import initialise, norm_relu, recomputed
    from dpmmd.kernels import maps, normalise, table
    from dpmmd.kernels.taps import launch

    pytestmark = pytest.mark.usefixtures("small_blocks")

    SHAPES = [(2, 5, 2, 3), (1, 9, 2, 1), (5, 1, 2, 1), (2, 3, 1, 1)]
    DTYPES = [torch.float32, torch.bfloat16]
    CUT = 2**-7  # the interpreter cuts bfloat16 off where a GPU rounds

    def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def batch_norm(channels: int, momentum: float = 0.3) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(channels, momentum=momentum, eps=1e-3)
        with torch.no_grad():
            norm.weight.copy_(random(channels, seed=1) + 1)
            norm.bias.copy_(random(channels, seed=2))
        return norm

    def by_kernels(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        y: Tensor = NormRelu.apply(x, norm.weight, norm.bias, norm)
        return y

    def both(
        norm: nn.BatchNorm2d, x: Tensor, grad: Tensor
    ) -> tuple[list[Tensor], list[Tensor], nn.BatchNorm2d]:
        """Output and gradients by the kernels and in float64, and the norm of float64."""
        true = nn.BatchNorm2d(norm.num_features, momentum=norm.momentum, eps=norm.eps).double()
        true.load_state_dict(norm.state_dict())
        results = []
        for run, layer, value in ((by_kernels, norm, x), (None, true, x.double())):
            value = value.detach().requires_grad_()
            y = F.relu(layer(value)) if run is None else run(layer, value)
            parts = torch.autograd.grad(y, (value, layer.weight, layer.bias), grad.to(y.dtype))
            results.append([y.detach(), *parts])
        return results[0], results[1], true

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_norm_and_relu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
        norm = batch_norm(shape[1])
        x, grad = random(*shape, seed=3, dtype=dtype), random(*shape, seed=4, dtype=dtype)
        found, truth, true = both(norm, 2 * x + 1, grad)
        assert found[0].dtype == found[1].dtype == dtype
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        for i, (a, b) in enumerate(zip(found, truth, strict=True)):
            tolerance = CUT if dtype == torch.bfloat16 and i < 2 else 3e-5
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
        for key, buffer in norm.named_buffers():
            torch.testing.assert_close(buffer, true.get_buffer(key).to(buffer.dtype))
        assert int(norm.num_batches_tracked) == 1

    def test_a_large_mean_takes_no_digits_of_the_variance() -> None:
        norm, x = batch_norm(5), random(2, 5, 3, 2, seed=3) + 1000
        found, truth, _ = both(norm, x, random(2, 5, 3, 2, seed=4))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)

    def test_parts_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
        """Uneven ones too: 7 tiles of rows in parts of 3 for each of 2 blocks of channels."""
        monkeypatch.setattr(table, "REDUCING_PROGRAMS", 6)
        shape = (2, 9, 1, 13)
        found, truth, _ = both(batch_norm(9), random(*shape, seed=3), random(*shape, seed=4))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)

    def test_the_same_bits_again() -> None:
        x, grad = random(2, 5, 3, 2, seed=3), random(2, 5, 3, 2, seed=4)
        first, again = (both(batch_norm(5), x, grad)[0] for _ in "ab")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_other_layouts_and_a_gradient_that_is_one_number() -> None:
        x = random(2, 5, 3, 2, seed=3).contiguous().requires_grad_()
        norm = batch_norm(5)
        (found,) = torch.autograd.grad(by_kernels(norm, x).sum(), x)
        (truth,) = torch.autograd.grad(F.relu(norm(x)).sum(), x)
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)

    def test_momentum_zero_leaves_running_statistics_as_they_are() -> None:
        """So does `recomputed`, whose second pass must not move them."""
        norm = batch_norm(5, momentum=0.0)
        norm.running_mean += 0.1
        before = norm.running_mean.clone(), norm.running_var.clone()
        by_kernels(norm, random(2, 5, 3, 2))
        assert torch.equal(norm.running_mean, before[0])
        assert torch.equal(norm.running_var, before[1])

    def test_what_is_not_a_number_stays_so() -> None:
        x = random(2, 3, 2, 2)
        x[0, 1, 1, 1] = torch.nan
        y = by_kernels(batch_norm(3), x)
        assert y[:, 1].isnan().all()
        assert y[:, ::2].isfinite().all()

    def test_tiles_of_a_narrow_map_are_long() -> None:
        cut = normalise.Cut.of("normalise", random(4, 2, 3, 3))
        assert (cut.options["BLOCK"], cut.options["ROWS"]) == (2, 16)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_sum_with_an_upsampled_map(shape: tuple[int, ...], dtype: torch.dtype) -> None:
        n, channels, height, width = shape
        h = random(n, channels, 2 * height, 2 * width, seed=1, dtype=dtype).requires_grad_()
        s = random(*shape, seed=2, dtype=dtype).requires_grad_()
        grad = random(*h.shape, seed=3, dtype=dtype)
        tolerance = 1e-6 if dtype == torch.float32 else CUT
        found, truth = AddUpsampled.apply(h, s), h + F.interpolate(s, scale_factor=2)
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=0)
        assert found.is_contiguous(memory_format=torch.channels_last)
        dh, ds = torch.autograd.grad(found, (h, s), grad)
        assert torch.equal(dh, grad)
        expected = grad.double().view(n, channels, height, 2, width, 2).sum((3, 5))
        assert ds.dtype == dtype
        torch.testing.assert_close(ds.double(), expected, rtol=tolerance, atol=1e-6)

    @pytest.fixture
    def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """All kernels are taken, here on the CPU; the names of those that have run."""
        ran: list[str] = []

        def note(kernel: Any, *args: Any, **options: Any) -> None:
            ran.append(kernel.__name__)
            launch(kernel, *args, **options)

        for module in (maps, normalise):
            monkeypatch.setattr(module, "launch", note)
        for key in ("fused_norms", "fused_upsampling", "byte_pools"):
            monkeypatch.setattr(CHOICES, key, True)
        for module in (fused, layers):
            monkeypatch.setattr(module, "has_kernels", lambda x: True)
        monkeypatch.setattr(table, "lookup", lambda *_: table.Config(16, 64, 4, 1, 255))
        return ran

    def gradients(module: nn.Module, y: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(
            (y * torch.linspace(0, 1, y.shape[-1])).sum(), list(module.parameters())
        )
        return [y.detach(), *grads, *(b.double() for b in module.buffers())]

    def test_a_generator_computes_the_same_by_kernels(chosen: list[str]) -> None:
        plain = generators.build(
            "conv", num_classes=None, image_size=8, channels=1, z_dim=3, base_channels=2
        )
        ours, z = copy.deepcopy(plain), random(4, 3)
        found = gradients(ours, ours(z))
        assert len(chosen) == 3 * 6
        CHOICES.fused_norms = False
        truth = gradients(plain, plain(z))
        assert len(chosen) == 3 * 6
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)

    def test_a_recomputed_block_moves_its_statistics_once(chosen: list[str]) -> None:
        plain = resnet._UpBlock(3, 2)
        initialise(plain)
        ours, x = copy.deepcopy(plain), random(2, 3, 2, 2)
        found = gradients(ours, recomputed(ours, x))
        assert set(chosen) >= {"add_kernel", "fold_kernel", "apply_slopes"}
        CHOICES.fused_norms = CHOICES.fused_upsampling = False
        torch.testing.assert_close(found, gradients(plain, plain(x)), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "norm",
        [
            nn.BatchNorm2d(3).eval(),
            nn.BatchNorm2d(3, affine=False),
            nn.BatchNorm2d(3, track_running_stats=False),
            nn.BatchNorm2d(3, momentum=None),
            nn.BatchNorm2d(3).double(),
            nn.SyncBatchNorm(3),
            nn.GroupNorm(1, 3),
        ],
        ids=str,
    )
    def test_other_norms_are_left_to_torch(chosen: list[str], norm: nn.Module) -> None:
        assert not fused.takes_norm(norm, random(2, 3, 2, 2))

    def test_a_norm_with_hooks_is_left_to_torch(chosen: list[str]) -> None:
        norm = nn.BatchNorm2d(3)
        norm.register_forward_hook(lambda *_: None)
        assert not fused.takes_norm(norm, random(2, 3, 2, 2))
        assert fused.takes_norm(nn.BatchNorm2d(3), random(2, 3, 2, 2))

    def test_one_value_a_channel_is_refused_as_torch_does(chosen: list[str]) -> None:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm_relu(nn.BatchNorm2d(3), random(1, 3, 1, 1))

    def test_sums_of_other_shapes_or_dtypes_are_left_to_torch(chosen: list[str]) -> None:
        h, s = random(2, 3, 4, 4), random(2, 3, 2, 2)
        assert fused.takes_sum(h, s)
        assert not fused.takes_sum(h.bfloat16(), s)
        assert not fused.takes_sum(h, random(2, 3, 2, 1))

    WINDOWS = [(2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 0)]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("window", WINDOWS)
    def test_max_pool(chosen: list[str], window: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Overlapping windows, rows that none reaches, ties between zeros, maps of -inf."""
        x = random(2, 18, 5, 6, dtype=dtype).relu()
        x[0, 0] = -torch.inf
        x = x.requires_grad_()
        pool = layers.MaxPool(*window)
        found, truth = pool(x), F.max_pool2d(x, *window)
        assert chosen == ["pool_kernel"]
        assert torch.equal(found, truth)
        assert found.is_contiguous(memory_format=torch.channels_last)
        grad = random(*found.shape, seed=1, dtype=dtype)
        (dx,) = torch.autograd.grad(found, x, grad)
        exact = x.detach().double().requires_grad_()
        F.max_pool2d(exact, *window).backward(grad.double())
        assert chosen == ["pool_kernel", "unpool_kernel"]
        assert dx.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else CUT
        torch.testing.assert_close(dx.double(), exact.grad, rtol=tolerance, atol=1e-6)

    def test_what_is_not_a_number_is_a_maximum(chosen: list[str]) -> None:
        x = random(1, 2, 4, 4)
        x[0, 0, 1, 0] = x[0, 0, 1, 1] = x[0, 1, 0, 0] = torch.nan
        x = x.requires_grad_()
        found, truth = layers.MaxPool(2, 2)(x), F.max_pool2d(x, 2, 2)
        torch.testing.assert_close(found, truth, rtol=0, atol=0, equal_nan=True)
        grad = random(*found.shape, seed=1)
        gradients = [torch.autograd.grad(y, x, grad)[0] for y in (found, truth)]
        assert torch.equal(*gradients)

    def test_a_pool_without_gradients_is_torchs(chosen: list[str]) -> None:
        """As in a release, or where a window has too many places for a byte."""
        with torch.no_grad():
            layers.MaxPool(2, 2)(random(1, 2, 4, 4).requires_grad_())
        layers.MaxPool(2, 2)(random(1, 2, 4, 4))
        layers.MaxPool(16, 16)(random(1, 2, 16, 16).requires_grad_())
        assert chosen == []
        with pytest.raises(RuntimeError, match="too small"):
            layers.MaxPool(5, 5)(random(1, 2, 4, 4).requires_grad_())
