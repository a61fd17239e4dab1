"""Modules over `dpmmd.functional`: the loss that trains a generator on a release."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpmmd import _capture, backends, injection
from dpmmd._contract.protocol import Step
from dpmmd._fastest import size_of
from dpmmd._graphed import Graphs
from dpmmd._ops import matching
from dpmmd._ops.arguments import check_labels
from dpmmd.bounds import Bound
from dpmmd.devices import device_of
from dpmmd.distributed import reduce_means, require_alike
from dpmmd.encoders import Encoder
from dpmmd.functional import adam_loss, ema_loss, mean_embedding, mmd_loss
from dpmmd.microbatch import Chunk, micro_batched
from dpmmd.privacy import PrivacyError, Release
from dpmmd.privacy.printed import plain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ESTIMATORS = ("batch", "unbiased", "ema", "adam")


class MMDLoss(nn.Module):
    """Squared MMD between a release and a batch of generated images.

    ``loss = MMDLoss(release, encoder); loss(images, labels).backward()`` in any training loop. It
    reads the release only: any number of steps costs no privacy.

    The gradient follows an estimate of d = target - mean embedding of the generator:

    - ``"batch"``: of this batch, the gradient of the plain squared MMD (V-statistic);
    - ``"unbiased"``: likewise without the pairs of an image with itself (U-statistic, Gretton et
      al. 2012, Eq. 3), which would reward generating the same image again and again in small
      classes; for ``bound="sphere"``, where an image's own term is constant;
    - ``"ema"``: an exponential moving average over the steps (bias-corrected), for a generator
      that changes slowly against ``1 / (1 - decay)`` steps;
    - ``"adam"``: the paper's (Harder et al. 2023, section 3.2, after Santos et al. 2019): a vector
      v is trained by Adam (rate ``lr``) on mean((v - d)^2), the loss is <v, d>.

    The value is the squared MMD for the first two. With ``"ema"`` and ``"adam"`` it is <v, d>,
    whose gradient is that of the squared MMD up to a factor; their state moves on each call in
    training mode and stays in eval mode.

    Of a hybrid release (``shared_taps``) the shared taps are matched by the mean over the whole
    batch, the others class by class.

    Of a release with modes every row of `Release.rows`, a group of modes of a class, is matched
    by itself. Labels are then rows, 0..A-1, and not classes: ``release.rows.classes[labels]`` are
    the classes. A, and not K, is the number of labels that a generator is to be built for. Where so
    many batches have no label but classes that no draw of rows explains it, they are refused. Rows
    that are not in a batch are left out of its loss, and their estimates stay. Of a row
    with one image in the batch, which has no pairs, ``"unbiased"`` takes what ``"batch"`` does.

    Args:
        release: what to match.
        encoder: the encoder the release was made with; any difference in name, weights, taps,
            image size or pooling is refused.
        estimator: see above.
        decay: of the ``"ema"`` estimate, in [0, 1).
        lr: rate of the ``"adam"`` estimate; the paper's settings use 1e-4 to 1e-3.
        micro_batch: None, or how many images, at most, go through the encoder at a time: the same
            loss and gradient in less memory, at the price of computing features twice (the last
            chunk's once). If memory runs out in a chunk it is halved, once, with a warning.
        state: "device", or "host": keep target and estimate in the memory of the host, and compute
            the loss of the means there. For encoders on a GPU; on a CPU both are the same.
        backend: see `dpmmd.backends`.
        inject: let the encoder's ReLUs add this loss's gradient to the one that they pass on
            anyway, instead of writing one for every feature (`dpmmd.injection`); runs on "torch",
            the native core or "triton". The same result up to rounding. None: where a CUDA graph
            is captured and Triton's kernels run, the one case in which it was measured faster.
        graph: on a GPU, replay encoder and loss, forward and backward, as one CUDA graph, in which
            no kernel waits for the host; for any training loop and any generator, also one in
            DistributedDataParallel. The result is the same up to rounding. A graph is captured at
            the first call with images of a shape and dtype, in training mode and with a gradient,
            which takes as long as several steps; all other calls are launched, and so are those
            beyond the fourth graph, with a warning. The encoder must leave nothing to the host:
            a rehearsal looks for that. What lies elsewhere in memory than before, or is trained, is
            noticed at the next call; hooks and other changes of the encoder's code are not.
        process_group: match the images of all its processes together, as one batch, e.g.
            ``torch.distributed.group.WORLD`` under torchrun; see `dpmmd.distributed` for the scale
            of the gradient. All of them make the module, and compare what they were given. None:
            this process's alone.

    Raises:
        PrivacyError: the release was made with another encoder.
        ValueError: unknown estimator or one that does not fit the release's bound, decay or lr
            out of range, micro_batch not an int >= 1, unknown state, inject or graph not a bool, a
            backend that has no injection, a graph on a CPU or with a process group, micro-batches
            or state on the host, or processes with different releases, encoders, estimators or
            versions.
        RuntimeError: a process group without torch.distributed being initialised.
    """

    def __init__(
        self,
        release: Release,
        encoder: Encoder,
        *,
        estimator: str = "adam",
        decay: float = 0.9,
        lr: float = 1e-3,
        micro_batch: int | None = None,
        state: str = "device",
        backend: str = "auto",
        inject: bool | None = None,
        graph: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if process_group is not None:  # first: what one process refuses must not leave others wait
            require_alike(
                process_group,
                release=release.metadata.array_sha256,
                encoder=encoder.spec(),
                loss={"estimator": estimator, "decay": decay, "lr": lr},
            )
        if estimator not in ESTIMATORS:
            raise ValueError(
                f"estimator={estimator!r}: expected one of {', '.join(map(repr, ESTIMATORS))}."
            )
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay!r}: expected a number in [0, 1).")
        if not 0.0 < lr < 1.0:
            raise ValueError(f"lr={lr!r}: expected a number in (0, 1).")
        if micro_batch is not None and (type(micro_batch) is not int or micro_batch < 1):
            raise ValueError(f"micro_batch={micro_batch!r}: expected None or an int >= 1.")
        if state not in ("device", "host"):
            raise ValueError(f"state={state!r}: expected 'device' or 'host'.")
        if type(graph) is not bool:
            raise ValueError(f"graph={graph!r}: expected True or False.")
        if inject is not None and type(inject) is not bool:
            raise ValueError(f"inject={inject!r}: expected True, False or None.")
        check_encoder(release, encoder)
        self.bound = Bound.of(release.metadata)
        if estimator == "unbiased" and self.bound.ball:
            raise ValueError(
                f"estimator='unbiased' with a release of bound={self.bound.kind!r}: it "
                "holds for spheres; use 'batch'."
            )
        if estimator == "unbiased" and release.shared is not None:
            raise ValueError(
                "estimator='unbiased' with a release of shared_taps: an image's own term is not "
                "constant there; use 'batch'."
            )
        if inject:
            injection.check(backend)
        if graph:
            _check_graph(device_of(encoder), micro_batch, state, process_group)
        self.encoder, self.process_group, self.inject = encoder, process_group, inject
        self.estimator, self.decay, self.lr, self.backend = estimator, decay, lr, backend
        self.num_classes, self.num_rows = release.num_classes, release.num_rows
        self.with_modes = release.modes is not None
        self.labelled = release.metadata.labelled or self.with_modes
        self._rows_known = False  # set where labels are made from the release's rows
        # Batches whose labels are looked at: a process of several may never have some of the rows.
        alone = not (dist.is_available() and dist.is_initialized())
        self._unseen = _until_sure(release) if alone else 0
        self._watched = self._unseen
        self._largest: Tensor | None = None
        self._chunk = None if micro_batch is None else Chunk(micro_batch)
        self._graphs = Graphs() if graph else None
        device = torch.device("cpu") if state == "host" else device_of(encoder)
        target, shared = release.target, release.shared_target
        numbers = target.numel() + (0 if shared is None else shared.numel())

        options: dict[str, Any] = {"decay": decay, "lr": lr, "numbers": numbers, "backend": backend}
        self.by_class = _Estimator(target.to(device), estimator, **options)
        self.shared = None
        if shared is not None:
            self.shared = _Estimator(shared.to(device), estimator, **options)

    @property
    def micro_batch(self) -> int | None:
        """How many images go through the encoder at a time; None: all."""
        return None if self._chunk is None else self._chunk.size

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of one batch of generated images.

        Args:
            images: [n, 3, H, W] or [n, 1, H, W] in [0, 1], differentiable.
            labels: int64 [n] in 0..K-1 for a labelled release, None for an unlabelled one; in
                0..A-1, rows, for a release with modes.

        Returns:
            Scalar, differentiable in ``images``.

        Raises:
            ValueError: labels given to an unlabelled release, missing for a labelled one or out
                of range, fewer images than a micro-batch, or images the encoder refuses.
        """
        if (labels is not None) != self.labelled:
            raise ValueError(
                f"labels={'given' if labels is not None else None}: the release is "
                f"{'labelled' if self.labelled else 'unlabelled'}; "
                f"{'pass' if self.labelled else 'leave out'} the labels of the images."
            )
        if self.with_modes and labels is not None:
            self._check_rows(labels)
        if self._graphs is None:
            return self._launched(images, labels)
        return self._graphs(self, self._launched, images, labels, self._options())

    def _check_rows(self, labels: Tensor) -> None:
        """Refuses labels that are no rows, and labels that never are but classes.

        On a GPU the host waits for it once, and labels out of range are left to the device.
        """
        if self._rows_known or torch.compiler.is_compiling() or not labels.numel():
            return
        watched = self.training and self._unseen > 0
        if labels.is_cuda and (not watched or torch.cuda.is_current_stream_capturing()):
            return
        low, high = labels.min(), labels.max()
        rows = (
            f"rows of the release, 0..{self.num_rows - 1}: release.rows.classes has their classes"
        )
        if labels.is_cpu and not 0 <= int(low) <= int(high) < self.num_rows:
            raise ValueError(f"labels: values from {int(low)} to {int(high)}, expected {rows}.")
        if not watched:
            return
        self._largest = high if self._largest is None else torch.maximum(self._largest, high)
        self._unseen -= 1
        if self._unseen == 0 and int(self._largest) < self.num_classes < self.num_rows:
            raise ValueError(
                f"labels: none above {int(self._largest)} in {self._watched} batches, so that they "
                f"seem to be the {self.num_classes} classes; expected {rows}. Build the generator "
                f"with num_classes={self.num_rows}, and give both of them rows."
            )

    def _launched(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of one batch, one kernel at a time."""
        if self._chunk is None:
            if self._needs_means(images):
                return self._value(*self._embed(images, labels, self.num_rows))
            return self._matched(images, labels)
        n = images.shape[0]
        if n < self._chunk.size:
            raise ValueError(
                f"micro_batch={self._chunk.size}: more than the batch's {n} images; expected at "
                "most that many, or None for no micro-batches."
            )
        if labels is not None:
            check_labels(labels, images, self.num_rows)
        return micro_batched(
            images,
            labels,
            self.num_rows,
            embed=self._embed,
            value=self._value,
            chunk=self._chunk,
        )

    def _options(self) -> tuple[Any, ...]:
        """What the loss depends on, beside tensors and arguments: it may be set at any time."""
        parts = [self.by_class] if self.shared is None else [self.by_class, self.shared]
        estimators = [(p.estimator, p.decay, p.lr, p.numbers, p.backend, p.training) for p in parts]
        own = self.bound, self.num_rows, self.estimator, self.backend, self.inject
        return *own, tuple(estimators)

    def _injects(self, images: Tensor) -> bool:
        if self.inject is None:
            return injection.wanted(self.encoder, images, self.backend)
        return self.inject

    def _needs_means(self, images: Tensor) -> bool:
        """Whether the loss is not one step of one estimator on the device of the images."""
        return (
            self.process_group is not None
            or self.shared is not None
            or self.estimator == "unbiased"
            or not self.by_class.fits(images.device)
        )

    def _matched(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of one batch where nothing asks for its means."""
        estimator, k, bound = self.by_class, self.num_rows, self.bound
        target, step = estimator.target, estimator.step()
        if self._injects(images):
            return injection.loss(
                self.encoder, images, labels, k, bound, target, step, self.backend
            )
        features = self.encoder(images)
        first = features[0]
        size = size_of(features)
        core = backends.core(self.backend, first.device.type, first.dtype, size=size)
        return matching.loss(core, features, labels, k, bound, target, step)

    def _embed(
        self, images: Tensor, labels: Tensor | None, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Mean embedding [M, K, D] and class counts [K] of images."""
        options: dict[str, Any] = {
            "moments": self.bound.moments,
            "bound": self.bound.kind,
            "clip": self.bound.clip,
            "joint_weight": self.bound.joint_weight,
            "backend": self.backend,
        }
        if self._injects(images):
            return injection.mean_embedding(self.encoder, images, labels, num_classes, **options)
        return mean_embedding(self.encoder(images), labels, num_classes, **options)

    def _value(self, means: Tensor, counts: Tensor) -> Tensor:
        """The loss of a batch's mean embedding [M, K, D] and class counts [K]."""
        if self.process_group is not None:
            means, counts = reduce_means(means, counts, self.process_group)
        where = self.by_class.target.device
        return self._loss(means.to(where), counts.to(where)).to(means.device)

    def _loss(self, means: Tensor, counts: Tensor) -> Tensor:
        if self.estimator == "unbiased":
            return self.by_class(means, counts) + self._missing_pairs(means, counts)
        if self.shared is None:
            return self.by_class(means, counts)
        size = self.shared.target.shape[2]
        whole = counts.sum().clamp(min=1)
        mean = torch.einsum("k,mkd->md", counts / whole, means[:, :, :size])[:, None]
        return self.by_class(means[:, :, size:], counts) + self.shared(mean, counts.sum()[None])

    def _missing_pairs(self, means: Tensor, counts: Tensor) -> Tensor:
        """What makes |target - m|^2 the U-statistic.

        That has the mean of <phi_i, phi_j> over i != j in the place of |m|^2. With |phi_i|^2 = c^2
        and n images in a class it is (n |m|^2 - c^2) / (n - 1). A class with one image has no
        pairs: its plain |m|^2 is taken.
        """
        own = self.bound.clip**2 / (2 if self.bound.joint else 1)  # a joint bound has halves
        missing = (means.square().sum(dim=2) - own) / (counts.clamp(min=2) - 1)  # [M, K]
        return torch.where(counts > 1, missing, 0).sum()

    def extra_repr(self) -> str:
        rows = f"rows={self.num_rows}, " if self.with_modes else ""
        return (
            f"estimator={self.estimator!r}, moments={self.bound.moments}, "
            f"classes={self.num_classes}, {rows}bound={self.bound.kind!r}"
        )


class _Estimator(nn.Module):
    """The estimate of ``target - means`` that the gradient follows, for one block of rows.

    Args:
        target: [M, R, D], a row a class, or one row.
        estimator, decay, lr, backend: as in `MMDLoss`.
        numbers: size of all blocks together, over which the "adam" estimate's loss is a mean.
    """

    target: Tensor
    difference: Tensor
    steps: Tensor
    first_moment: Tensor
    second_moment: Tensor

    def __init__(
        self,
        target: Tensor,
        estimator: str,
        *,
        decay: float,
        lr: float,
        numbers: int,
        backend: str,
    ) -> None:
        super().__init__()
        self.estimator, self.decay, self.lr, self.numbers = estimator, decay, lr, numbers
        self.backend = backend
        self.register_buffer("target", target, persistent=False)
        if estimator in ("ema", "adam"):
            self.register_buffer("difference", torch.zeros_like(target))  # v
            self.register_buffer("steps", torch.zeros(target.shape[1], device=target.device))
        if estimator == "adam":
            self.register_buffer("first_moment", torch.zeros_like(target))
            self.register_buffer("second_moment", torch.zeros_like(target))

    def fits(self, device: torch.device) -> bool:
        """Whether target and state are what a core takes of features on a device."""
        return all(
            b.device == device and b.dtype == torch.float32 and not b.requires_grad
            for b in self.buffers()
        )

    def step(self) -> Step:
        """The step that moves the state, if in training."""
        if self.estimator in ("batch", "unbiased"):
            return Step()
        state, update = (self.difference, self.steps), self.training
        if self.estimator == "ema":
            return Step("ema", *state, decay=self.decay, update=update)
        moments = self.first_moment, self.second_moment
        return Step("adam", *state, *moments, lr=self.lr, numbers=self.numbers, update=update)

    def forward(self, means: Tensor, counts: Tensor) -> Tensor:
        """The loss of the rows with a count above 0, from means [M, R, D] and counts [R]."""
        target = self.target.to(means.dtype)
        if self.estimator in ("batch", "unbiased"):
            return mmd_loss(means, counts, target, backend=self.backend)
        options: dict[str, Any] = {
            "estimate": self.difference,
            "steps": self.steps,
            "update": self.training,
            "backend": self.backend,
        }
        if self.estimator == "ema":
            return ema_loss(means, counts, target, decay=self.decay, **options)
        return adam_loss(
            means,
            counts,
            target,
            first_moment=self.first_moment,
            second_moment=self.second_moment,
            lr=self.lr,
            numbers=self.numbers,
            **options,
        )


def _check_graph(
    device: torch.device, micro_batch: int | None, state: str, process_group: ProcessGroup | None
) -> None:
    """Refuses graph=True where the loss cannot be a graph."""
    if process_group is not None:
        why = (
            "with process_group: a graph holds the work of one process alone; leave one of the two "
            "out. A generator in DistributedDataParallel needs no process group in the loss."
        )
    elif micro_batch is not None:
        why = (
            f"with micro_batch={micro_batch}: micro-batches are cut on the host, which a graph "
            "leaves out; choose one of the two."
        )
    elif state == "host":
        why = "with state='host': a graph waits for no host; leave one of the two out."
    elif device.type not in _capture.GRAPHED_ON:
        why = (
            f"with the encoder on {device}: only CUDA devices have graphs; move the encoder there "
            "first, or leave graph out."
        )
    else:
        return
    raise ValueError(f"graph=True {why}")


def check_encoder(release: Release, encoder: Encoder, *, selection: bool = False) -> None:
    """Raises a PrivacyError naming the first thing in which encoder and release differ.

    Args:
        release: has the record of its encoder.
        encoder: the one to compare.
        selection: compare with the encoder of the selection block instead.
    """
    metadata = release.metadata
    recorded = metadata.selection_encoder if selection else metadata.features_of
    if recorded is None:
        raise PrivacyError(
            "selection: the release has no selection block; make one with selection=ENCODER, or "
            "train without selection."
        )
    given = encoder.spec()
    for key in sorted({*recorded, *given}, key=lambda key: (key != "name", key)):
        if recorded.get(key) != given.get(key):
            raise PrivacyError(
                f"encoder: its {key} is {_brief(given.get(key))}, the release was made with "
                f"{_brief(recorded.get(key))}. Load the same encoder with "
                "dpmmd.encoders.from_spec(release.metadata.encoder)."
            )


def _brief(value: Any) -> str:
    text = ", ".join(t["name"] for t in value) if _is_taps(value) else repr(value)
    return plain(text, 120)


def _is_taps(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(t, dict) and "name" in t for t in value)


def _until_sure(release: Release) -> int:
    """In how many batches labels 0..K-1 alone cannot be rows; 0: they may be.

    Rows in turn have all come up in A batches. Of rows that are drawn, at least one a batch,
    uniformly, by their counts, or by their shares of a class, others have come up too, but for one
    training in a million.
    """
    k = release.num_classes
    if release.modes is None or release.num_rows <= k:
        return 0
    rows = release.rows
    of_class = rows.classes.bincount(rows.counts, minlength=k)
    weights = (torch.ones_like(rows.counts), rows.counts, rows.counts / of_class[rows.classes])
    others = min(float(each[k:].sum() / each.sum()) for each in weights)
    return max(len(rows.counts), math.ceil(math.log(1e-6) / math.log1p(-others)))
