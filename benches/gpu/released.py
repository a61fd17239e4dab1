"""Throughput of a release: the encoder alone, with integer sums on the device, and whole.

Of plain torch nothing: its sums are the definition, no competitor, and take seconds a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dpmmd
from benches.backends import compiled
from benches.gpu.device import brief
from benches.gpu.inputs import Scale
from benches.gpu.measure import Call, Measure, Row
from benches.gpu.steps import encoder_of
from benches.gpu.suite import conformance
from dpmmd import backends, reference
from dpmmd._cores import named
from dpmmd.bounds import Bound
from dpmmd.encoders import Encoder
from dpmmd.run import no_noise

RELEASE, WHOLE = "release, encoder and sums", "dpmmd.release, images in memory"
ALONE = "encoder alone"


def released(
    measure: Measure, scale: Scale, present: Sequence[str], broken: set[tuple[str, str]]
) -> None:
    device, (pixels, batch, _) = measure.device, scale.release
    sound = [
        b
        for b in compiled(present)
        if not {(b, conformance.SUMS), (b, conformance.RELEASE)} & broken
    ]
    shape = f"{scale.encoder} {pixels} px, n={batch}, K={scale.classes}, moments 1"
    encoders: dict[str, Encoder] = {}
    for precision in scale.precisions:  # first what targets are about
        if measure.budget.fits(f"{RELEASE}, {precision}"):
            encoders[precision] = encoder_of(scale, pixels, precision, device.device)
            _sums(measure, scale, shape, precision, encoders[precision], sound)
        device.free()
    for precision, encoder in encoders.items():
        _whole(measure, scale, shape, precision, encoder, sound)
        device.free()


def _sums(
    measure: Measure,
    scale: Scale,
    shape: str,
    precision: str,
    encoder: Encoder,
    sound: Sequence[str],
) -> None:
    """Batches on the device through the encoder, their features to integer sums."""
    device = measure.device
    pixels, batch, count = scale.release
    batches = [torch.rand(batch, 3, pixels, pixels, device=device.device) for _ in range(2)]
    y = (torch.arange(batch) % scale.classes).to(device.device)
    valid = torch.ones(batch, dtype=torch.bool, device=device.device)
    limits = torch.full((batch,), 1 << 30, device=device.device)
    given: dict[str, Any] = {"labels": y, "valid": valid, "limits": limits}
    given |= {"bound": Bound(), "nonnegative": True}

    def loop(add: Callable[[list[Tensor]], None] | None) -> None:
        with torch.inference_mode():
            for index in range(count):
                maps = encoder(batches[index % 2])
                if add is not None:
                    add(reference.flatten(maps))

    variants: dict[str, list[Call]] = {ALONE: [partial(loop, None)]}
    for backend in sound:
        into = torch.zeros(scale.classes, encoder.dim, dtype=torch.int64, device=device.device)
        variants[backend] = [
            partial(loop, partial(named(backend).bounded_sums, sums=into, **given))
        ]
    measure(RELEASE, shape, precision, variants, items=batch * count)


def _whole(
    measure: Measure,
    scale: Scale,
    shape: str,
    precision: str,
    encoder: Encoder,
    sound: Sequence[str],
) -> None:
    """`dpmmd.release` of so many images, by the difference of one of twice as many."""
    device = measure.device
    pixels, batch, count = scale.release
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2 * batch * count, 3, pixels, pixels), dtype=np.uint8)

    options: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "adjacency": "replace-one"}
    options |= {"num_classes": scale.classes, "batch_size": batch, "progress": False}

    def whole(n: int) -> None:
        source = images[:n], np.arange(n) % scale.classes
        dpmmd.release(source, encoder, insecure_test_noise=no_noise, **options)

    for backend in sound:
        if not measure.budget.fits(f"{WHOLE}, {precision}, {backend}"):
            continue
        try:
            with backends.use(backend):
                whole(batch)
                half = device.seconds(lambda: whole(batch * count))
                seconds = max(device.seconds(lambda: whole(2 * batch * count)) - half, 0.0)
        except Exception as error:
            measure.keep(Row(WHOLE, shape, precision, backend, note=brief(error)))
            measure.errors.append(f"{WHOLE}, {precision}, {backend}: {brief(error)}")
            continue
        row = Row(WHOLE, shape, precision, backend, seconds, seconds, 1, "launches")
        measure.keep(replace(row, items=batch * count))
