"""Compiles the Triton kernels ahead of time for sm_80, sm_90 and sm_100, without a device.

``python -m tests.core.kernels_aot [--quick] [--arch 90]`` prints registers, shared memory, spills
and the widest accesses to global memory of each. What is compiled is what the launchers launch:
they run on tensors of the CPU, and each launch is recorded, specialised as Triton would and
compiled.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from dpmmd._contract.protocol import Step
from dpmmd.bounds import MOMENTS, Bound
from dpmmd.kernels import (
    bounded_sums,
    estimator,
    gradient,
    injection,
    maps,
    mean_embedding,
    normalise,
    pooling,
    row_dots,
    row_statistics,
    table,
    taps,
    upsampling,
)

MODULES = (bounded_sums, estimator, gradient, maps, normalise, row_dots, row_statistics, taps)
LARGE = ((64, 32, 32), (128, 8, 8), (64,))
SMALL = ((32, 8, 8), (64,))
ODD = ((3, 7, 5), (33,))
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel."""

    kernel: Any
    operation: str
    dtype: torch.dtype = field(compare=False)
    aligned: bool = field(compare=False)
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Any, Any], ...]
    attributes: tuple[tuple[Any, Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        flags = {self.kernel.arg_names[key[0]]: value for key, value in self.constants}
        text = " ".join(
            f"{name.lower()}={value}"
            for name, value in flags.items()
            if name not in ("TYPE", "OUT", "BLOCK", "ROWS", "VECTOR")
        )
        tile = f"{flags.get('ROWS', '')}x{flags['BLOCK']}" if "BLOCK" in flags else ""
        kind = str(self.dtype).removeprefix("torch.")
        return " ".join(
            (self.kernel.__name__, kind, "aligned" if self.aligned else "odd", tile, text)
        )


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs, and how wide its accesses to global memory are in bits."""

    registers: int
    shared: int
    spilled: int  # bytes of local memory and stack a thread
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    ptx: str


def cases(architecture: int, *, quick: bool = False) -> list[Case]:
    """Every distinct specialisation of the launchers for an architecture; quick: a typical one."""
    recorded: dict[Case, None] = {}
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    binders: dict[str, Callable[..., Any]] = {}
    current: list[Any] = []

    def record(
        kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any
    ) -> None:
        binder = binders.setdefault(
            kernel.__name__,
            create_function_from_signature(kernel.signature, kernel.params, backend),
        )
        bound, specialisation, given = binder(*args, **options)
        parsed, signature, constants, attributes = kernel._pack_args(
            backend, {**options, "debug": options.get("debug", False)}, bound, specialisation, given
        )
        used = tuple(
            (name, getattr(parsed, name))
            for name in (
                "num_warps",
                "num_stages",
                "debug",
                "sanitize_overflow",
                "enable_fp_fusion",
            )
        )
        dtype, aligned = current
        module = kernel.__module__.rpartition(".")[2]
        recorded[
            Case(
                kernel,
                module,
                dtype,
                aligned,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple((key, tuple(map(tuple, value))) for key, value in attributes.items()),
                used,
            )
        ] = None

    with mock.patch.object(table, "_architecture", return_value=architecture):
        patches = [mock.patch.object(module, "launch", record) for module in MODULES]
        for patch in patches:
            patch.start()
        try:
            for current[:], call in _calls(quick):
                call()
        finally:
            for patch in patches:
                patch.stop()
    return list(recorded)


def _calls(quick: bool) -> Iterator[tuple[list[Any], Callable[[], None]]]:
    """(dtype, aligned) and a call of its launchers."""
    kinds = ("sphere", "ball", "sphere-per-tap")
    for dtype, shape in itertools.product(
        DTYPES[:1] if quick else DTYPES, (LARGE,) if quick else (LARGE, SMALL, ODD)
    ):
        features = [
            torch.zeros(32, *s, dtype=dtype).contiguous(
                memory_format=torch.channels_last if len(s) == 3 else torch.contiguous_format
            )
            for s in shape
        ]
        current = [dtype, shape is not ODD]
        everything = shape is LARGE and not quick
        bounds = [Bound((1, 2))]
        if everything:
            every = ((1, 2), None), ((1,), None), ((2,), None), ((1, 2), 0.5)
            bounds = [
                Bound(moments, kind, joint_weight=joint)
                for kind, (moments, joint) in itertools.product(kinds, every)
                if joint is None or not kind.endswith("-per-tap")
            ]
        for bound, k in itertools.product(bounds, (3, 1) if everything else (3,)):
            yield current, partial(_embed, features, k, bound)
            yield current, partial(_inject, features, k, bound)
        sums = [Bound((1, 2), joint_weight=0.5)]
        if everything:
            sums = [Bound(m, kind, joint_weight=0.5) for kind in kinds for m in MOMENTS]
        for bound, shared in itertools.product(sums, (0, 1) if everything else (0,)):
            yield current, partial(_add, features, bound, shared)
    for dtype, channels in itertools.product(DTYPES, (64,) if quick else (512, 64, 3)):
        x = torch.zeros(8, channels, 4, 4, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        yield [dtype, channels != 3], partial(_layers, x)
    for columns, kind, update in itertools.product(
        (512,) if quick else (512, 511),
        ("adam",) if quick else ("batch", "ema", "adam"),
        (True,) if quick else (True, False),
    ):
        yield [torch.float32, columns % 4 == 0], partial(_estimate, columns, kind, update)


def _labels(k: int) -> torch.Tensor | None:
    return torch.zeros(32, dtype=torch.int64) if k > 1 else None


def _embed(features: list[torch.Tensor], k: int, bound: Bound) -> None:
    means, _, saved = mean_embedding.forward(features, _labels(k), k, bound)
    needed = [True] * len(features)
    mean_embedding.backward(features, _labels(k), k, bound, saved, means, needed)


def _inject(features: list[torch.Tensor], k: int, bound: Bound) -> None:
    dim = sum(f[0].numel() for f in features)
    cases = [
        (i, behind, ceiling)
        for i, f in enumerate(features)
        for behind, ceiling in itertools.product((True, False), (None, 6.0))
        if f.ndim == 4
    ]
    for i, behind, ceiling in cases:
        f = features[i]
        row_statistics.rectify(f, f[0, :, 0, 0] if behind else None, ceiling, bound, dim)
    nothing = [None] * len(features)
    means, _, saved = injection.forward(features, nothing, _labels(k), k, bound)
    needed = [False] * len(features)
    places, terms, _ = injection.backward(features, _labels(k), bound, saved, means, needed)
    for i, behind, ceiling in cases:
        f = features[i]
        gradient.rectified_gradient(places, i, terms, f, f if behind else None, ceiling)


def _add(features: list[torch.Tensor], bound: Bound, shared_taps: int) -> None:
    moments, widths = len(bound.moments), [f[0].numel() for f in features]
    sums = torch.zeros(3, moments * sum(widths[shared_taps:]), dtype=torch.int64)
    shared = torch.zeros(1, moments * sum(widths[:shared_taps]), dtype=torch.int64)
    bounded_sums.bounded_sums(
        features,
        torch.zeros(32, dtype=torch.int64),
        torch.ones(32, dtype=torch.bool),
        torch.full((32,), 2**30),
        bound=bound,
        nonnegative=False,
        sums=sums,
        shared=shared if shared_taps else None,
        shared_taps=shared_taps,
    )


def _estimate(columns: int, kind: str, update: bool) -> None:
    means, target, *state = [torch.zeros(2, 3, columns) for _ in range(5)]
    stateful = kind != "batch"
    step = Step(
        kind,
        estimate=state[0] if stateful else None,
        steps=torch.zeros(3) if stateful else None,
        first_moment=state[1] if kind == "adam" else None,
        second_moment=state[2] if kind == "adam" else None,
        decay=0.9,
        lr=1e-3,
        update=update,
    )
    estimator.estimate(means, torch.ones(3), target, step)


def _layers(x: torch.Tensor) -> None:
    channels = torch.zeros(x.shape[1])
    moved = channels, channels, torch.zeros((), dtype=torch.int64)
    y, *saved = normalise.norm_relu(x, normalise.Layer(channels, channels, *moved, 0.1, 1e-5))
    normalise.norm_relu_backward(x, y, *saved, channels, channels)
    upsampling.add_upsampled(x, x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last))
    upsampling.upsampled_gradient(x)
    for window in ((2, 2, 0), (3, 2, 1)):
        pooled, places = pooling.max_pool(x, *window)
        pooling.max_pool_gradient(pooled, places, x.shape, *window)


def compile_case(case: Case, architecture: int) -> Compiled:
    """Compiles a case; what came out is read from the binary."""
    source = ASTSource(
        case.kernel,
        dict(case.signature),
        dict(case.constants),
        {key: [list(a) for a in value] for key, value in case.attributes},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options)
    )
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def number(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        assert found, f"cuobjdump says nothing of {name}:\n{usage}"
        return int(found[1])

    return Compiled(
        registers=number("REG"),
        shared=compiled.metadata.shared,
        spilled=number("STACK") + number("LOCAL"),
        loads=_widths(ptx, "ld"),
        stores=_widths(ptx, "st"),
        ptx=ptx,
    )


def _widths(ptx: str, operation: str) -> tuple[int, ...]:
    """Bits of every access to global memory in a PTX text."""
    found = re.findall(rf"\b{operation}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    return tuple(int(vector or 1) * int(bits) for vector, bits in found)


def budget(case: Case, architecture: int) -> int:
    """Registers a thread that the table allows."""
    operation = case.operation
    flags = {case.kernel.arg_names[key[0]]: value for key, value in case.constants}
    if "BLOCK" not in flags:
        return table.FINISH_REGISTERS
    sizes = table.TABLE[architecture][case.dtype][operation]
    return next(c.registers for _, c in sizes if c.block >= flags["BLOCK"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--arch", type=int, action="append", choices=table.ARCHITECTURES)
    arguments = parser.parse_args()
    print(
        f"{'sm':>4} {'regs':>5} {'budget':>6} {'smem':>6} {'spill':>5} {'ld':>4} {'st':>4}  kernel"
    )
    for architecture in arguments.arch or table.ARCHITECTURES:
        for case in cases(architecture, quick=arguments.quick):
            result = compile_case(case, architecture)
            print(
                f"{architecture:>4} {result.registers:>5} {budget(case, architecture):>6} "
                f"{result.shared:>6} {result.spilled:>5} {max(result.loads, default=0):>4} "
                f"{max(result.stores, default=0):>4}  {case.name}",
                flush=True,
            )


if __name__ == "__main__":
    main()
