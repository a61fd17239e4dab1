"""An audit in one run: what an attacker who knows everything but coin tosses learns of a release.

Canaries. m made-up images with orthogonal contributions go through the real release: canary i is a
pixel whose feature vector, through a real encoder, points along one axis of one class's row. (It is
`GAIN` times longer than the bound c, so that a release that does not bound is caught.) A fair coin
B_i decides which of two neighbouring data sets is fed. The pair is one that attains the
sensitivity:

================================  =====================  =====================  ==================
adjacency                         B_i = 1                B_i = 0                distance
================================  =====================  =====================  ==================
add-remove                        +v                     no image               c
zero-out                          +v                     a black image          c
replace-one, signed, phi1 alone   +v                     -v                     2 c
replace-one, otherwise            v                      w orthogonal to v      sqrt(2) c
================================  =====================  =====================  ==================

times the root of the number of moments. Noisy counts, where the release has them, are not used:
``sensitivity_reached`` is the share of the declared sensitivity that the pair attains (0.995 with
counts; 0.816 for both moments of signed features under replace-one, whose worst pair needs vectors
that no orthogonal family holds). Each canary is fed as a group of g equal images, in or out
together. A mu-GDP release is (g mu)-GDP for groups of g (Dong, Roth, Su 2022, Thm 2.14; equality
for the Gaussian), so a lower bound on a group's mu, divided by g, is one on mu. It is g times
sharper than with g = 1, and no less valid.

Score X_i: the released sums, projected on the direction in which the pair differs.

Model A. Given the coins, the X_i are independent, with a law that depends on B_i alone.
Model B. Model A, and both laws are normal with one standard deviation.

Bound by thresholds, valid in model A. "X > t" is a test between the neighbours, so in a mu-GDP
release Phi^-1(P(X > t | 1)) - Phi^-1(P(X > t | 0)) <= g mu. Clopper-Pearson bounds for both
probabilities at `THRESHOLDS` fixed values of t, with the error shared equally among all of them
(Bonferroni), give a lower bound of the left side that no law of the noise can fool.

Bound by means, valid in model B. With n_1, n_0 canaries on either side, D the difference of their
mean scores and s^2 the pooled variance, D = sigma (g mu' + sqrt(1/n_1 + 1/n_0) Z) with Z standard
normal and mu' = shift / (g sigma) <= mu. Where D > 0, with probability at least 1 - 2 a,

    g mu'  >=  D / s_up - z_a sqrt(1/n_1 + 1/n_0),    s_up^2 = s^2 (m - 2) / chi2_{a, m - 2}.

``mu_lower`` is the larger of the two; each may fail with half of 1 - confidence. So if the release
keeps its claim and model B holds, which is what exact independent Gaussian noise in every
coordinate means, ``mu_lower > mu_claimed`` happens with probability at most 1 - confidence.

An audit can refute, never prove. VIOLATED means that the claim is false (or, with the stated
probability, bad luck; or noise that is not independent between coordinates). "consistent" means
that these canaries, through this encoder, did not show otherwise: it says nothing about other
inputs, about what else leaves the program (time, memory, messages), or about the random bits
beyond the moments seen here. The proof is in `sensitivity`, `sums`, `noise` and `mechanism`.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpmmd.data import Batch, ImageSource
from dpmmd.encoders import Encoder
from dpmmd.privacy import accounting
from dpmmd.privacy.mechanism import release
from dpmmd.privacy.release_file import Release
from dpmmd.privacy.sensitivity import check_adjacency

CONFIDENCE = 1 - 1e-6
GAIN = 3.0  # norm of a canary's features, relative to the bound c = 1
THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0)  # between the expected scores without and with the canary
_WIDTH = 64  # features a class: m canaries are m / 64 classes of 64, so time is linear in m
_BATCH = 4096
_GROUP_MU = 3.0  # copies are chosen for about this mu a group: near the best for both bounds
_RED, _GREEN = 0, 1


@dataclass(frozen=True)
class Audit:
    """What an audit measured; see the module's docstring for the models and what it can show.

    Attributes:
        epsilon_lower: lower confidence bound of epsilon at ``delta``, from ``mu_lower``.
        epsilon_claimed, delta: the claim.
        mu_lower: the larger of the next two.
        mu_lower_means: lower bound of mu from the difference of means (normal scores).
        mu_lower_thresholds: lower bound of mu from thresholds (any independent scores).
        mu_claimed: the mu of the claim.
        sensitivity_reached: share of the release's declared sensitivity that a canary attains;
            the best that ``mu_lower`` can come to is this times the true mu.
        canaries: number of canaries m, all in one release.
        copies: images a canary.
        confidence: probability with which a true claim is found consistent, at least.
        adjacency, sign, moments: what was audited.
        verdict: ``"consistent"`` or ``"VIOLATED"``.
    """

    epsilon_lower: float
    epsilon_claimed: float
    delta: float
    mu_lower: float
    mu_lower_means: float
    mu_lower_thresholds: float
    mu_claimed: float
    sensitivity_reached: float
    canaries: int
    copies: int
    confidence: float
    adjacency: str
    sign: str
    moments: tuple[int, ...]
    verdict: Literal["consistent", "VIOLATED"]

    def facts(self) -> dict[str, Any]:
        """All attributes, ready for JSON."""
        return asdict(self)


def audit(
    make_release: Callable[..., Release] | None = None,
    *,
    epsilon: float,
    delta: float,
    adjacency: str,
    canaries: int = 10_000,
    copies: int | None = None,
    sign: str = "signed",
    moments: Sequence[int] = (1,),
    confidence: float = CONFIDENCE,
    progress: bool = False,
) -> Audit:
    """Attacks one release of made-up images and bounds the privacy it really gives from below.

    Reads no private data. One core needs seconds for 10,000 canaries, minutes for 10^6.

    Args:
        make_release: what to audit, called like `dpmmd.release`; None for `dpmmd.release` itself.
        epsilon, delta: the claim.
        adjacency: ``"replace-one"``, ``"zero-out"`` or ``"add-remove"``.
        canaries: m >= 100. The bound comes within about 8 % of the truth at 10^4, 1 % at 10^6
            (at the default confidence).
        copies: images a canary, all in or out together. None: about 3 / mu, a telling number.
        sign: ``"signed"`` or ``"nonnegative"``: what the canaries' encoder declares of its tap.
        moments: as in `dpmmd.release`.
        confidence: in [0.5, 1).
        progress: show a progress bar on standard error (none under add-remove adjacency).

    Returns:
        The `Audit`. A verdict of ``"VIOLATED"`` is a result, it does not raise.

    Raises:
        ValueError: an argument out of range.
    """
    check_adjacency(adjacency)
    claim = accounting.calibrate(epsilon=epsilon, delta=delta)
    moments = tuple(moments)
    if copies is None:
        copies = max(1, round(_GROUP_MU / claim.mu))
    _check(canaries, copies, sign, confidence)
    attack = _Attack(adjacency, canaries, copies, sign, moments, confidence)
    coins = np.random.default_rng().integers(0, 2, canaries).astype(bool)  # seeded by the system
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="delta=.* is above 1 / N")  # of made-up images
        released = (make_release or release)(
            _source(coins, copies, adjacency),
            attack.encoder(),
            epsilon=epsilon,
            delta=delta,
            adjacency=adjacency,
            num_classes=attack.classes,
            moments=moments,
            batch_size=_BATCH,
            progress=progress,
        )
    means, free = attack.lower_bounds(released, coins)
    mu = max(means, free)
    m = released.metadata
    return Audit(
        # A lower bound, while `accounting.epsilon` rounds up.
        epsilon_lower=accounting.epsilon(mu=mu, delta=delta) * (1 - 1e-8) if mu >= 1e-8 else 0.0,
        epsilon_claimed=float(epsilon),
        delta=float(delta),
        mu_lower=mu,
        mu_lower_means=means,
        mu_lower_thresholds=free,
        mu_claimed=claim.mu,
        sensitivity_reached=attack.distance * m.clip * 2.0**m.grid_bits / m.sensitivity,
        canaries=canaries,
        copies=copies,
        confidence=float(confidence),
        adjacency=adjacency,
        sign=sign,
        moments=moments,
        verdict="VIOLATED" if mu > claim.mu else "consistent",
    )


def _check(canaries: int, copies: int, sign: str, confidence: float) -> None:
    if isinstance(canaries, bool) or not isinstance(canaries, int) or canaries < 100:
        raise ValueError(f"canaries={canaries!r}: expected an int >= 100, e.g. 10000.")
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
        raise ValueError(f"copies={copies!r}: expected None or an int >= 1.")
    if sign not in ("signed", "nonnegative"):
        raise ValueError(f"sign={sign!r}: expected 'signed' or 'nonnegative'.")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence={confidence!r}: expected a number in [0.5, 1), e.g. 0.99.")


@dataclass(frozen=True)
class _Attack:
    """The pair of neighbours by which a release is attacked; see the table above."""

    adjacency: str
    canaries: int
    copies: int
    sign: str
    moments: tuple[int, ...]
    confidence: float

    @property
    def replaced(self) -> bool:
        """Whether both are images that contribute."""
        return self.adjacency == "replace-one"

    @property
    def antipodal(self) -> bool:
        """Whether the pair is +v and -v."""
        return self.replaced and self.sign == "signed" and self.moments == (1,)

    @property
    def pairs(self) -> bool:
        """Whether it is two orthogonal vectors."""
        return self.replaced and not self.antipodal

    @property
    def classes(self) -> int:
        return -(-self.canaries // _WIDTH)

    @property
    def distance(self) -> float:
        """Of the pair, in units of the bound c."""
        apart = 2.0 if self.antipodal else math.sqrt(2) if self.pairs else 1.0
        return math.sqrt(len(self.moments)) * apart

    def encoder(self) -> Encoder:
        backbone = _Channels(antipodal=self.antipodal, pairs=self.pairs)
        return Encoder(
            backbone,
            name="canaries",
            weights_sha256=backbone.sha256,
            image_size=(1, _WIDTH),
            tap_signs={"canary": self.sign},
        )

    def lower_bounds(self, released: Release, coins: NDArray[np.bool_]) -> tuple[float, float]:
        """Of mu: by the difference of means, and by thresholds."""
        directions = released.sums.double().sum(dim=0) / math.sqrt(len(self.moments))  # [K, D]
        if self.pairs:
            # A tap's features are flattened as NHWC: the two channels of a pixel are neighbours.
            red, green = directions.view(self.classes, _WIDTH, 2).unbind(dim=2)
            directions = (red - green) / math.sqrt(2)
        scores = directions.flatten()[: self.canaries].numpy()
        low, high = (-0.5, 0.5) if self.replaced else (0.0, 1.0)
        one = self.copies * self.distance
        thresholds = [one * (low + t * (high - low)) for t in THRESHOLDS]
        alpha = (1 - self.confidence) / 2
        ours, theirs = scores[coins], scores[~coins]
        means = lower_bound_by_means(ours, theirs, alpha)
        free = lower_bound_by_thresholds(ours, theirs, thresholds, alpha)
        return means / self.copies, free / self.copies


def lower_bound_by_means(
    with_canary: NDArray[np.float64], without: NDArray[np.float64], alpha: float
) -> float:
    """Lower confidence bound, at level 1 - alpha, of shift / sd of two normal samples.

    Between 0 and 10^4 (reported also where there is no noise at all).
    """
    from scipy.special import gammaincinv, ndtri

    n1, n0 = len(with_canary), len(without)
    if min(n1, n0) < 2:
        return 0.0
    difference = float(with_canary.mean() - without.mean())
    if difference <= 0:
        return 0.0
    squares = n1 * float(with_canary.var()) + n0 * float(without.var())
    smallest = 2 * float(gammaincinv((n1 + n0 - 2) / 2, alpha / 2))  # quantile of chi square
    sd = math.sqrt(squares / smallest)
    if difference >= 1e5 * sd:
        return 1e4
    error = -float(ndtri(alpha / 2)) * math.sqrt(1 / n1 + 1 / n0)
    return min(1e4, max(0.0, difference / sd - error))


def lower_bound_by_thresholds(
    with_canary: NDArray[np.float64],
    without: NDArray[np.float64],
    thresholds: Sequence[float],
    alpha: float,
) -> float:
    """Lower confidence bound, at level 1 - alpha, of the mu of a release with these scores.

    The thresholds must not be chosen by the scores.
    """
    from scipy.special import betaincinv, ndtri

    n1, n0 = len(with_canary), len(without)
    if min(n1, n0) < 1:
        return 0.0
    share = alpha / (2 * len(thresholds))
    best = 0.0
    for t in thresholds:
        hits, alarms = int((with_canary > t).sum()), int((without > t).sum())
        least_hits = float(betaincinv(hits, n1 - hits + 1, share)) if hits else 0.0
        quiet = n0 - alarms
        least_quiet = float(betaincinv(quiet, alarms + 1, share)) if quiet else 0.0
        if least_hits > 0 and least_quiet > 0:
            best = max(best, float(ndtri(least_hits) + ndtri(least_quiet)))
    return best


class _Channels(nn.Module):
    """The canaries' backbone: a 1 x 1 convolution from colours to features, [n, 1 or 2, 1, W]."""

    def __init__(self, *, antipodal: bool, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs
        weight = torch.zeros(2 if pairs else 1, 3)
        weight[0, _RED] = GAIN
        if pairs:
            weight[1, _GREEN] = GAIN
        elif antipodal:
            weight[0, _GREEN] = -GAIN
        self.weight = nn.Parameter(weight)
        self.sha256 = hashlib.sha256(weight.numpy().tobytes()).hexdigest()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"canary": torch.einsum("nchw,fc->nfhw", images, self.weight)}


def _source(coins: NDArray[np.bool_], copies: int, adjacency: str) -> ImageSource:
    """The canaries as images [3, 1, W], made batch by batch; canary i is of class i // W."""
    members = np.flatnonzero(coins) if adjacency == "add-remove" else np.arange(len(coins))
    other = {"replace-one": _GREEN}.get(adjacency)  # None: a black image

    class Canaries(ImageSource):
        name, identity = "canaries", "0" * 64
        num_images = len(members) * copies
        image_shape = (3, 1, _WIDTH)

        def batches(self, batch_size: int) -> Iterator[Batch]:
            for start in range(0, self.num_images, batch_size):
                rows = np.arange(start, min(start + batch_size, self.num_images))
                index = members[rows // copies]
                red = coins[index]
                images = torch.zeros(batch_size, *self.image_shape)
                images[np.flatnonzero(red), _RED, 0, index[red] % _WIDTH] = 1.0
                if other is not None:
                    images[np.flatnonzero(~red), other, 0, index[~red] % _WIDTH] = 1.0
                labels = torch.zeros(batch_size, dtype=torch.int64)
                labels[: len(rows)] = torch.from_numpy(index // _WIDTH)
                yield Batch(images, labels, torch.arange(batch_size) < len(rows))

    return Canaries()
