"""What every encoder is: a frozen backbone whose feature maps are tapped by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpmmd.devices import device_of
from dpmmd.encoders.layers import Rectified, Rectify
from dpmmd.precision import bfloat16_hindrance, float32_products

SIGNS = ("nonnegative", "signed")
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,  # on the matrix units of a GPU
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "float16": torch.float16,
}
_HALF = (torch.bfloat16, torch.float16)
_CONSTANT = "constant"  # the tap's name, and the key of its value in what a release records

# Interpolation may overshoot [0, 1] by a rounding error; a forgotten division by 255 or a tanh
# output is outside by far more.
_RANGE_SLACK = 1e-5


@dataclass(frozen=True)
class Tap:
    """A feature map that an encoder hands out.

    Attributes:
        name: its name in the backbone.
        shape: (C, H, W) at the encoder's image size, after pooling.
        sign: "nonnegative" (every value >= 0 for every image) or "signed".
    """

    name: str
    shape: tuple[int, int, int]
    sign: str

    @property
    def size(self) -> int:
        """C * H * W, the number of features of this tap."""
        return prod(self.shape)


class StagedBackbone(nn.Module):
    """A backbone that is a chain of stages, each ending in a tap.

    Args:
        stages: tap name -> module, in the order in which they run.
        mean, std: per RGB channel; the first stage sees (images - mean) / std, computed in float32
            if the stages are in half precision, and then rounded.

    `forward` takes images [n, 3, H, W] in [0, 1] and returns {tap name: feature map [n, C, h, w]}.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.names = tuple(stages)
        self.stages = nn.ModuleList(stages.values())
        self._constants = {"mean": tuple(mean), "std": tuple(std)}
        for key, values in self._constants.items():
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1))

    def truncated(self, names: Sequence[str]) -> StagedBackbone:
        """The same backbone without the stages behind the deepest of the taps `names`."""
        depth = 1 + max(self.names.index(name) for name in names)
        short = StagedBackbone(
            dict(zip(self.names[:depth], self.stages[:depth], strict=True)), **self._constants
        )
        short.mean, short.std = self.mean, self.std
        return short

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StagedBackbone:
        super()._apply(fn, recurse)
        for key, values in self._constants.items():
            if (buffer := getattr(self, key)).dtype in _HALF:
                exact = torch.tensor(values, dtype=torch.float32, device=buffer.device)
                setattr(self, key, exact.view(1, 3, 1, 1))
        return self

    def forward(
        self, images: Tensor, rectify: Mapping[str, Rectify] | None = None
    ) -> dict[str, Tensor]:
        """The taps; ``rectify`` does the work of the ReLUs of these `Rectified` stages."""
        x = ((images - self.mean) / self.std).to(_dtype(self))
        taps = {}
        for name, stage in zip(self.names, self.stages, strict=True):
            given = None if rectify is None else rectify.get(name)
            taps[name] = x = stage(x) if given is None else stage(x, given)
        return taps


class Encoder(nn.Module):
    """A frozen feature extractor: images in, a list of feature maps out.

    To use a backbone of your own, give any nn.Module whose forward takes RGB images [n, 3, H, W]
    in [0, 1], normalises them itself, and returns an ordered dict {tap name: feature map
    [n, C, h, w]}. The features of one image must not depend on the other images of its batch
    (privacy rests on it): batch statistics are refused, and a probe compares one image's taps in
    two batches when the encoder is built. A `StagedBackbone` is cut behind the deepest tap asked
    for, so that nothing deeper is computed; any other backbone runs whole.

    The backbone is taken over: frozen, set to evaluation mode for good and converted to
    channels-last, so that `fmap.permute(0, 2, 3, 1).reshape(n, -1)`, the order in which features
    are flattened, costs no copy. Gradients flow to the images.

    Args:
        backbone: see above.
        name: what a release records as the encoder's name.
        weights_sha256: what identifies the weights in a release, usually the file's hash.
        image_size: side or (height, width); images of another size are resized to it
            (bilinear, not anti-aliased, the same operation for private and generated images).
        tap_signs: tap name -> "nonnegative" or "signed", for every tap used. Declare
            "nonnegative" only for the very output of a ReLU or the like: sensitivities depend
            on it.
        taps: names of the taps to hand out, in this order; None for all that tap_signs lists.
        pool: None, or p: a tap larger than p x p is averaged down to p x p (adaptive average
            pooling, each side on its own).
        precision: "float32", "tf32", "bfloat16", "float64" or "float16": what the backbone is
            converted to, computes in and hands out; None for its own. A release records it.
            "bfloat16" needs a CPU with AVX-512 (or ARM with bf16), or a GPU; it keeps 8 bits of a
            feature and halves its memory. "tf32" is float32 whose products may run on a GPU's
            matrix units, which round factors to 11 bits; "float32" is IEEE's, also where PyTorch's
            settings allow TF32 (in convolutions they do by default). This holds for the features;
            their gradient follows PyTorch's settings.
        constant: None, or the value of one more feature, a tap "constant", alike for all images.
            A bound that is a sphere norms features, and with them the contrast of an image is
            lost: at twice the contrast they point nearly the same way. Beside a constant of about
            the size of their norm they do not.

    Raises:
        ValueError: an unknown tap, a tap without a sign, an image too small for the backbone, a
            precision that this machine cannot compute in, a ``constant`` that is not above 0, or a
            backbone that does not keep to the rules above.
    """

    _range_known = False  # whether images come from where none can be outside [0, 1]
    taps: tuple[Tap, ...]
    rectified: tuple[str, ...]  # taps that are the very output of a `Rectified` stage

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        weights_sha256: str,
        image_size: int | tuple[int, int] = 32,
        tap_signs: Mapping[str, str],
        taps: Sequence[str] | None = None,
        pool: int | None = None,
        precision: str | None = None,
        constant: float | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.constant = _constant(constant, tap_signs)
        self.weights_sha256 = weights_sha256
        self.image_size = _image_size(image_size)
        self.pool = _pool(pool)
        names = _tap_names(taps, tap_signs, name)
        if isinstance(backbone, StagedBackbone):
            unknown = [tap for tap in names if tap not in backbone.names]
            if unknown:
                raise ValueError(f"backbone has no tap {unknown[0]!r}; it has {backbone.names}")
            backbone = backbone.truncated(names)
        _refuse_batch_statistics(backbone)
        self._tf32 = precision == "tf32"
        if precision is not None:
            backbone = backbone.to(_usable_dtype(precision))
        self.backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)
        self.train(False)
        # The modules whose mode forward() checks, since a backbone can be reached without us.
        self._modules_kept_in_eval = tuple(self.modules())
        self._names = names
        self.taps = self._probe({tap: tap_signs[tap] for tap in names})
        if self.constant is not None:
            self.taps += (Tap(_CONSTANT, (1, 1, 1), "nonnegative"),)

    @property
    def dim(self) -> int:
        """D, the number of features of one image: the sum of the taps' sizes."""
        return sum(tap.size for tap in self.taps)

    @property
    def precision(self) -> str:
        """One of PRECISIONS."""
        dtype = _dtype(self.backbone)
        single = dtype == torch.float32
        return "tf32" if single and self._tf32 else str(dtype).removeprefix("torch.")

    def spec(self) -> dict[str, Any]:
        """What a release records of this encoder: JSON-able, and enough for `from_spec`."""
        constant = {} if self.constant is None else {_CONSTANT: self.constant}
        return constant | {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "image_size": list(self.image_size),
            "taps": [
                {"name": tap.name, "shape": list(tap.shape), "sign": tap.sign} for tap in self.taps
            ],
            "pool": self.pool,
            "layout": "NHWC-per-tap",
            "resize": "bilinear",
            "pixel_range": "[0,1] RGB",
            "precision": self.precision,
        }

    def train(self, mode: bool = True) -> Encoder:
        """Stay in evaluation mode, whatever `mode` a surrounding model is put in."""
        return super().train(False)

    def forward(self, images: Tensor, rectify: Mapping[str, Rectify] | None = None) -> list[Tensor]:
        """Feature maps of images.

        Args:
            images: [n, 3, H, W] RGB or [n, 1, H, W] grey (repeated to three channels),
                floating point in [0, 1]. Computed in the encoder's own precision; under autocast,
                in autocast's.
            rectify: names in `rectified` -> function that does the work of that tap's ReLU (see
                `Rectified`).

        Returns:
            One tensor [n, C, h, w] per tap, channels-last in memory, in the order of `taps`.

        Raises:
            ValueError: wrong rank, number of channels or dtype, or (on a CPU) values outside
                [0, 1] or not a number. On a CUDA device those are caught by a device-side
                assertion, which does not make the host wait.
        """
        _check_images(images, values=not self._range_known)
        if any(module.training for module in self._modules_kept_in_eval):
            self.train(False)
        if not images.is_cuda:
            return self._maps(images, rectify)
        with float32_products("tf32" if self._tf32 else "ieee"):
            return self._maps(images, rectify)

    def _maps(self, images: Tensor, rectify: Mapping[str, Rectify] | None = None) -> list[Tensor]:
        x = images.to(self._input_dtype())
        if tuple(x.shape[-2:]) != self.image_size:
            x = F.interpolate(
                x, self.image_size, mode="bilinear", align_corners=False, antialias=False
            )
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(x, rectify) if rectify else self.backbone(x)
        handed = [self._pooled(maps[name]) for name in self._names]
        if self.constant is not None:
            handed.append(handed[0].new_full((len(x), 1, 1, 1), self.constant))
        return handed

    def _pooled(self, fmap: Tensor) -> Tensor:
        height, width = fmap.shape[-2:]
        if self.pool is not None and max(height, width) > self.pool:
            fmap = F.adaptive_avg_pool2d(fmap, (min(height, self.pool), min(width, self.pool)))
        return fmap.contiguous(memory_format=torch.channels_last)

    def _input_dtype(self) -> torch.dtype:
        """A StagedBackbone in half precision still takes float32 images, and rounds later."""
        dtype = _dtype(self.backbone)
        half = dtype in _HALF and isinstance(self.backbone, StagedBackbone)
        return torch.float32 if half else dtype

    @torch.no_grad()
    def _probe(self, signs: Mapping[str, str]) -> tuple[Tap, ...]:
        """Run one image through, and learn the shapes."""
        device = device_of(self.backbone)
        generator = torch.Generator().manual_seed(0)
        image, other = torch.rand(2, 3, *self.image_size, generator=generator).to(device)
        first = self._probe_maps(torch.stack((image, other)))
        for name, fmap in zip(self._names, first, strict=True):
            if signs[name] == "nonnegative" and bool((fmap < 0).any()):
                raise ValueError(
                    f"tap_signs[{name!r}]: declared 'nonnegative', but the tap has negative "
                    "values; declare it 'signed', or tap the output of the ReLU"
                )
        second = self._probe_maps(torch.stack((torch.zeros_like(other), image)))
        for name, one, two in zip(self._names, first, second, strict=True):
            if not torch.allclose(one[0], two[1], rtol=0, atol=1e-5 * float(one[0].abs().max())):
                raise ValueError(
                    f"backbone: tap {name!r} of one image changes with the other images of "
                    "its batch; features must be a function of one image (use stored "
                    "statistics or group normalisation instead of batch statistics)"
                )
        return tuple(
            Tap(name, (fmap.shape[1], fmap.shape[2], fmap.shape[3]), signs[name])
            for name, fmap in zip(self._names, first, strict=True)
        )

    def _probe_maps(self, images: Tensor) -> list[Tensor]:
        height, width = self.image_size
        try:
            maps = self.backbone(images.to(self._input_dtype()))
        except RuntimeError as error:
            raise ValueError(
                f"image_size={self.image_size}: the encoder {self.name!r} cannot take images of "
                f"{height} x {width} ({str(error).splitlines()[0]}); if they are too small, try "
                "a larger image_size (--encoder-size) or only the shallower taps"
            ) from error
        if not isinstance(maps, Mapping):
            raise ValueError(
                "backbone: forward must return a dict {tap name: feature map [n, C, h, w]}, "
                f"found {type(maps).__name__}"
            )
        for name in self._names:
            if name not in maps:
                raise ValueError(f"backbone has no tap {name!r}; it has {tuple(maps)}")
            if maps[name].ndim != 4 or maps[name].shape[0] != images.shape[0]:
                raise ValueError(
                    f"backbone: tap {name!r} has shape {tuple(maps[name].shape)}, "
                    f"expected [{images.shape[0]}, C, h, w]"
                )
            if maps[name].numel() == 0:
                raise ValueError(
                    f"image_size={self.image_size}: tap {name!r} of {self.name!r} is empty; try "
                    "a larger image_size (--encoder-size) or only the shallower taps"
                )
        handed = [self._pooled(maps[name]) for name in self._names]
        stages: dict[str, nn.Module] = {}
        if isinstance(self.backbone, StagedBackbone):
            stages = dict(zip(self.backbone.names, self.backbone.stages, strict=True))
        self.rectified = tuple(
            name
            for name, fmap in zip(self._names, handed, strict=True)
            if fmap is maps[name] and isinstance(stages.get(name), Rectified)
        )
        return handed

    def extra_repr(self) -> str:
        height, width = self.image_size
        return f"{self.name!r}, image_size={height}x{width}, taps={len(self.taps)}, dim={self.dim}"


def fold_batch_norm(
    weight: Tensor, norm: Mapping[str, Tensor], *, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that does what `weight`, then batch norm, would do.

    Args:
        weight: [out, in / groups, k, k], of a convolution without bias.
        norm: the batch norm's weight, bias, running_mean and running_var, each [out].
        eps: the batch norm's.

    Computed in float64 and rounded once, to the dtype of `weight`.
    """
    scale = norm["weight"].double() / (norm["running_var"].double() + eps).sqrt()
    bias = norm["bias"].double() - norm["running_mean"].double() * scale
    folded = weight.double() * scale.view(-1, 1, 1, 1)
    return folded.to(weight.dtype), bias.to(weight.dtype)


def suggestion(name: object, known: Sequence[str]) -> str:
    """' (did you mean ...?)' where `known` has something like `name`, else ''."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _dtype(backbone: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter, or else buffer."""
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def _usable_dtype(precision: str) -> torch.dtype:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}")
    why = bfloat16_hindrance(torch.device("cpu")) if precision == "bfloat16" else None
    if why is not None and not torch.cuda.is_available():
        raise ValueError(
            f"precision='bfloat16': {why} and there is no GPU; use precision='float32', with a "
            "release that was made so"
        )
    return PRECISIONS[precision]


def _image_size(value: int | Sequence[int]) -> tuple[int, int]:
    size = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(
            f"image_size={value!r}: expected a positive int or a pair (height, width) of them, the "
            "size of the images that the encoder sees (--encoder-size on the command line); try 32."
        )
    return size[0], size[1]


def _pool(value: int | None) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"pool={value!r}: expected None or a positive int")
    return value


def _constant(value: float | None, tap_signs: Mapping[str, str]) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"constant={value!r}: expected None or a number above 0, try 8000.0")
    if _CONSTANT in tap_signs:
        raise ValueError(f"constant={value!r}: the backbone has a tap {_CONSTANT!r} of its own")
    return float(value)


def _tap_names(
    taps: Sequence[str] | None, tap_signs: Mapping[str, str], encoder: str
) -> tuple[str, ...]:
    known = tuple(tap_signs)
    if isinstance(taps, str):
        raise ValueError(f"taps={taps!r}: expected a sequence of names, try taps=[{taps!r}]")
    names = known if taps is None else tuple(taps)
    if not names:
        raise ValueError(f"taps={taps!r}: expected at least one of {', '.join(known)}")
    for name in names:
        if name not in tap_signs:
            raise ValueError(
                f"taps: {encoder!r} has no tap {name!r}{suggestion(name, known)}; "
                f"its taps are {', '.join(known)}"
            )
        if tap_signs[name] not in SIGNS:
            raise ValueError(
                f"tap_signs[{name!r}]={tap_signs[name]!r}: expected one of {', '.join(SIGNS)}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"taps={list(names)!r}: a tap is named twice")
    return names


def _refuse_batch_statistics(backbone: nn.Module) -> None:
    for name, module in backbone.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"backbone: {name or type(module).__name__} normalises by the statistics of the "
                "batch, so that one image changes the features of all; build it with "
                "track_running_stats=True"
            )


def _check_images(images: Tensor, values: bool = True) -> None:
    if not isinstance(images, Tensor):
        raise ValueError(f"images: expected a torch.Tensor, found {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images: shape is {list(images.shape)}, expected [n, 3, H, W] (RGB) or "
            "[n, 1, H, W] (grey)"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images: dtype is {images.dtype}, expected floating point in [0, 1]; "
            "divide 8-bit images by 255: images.float() / 255"
        )
    if images.numel() == 0 or images.is_meta or not values:
        return
    low, high = images.detach().aminmax()
    inside = (low >= -_RANGE_SLACK) & (high <= 1 + _RANGE_SLACK)  # False if anything is NaN
    if images.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(inside, "images: values outside [0, 1], or not a number")
    elif not bool(inside):
        raise ValueError(
            f"images: values span [{float(low):g}, {float(high):g}], expected [0, 1]; "
            "divide 8-bit images by 255, map a tanh output by (x + 1) / 2"
        )
