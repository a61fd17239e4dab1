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
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from dpmmd.kernels import (
    bounded_sums,
    class_sums,
    estimator,
    gradient,
    injection,
    mean_embedding,
    row_dots,
    row_statistics,
    table,
)

MODULES = (bounded_sums, class_sums, estimator, gradient, row_dots, row_statistics)
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
    typical = [((1, 2), None)]
    rest = [((1,), None), ((2,), None), ((1, 2), 0.5)]
    bounds = ("sphere", "ball", "sphere-per-tap")
    for dtype, shape in itertools.product(
        DTYPES[:1] if quick else DTYPES, (LARGE,) if quick else (LARGE, SMALL, ODD)
    ):
        features = [
            torch.zeros(32, *s, dtype=dtype).contiguous(
                memory_format=torch.channels_last if len(s) == 3 else torch.contiguous_format
            )
            for s in shape
        ]
        aligned = shape is not ODD
        everything = shape is LARGE and not quick
        kinds: list[tuple[tuple[int, ...], float | None]] = typical + (rest if everything else [])
        for bound, (moments, joint), k in itertools.product(
            bounds if everything else bounds[:1], kinds, (3, 1) if everything else (3,)
        ):
            if joint and bound.endswith("-per-tap"):
                continue

            def embed(
                features: list[torch.Tensor] = features,
                bound: str = bound,
                moments: tuple[int, ...] = moments,
                joint: float | None = joint,
                k: int = k,
            ) -> None:
                labels = torch.zeros(32, dtype=torch.int64) if k > 1 else None
                means, _, scale, projection, schedule = mean_embedding.forward(
                    features,
                    labels,
                    k,
                    moments=moments,
                    bound=bound,
                    clip=1.0,
                    joint_weight=joint,
                )
                mean_embedding.backward(
                    features,
                    labels,
                    moments=moments,
                    joint_weight=joint,
                    scale=scale,
                    projection=projection,
                    schedule=schedule,
                    upstream=means,
                )

            yield [dtype, aligned], embed

            def inject(
                features: list[torch.Tensor] = features,
                bound: str = bound,
                moments: tuple[int, ...] = moments,
                joint: float | None = joint,
                k: int = k,
            ) -> None:
                labels = torch.zeros(32, dtype=torch.int64) if k > 1 else None
                options = {"moments": moments, "joint_weight": joint}
                dim = sum(f[0].numel() for f in features)
                maps = [f for f in features if f.ndim == 4]
                kinds = list(itertools.product((True, False), (None, 6.0)))
                for f, (behind, ceiling) in itertools.product(maps, kinds):
                    bias = f[0, :, 0, 0] if behind else None
                    row_statistics.rectify(f, bias, ceiling, moments, dim)
                means, _, *statistics = injection.forward(
                    features, [None] * len(features), labels, k, bound=bound, clip=1.0, **options
                )
                scale, projection, schedule = statistics
                taps, coefficients, _ = injection.backward(
                    features,
                    labels,
                    scale=scale,
                    projection=projection,
                    schedule=schedule,
                    upstream=means,
                    needed=[False] * len(features),
                    **options,
                )
                for f, (behind, ceiling) in itertools.product(maps, kinds):
                    gradient.rectified_gradient(
                        taps,
                        [f is g for g in features].index(True),
                        f,
                        f if behind else None,
                        ceiling,
                        schedule,
                        scale,
                        coefficients,
                        means,
                        **options,
                    )

            yield [dtype, aligned], inject
        for bound, moments, shared in itertools.product(
            bounds if everything else bounds[:1],
            ((1,), (2,), (1, 2)) if everything else ((1, 2),),
            (0, 1) if everything else (0,),
        ):

            def add(
                features: list[torch.Tensor] = features,
                bound: str = bound,
                moments: tuple[int, ...] = moments,
                shared: int = shared,
            ) -> None:
                widths = [f[0].numel() for f in features]
                own = len(moments) * sum(widths[shared:])
                bounded_sums.bounded_sums(
                    features,
                    torch.zeros(32, dtype=torch.int64),
                    torch.ones(32, dtype=torch.bool),
                    torch.full((32,), 2**30),
                    moments=moments,
                    joint_weight=0.5,
                    bound=bound,
                    clip=1.0,
                    nonnegative=False,
                    sums=torch.zeros(3, own, dtype=torch.int64),
                    shared=(
                        torch.zeros(1, len(moments) * widths[0], dtype=torch.int64)
                        if shared
                        else None
                    ),
                    shared_taps=shared,
                )

            yield [dtype, aligned], add
    for columns, kind, update in itertools.product(
        (512,) if quick else (512, 511),
        ("adam",) if quick else ("batch", "ema", "adam"),
        (True,) if quick else (True, False),
    ):

        def step(columns: int = columns, kind: str = kind, update: bool = update) -> None:
            state = [torch.zeros(2, 3, columns) for _ in range(5)]
            counts, steps = torch.ones(3), torch.zeros(3)
            estimator.difference(
                state[0],
                counts,
                state[1],
                estimator=kind,
                estimate=state[2] if kind != "batch" else None,
                steps=steps if kind != "batch" else None,
                first_moment=state[3] if kind == "adam" else None,
                second_moment=state[4] if kind == "adam" else None,
                decay=0.9,
                lr=1e-3,
                update=update,
            )

        yield [torch.float32, columns % 4 == 0], step


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
    return next(c.registers for _, c in sizes if c.block == flags["BLOCK"])


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
