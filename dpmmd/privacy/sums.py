"""Bounded integer class sums of private features: the only state that ever holds raw statistics.

Per image, a feature vector v (all taps together, float64) becomes an integer vector q with

    |q|_2 <= B   (B = 2^30 times the block's weight, divided by the size of the image's group and
                  rounded down), checked in exact integer arithmetic,

and the class sums of q are exact int64. A group of g images adds g vectors of norm at most
floor(B / g), together at most B, whatever rows they go to. No step rounds a sum, so the result is
the same bits for any order, batch size, thread count or device, given the same features.

1. e is the exponent of max |v|, g = v 2^-e is in (-1, 1): multiplication by a power of two.
2. s = sum over j of ceil(g_j^2 2^b), int64, with b = 62 - ceil(log2 D), so that s <= 2^62. The norm
   sqrt(s 2^-b) of g is an overestimate by at most a relative D 2^-b: rounding up is the safe side.
3. q = trunc(g r), r = B (1 - 2^-20) / |g| for a sphere. Truncation toward zero never lengthens
   a vector; the guard 1 - 2^-20 covers the rounding of r and of the product (below 2^-50).
4. Certificate: sum q^2 <= B^2 in int64, and no q_j < 0 where the block is declared non-negative.
   What fails it contributes zero, as do vectors that are zero, not finite, or not valid to begin
   with. No message is made, no shape changes.

Steps 1 to 3 are for usefulness; the sensitivity rests on step 4 alone, whatever the encoder did.

A block of products sums q q' instead, of integer vectors with |q|^2 <= B: its norm is |q|^2, and
the inner product of two is <q, q'>^2 >= 0 (`sensitivity`). q is what steps 1 to 4 make, to a limit
of floor(sqrt(B)) - ceil(sqrt(d) / 2), in units 2^15 times as coarse, rounded to the nearest: this
lengthens it by sqrt(d) / 2 at most. It is certified again. The products are at most 2^30, and up to
2^20 of them are summed as float64 by one matrix product, below 2^53: exactly, in any order.

On the CPU the same steps run in csrc/cpu/bounded_sums.cpp, on a CUDA device in csrc/cuda/ or
kernels/bounded_sums.py; tests compare them with the code below, their definition, bit for bit, and
`benches.gpu` does so on a GPU. ``DPMMD_BACKEND=torch`` runs the definition itself.

The definition has the same bits on every device because it rounds in products, quotients and roots
of float64 alone, which IEEE 754 fixes, each an operation of its own (nothing that a compiler could
contract to a fused multiply-add). Maxima, frexp, ceil, trunc and sums of int64 are exact, in any
order: index_add_ on CUDA adds by atomics, of integers. The one trap: PyTorch divides a CUDA tensor
by a Python number as a product with its reciprocal, so divisors are tensors. The estimate in
`certify` is a float sum, whose order matters only far above every limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from dpmmd import backends
from dpmmd._contract.protocol import Core
from dpmmd.bounds import Bound

if TYPE_CHECKING:
    from dpmmd.privacy.ranks import Ranks

GRID_BITS = 30
GUARD = 1.0 - 2.0**-20
_HALF = GRID_BITS // 2
_EXACTLY = 1 << 20  # products of images summed as float64
_CHUNK_ELEMENTS = 1 << 19  # rows are taken so many numbers at a time: temporaries stay in cache


def bounded_integers(
    vectors: Sequence[Tensor], limits: Tensor, *, bound: Bound, nonnegative: bool
) -> tuple[list[Tensor], Tensor]:
    """Integer vectors of norm at most ``limits``, one an image.

    Args:
        vectors: one float64 [n, d_l] per tap.
        limits: int64 [n], B of each image: the greatest norm in grid units; 0 to 2^30.
        bound: its kind, and its radius c, the norm that maps to B (only balls depend on it).
        nonnegative: whether negative entries fail the certificate.

    Returns:
        int64 [n, d_l] per tap, and bool [n]: False where the vector was zero, not finite or failed
        the certificate. Those rows are zero.
    """
    if bound.per_tap:
        share = 1.0 / math.sqrt(len(vectors))
        groups = [[v] for v in vectors]
    else:
        share = 1.0
        groups = [list(vectors)]
    integers: list[Tensor] = []
    for group in groups:
        limit = limits.double() * share
        integers += _quantise(group, limit, bound.ball, bound.clip * share)
    return certify(integers, limits, nonnegative=nonnegative)


def factors(vectors: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Integer vectors int64 [n, d] whose products q q' have norm at most ``limits``; bool [n].

    Args:
        vectors: [n, d].
        limits: as in `bounded_integers`.
    """
    roots = limits.double().sqrt().to(torch.int64)  # floor: the root is exact or apart by 2^-15
    slack = math.ceil(math.sqrt(vectors.shape[1]) / 2)
    fine, _ = bounded_integers(
        [vectors.double()],
        (roots - slack).clamp(min=0) << _HALF,
        bound=Bound(),
        nonnegative=False,
    )
    integers, within = certify([(fine[0] + (1 << _HALF >> 1)) >> _HALF], roots, nonnegative=False)
    return integers[0], within


def certify(
    integers: list[Tensor], limits: Tensor, *, nonnegative: bool
) -> tuple[list[Tensor], Tensor]:
    """Zeroes every row whose squared norm, summed exactly over the taps, is 0 or over limits^2."""
    n = integers[0].shape[0]
    square = torch.zeros(n, dtype=torch.int64, device=integers[0].device)
    within = torch.ones_like(square, dtype=torch.bool)
    for q in integers:
        # A double-precision estimate below 2^61 (relative error below 2^-25) bounds every entry by
        # 2^31 and excludes an int64 overflow, so the integer comparison after it is exact.
        within &= (q.double() ** 2).sum(dim=1) < 2.0**61
        square += torch.where(within[:, None], q * q, 0).sum(dim=1)
        within &= square <= limits * limits
        if nonnegative and q.shape[1]:
            within &= q.amin(dim=1) >= 0
    within &= square > 0
    return [q.mul_(within[:, None]) for q in integers], within


def _quantise(group: list[Tensor], limits: Tensor, ball: bool, clip: float) -> list[Tensor]:
    n = group[0].shape[0]
    dim = sum(v.shape[1] for v in group)
    largest = torch.zeros(n, dtype=torch.float64, device=group[0].device)
    for v in group:
        if v.shape[1]:
            largest = torch.maximum(largest, v.abs().amax(dim=1))  # NaN propagates
    usable = (largest >= 2.0**-1000) & (largest <= 2.0**1000)  # false for NaN
    exponent = torch.frexp(torch.where(usable, largest, 1.0)).exponent.to(torch.int64)
    inverse = _power_of_two(-exponent)[:, None]
    bits = 62 - max(0, math.ceil(math.log2(max(dim, 1))))

    unit = [torch.where(usable[:, None], v, 0.0) * inverse for v in group]  # g, in (-1, 1)
    square = torch.zeros(n, dtype=torch.int64, device=group[0].device)
    for g in unit:
        square += (g * g).mul_(2.0**bits).ceil_().to(torch.int64).sum(dim=1)
    norm = (square.double() * 2.0**-bits).sqrt_()
    rate = limits * GUARD / norm
    if ball:
        # A tensor, for CUDA divides by a Python number as if it multiplied by its reciprocal.
        divisor = limits.new_full((), clip)
        rate = torch.minimum(rate, limits * GUARD * _power_of_two(exponent) / divisor)
    rate = torch.where(usable, rate, 0.0)[:, None]
    return [g.mul_(rate).trunc_().to(torch.int64) for g in unit]


def _power_of_two(exponent: Tensor) -> Tensor:
    """Exactly 2^exponent as float64, by its bits (exponent int64 within +-1022)."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _core_of(like: Tensor) -> Core | None:
    """The core that adds bounded sums of features such as these; None for the definition below."""
    dtype = torch.float32 if like.device.type == "cpu" else like.dtype
    core = backends.core("auto", like.device.type, dtype)
    return core if like.dtype in core.summed else None


class PrivateSums:
    """Exact int64 class sums of one block: write-only until noise is added.

    Has no representation, cannot be pickled, copied, compared, iterated or converted. Its content
    leaves through `take`, which `mechanism.release` calls once to add the noise in place (and
    `pipeline`, which the data holder runs, to compare two data sets), and through `write`, into the
    folder for partial sums that the data holder named.

    Args:
        num_classes: K rows.
        dim: columns of the class rows.
        shared: columns of the one row that all classes share.
        device: where they are summed.
    """

    __slots__ = ("_shared", "_sums")

    def __init__(
        self, num_classes: int, dim: int, shared: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self._sums: Tensor | None = torch.zeros(
            num_classes, dim, dtype=torch.int64, device=device
        )  # [K, D]
        self._shared = torch.zeros(1, shared, dtype=torch.int64, device=device)  # [1, D']

    def add(
        self,
        features: Sequence[Tensor],
        labels: Tensor,
        valid: Tensor,
        limits: Tensor,
        *,
        bound: Bound,
        nonnegative: bool,
        shared_taps: int = 0,
    ) -> None:
        """Adds the bounded integer vectors of one batch to the rows of its labels.

        Args:
            features: one [n, d_l] per tap.
            labels: int64 [n] in 0..K-1.
            valid: bool [n]; rows that are False contribute zero.
            limits: int64 [n], greatest norm of each image's vector, in grid units.
            bound: of each image's vector; that of moments (1, 2) is the joint one, (f, w f^2).
            nonnegative: whether images with negative entries contribute zero.
            shared_taps: the first so many taps go to the shared row.
        """
        if self._sums is None:
            raise RuntimeError("PrivateSums: the sums have been taken.")
        if (core := _core_of(features[0])) is not None:
            core.bounded_sums(
                features,
                labels,
                valid,
                limits,
                bound=bound,
                nonnegative=nonnegative,
                sums=self._sums,
                shared=self._shared if shared_taps else None,
                shared_taps=shared_taps,
            )
            return
        width = sum(f.shape[1] for f in features) * len(bound.moments)
        rows = max(1, _CHUNK_ELEMENTS // max(width, 1))
        for start in range(0, labels.shape[0], rows):
            part = slice(start, start + rows)
            vectors: list[Tensor] = []
            for moment in bound.moments:
                for f in features:
                    v = f[part].double()
                    if moment == 2:
                        v = v * v
                        if len(bound.moments) == 2:
                            v.mul_(bound.weight)
                    vectors.append(v)
            integers, within = bounded_integers(
                vectors, limits[part], bound=bound, nonnegative=nonnegative
            )
            within &= valid[part]
            columns = {False: 0, True: 0}
            for position, q in enumerate(integers):
                shared = position % len(features) < shared_taps
                rows_of, target = labels[part], self._sums
                if shared:
                    rows_of, target = torch.zeros_like(rows_of), self._shared
                view = target[:, columns[shared] : columns[shared] + q.shape[1]]
                view.index_add_(0, rows_of, q.mul_(within[:, None]))
                columns[shared] += q.shape[1]

    def add_products(self, vectors: Tensor, labels: Tensor, valid: Tensor, limits: Tensor) -> None:
        """Adds the products q q' of one batch to the sums [K d, d], those of a class on its own.

        Args:
            vectors: [n, d].
            labels, valid, limits: as in `add`.
        """
        if self._sums is None:
            raise RuntimeError("PrivateSums: the sums have been taken.")
        q, within = factors(vectors, limits)
        q = q.mul_((within & valid)[:, None]).double()
        for k, sums in enumerate(self._sums.view(-1, q.shape[1], q.shape[1])):
            for part in q[labels == k].split(_EXACTLY):
                sums += (part.T @ part).to(torch.int64)

    def add_counts(self, labels: Tensor, valid: Tensor, taus: Tensor) -> None:
        """Adds each valid image's tau (int64 [n]) to the entry of its class.

        Not only of the images whose vectors passed the certificate: whether one did must not move
        the counts, or they would no longer be still while the label is (see `sensitivity`).
        """
        if self._sums is None:
            raise RuntimeError("PrivateSums: the sums have been taken.")
        self._sums[:, 0].index_add_(0, labels, valid.to(torch.int64) * taus)

    def reduce(self, ranks: Ranks) -> None:
        """Adds up the sums of all ranks in rank 0, exactly; the others have none left."""
        if self._sums is None:
            raise RuntimeError("PrivateSums: the sums have been taken.")
        self._sums, self._shared = ranks.reduce(self._sums), ranks.reduce(self._shared)
        if ranks.rank:
            self._sums = None

    def take(self) -> tuple[Tensor, Tensor]:
        """The int64 sums [K, D] and [1, D'] on the CPU, once; nothing is left here afterwards."""
        if self._sums is None:
            raise RuntimeError("PrivateSums: the sums have been taken.")
        sums, self._sums = self._sums.cpu(), None
        shared, self._shared = self._shared.cpu(), torch.zeros(1, 0, dtype=torch.int64)
        return sums, shared

    def write(self, file: BinaryIO) -> None:
        """Writes the raw sums: only to a file that `partial.PartialSums` has protected."""
        if self._sums is None:
            raise RuntimeError("PrivateSums: the sums have been taken.")
        for sums in (self._sums, self._shared):
            file.write(sums.cpu().contiguous().numpy().data)

    def read(self, file: BinaryIO) -> None:
        """Takes up what `write` wrote; the file must hold it whole."""
        if self._sums is None:
            raise RuntimeError("PrivateSums: the sums have been taken.")
        for sums in (self._sums, self._shared):
            data = file.read(8 * sums.numel())
            if data:
                sums.copy_(torch.frombuffer(bytearray(data), dtype=torch.int64).view_as(sums))

    def __repr__(self) -> str:
        return "<PrivateSums>"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("PrivateSums holds raw private statistics: it cannot be copied or stored.")

    __reduce__ = __reduce_ex__ = __getstate__ = __copy__ = __deepcopy__ = _refuse
    __iter__ = __len__ = __getitem__ = __eq__ = __array__ = __format__ = __dir__ = _refuse
    __hash__ = None  # type: ignore[assignment]
