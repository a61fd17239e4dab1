"""What a guarantee rests on, file by file, and which tests were run on exactly these files.

A test speaks for the code that it ran on. `python -m tests.record` runs the tests below on a
checkout and writes evidence.json, which is installed with the package: the version, the day, how
many tests passed, and sha256 of the trusted files. A report cites the tests only where the files
that are installed here have the same sha256, and the release was made by the same version. The
record is no signature: it tells an honest reader which code was tested.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from dpmmd._version import __version__

# What (epsilon, delta) of one release rests on, by part: Python modules.
MODULES = {
    "the mechanism": (
        "dpmmd.privacy.accounting",
        "dpmmd.privacy.blocks",
        "dpmmd.privacy.collecting",
        "dpmmd.privacy.layout",
        "dpmmd.privacy.mechanism",
        "dpmmd.privacy.modes",
        "dpmmd.privacy.noise",
        "dpmmd.privacy.noising",
        "dpmmd.privacy.opening",
        "dpmmd.privacy.ranks",
        "dpmmd.privacy.sensitivity",
        "dpmmd.privacy.spending",
        "dpmmd.privacy.sums",
    ),
    "its files: releases, partial sums, the ledger": (
        "dpmmd.privacy.checks",
        "dpmmd.privacy.composition",
        "dpmmd.privacy.ledger",
        "dpmmd.privacy.ledger_file",
        "dpmmd.privacy.metadata",
        "dpmmd.privacy.partial",
        "dpmmd.privacy.release_file",
    ),
    "which core sums, and its only caller": (
        "dpmmd._cores.arguments",
        "dpmmd._contract.checks",
        "dpmmd._cores.cpu",
        "dpmmd._contract.taps",
        "dpmmd.backends",
    ),
    "sums on a CUDA device, in CUDA C++: the caller": ("dpmmd._cores.cuda",),
    "sums on a CUDA device, in Triton": (
        "dpmmd._cores.triton",
        "dpmmd.kernels.bounded_sums",
        "dpmmd.kernels.schedule",
        "dpmmd.kernels.table",
        "dpmmd.kernels.taps",
    ),
}
# The native code that certifies. All of csrc/ is compiled into one module, whose sha256 of its
# sources is `dpmmd._native.sources`; CMakeLists.txt says which files it is over.
NATIVE = {
    "sums on the CPU, in C++": (
        "csrc/bindings.cpp",
        "csrc/bindings.h",
        "csrc/cpu/bounded_sums.cpp",
        "csrc/cpu/dispatch.cpp",
        "csrc/cpu/parallel.cpp",
        "csrc/cpu/parallel.h",
        "csrc/cpu/simd.h",
        "csrc/cpu/workspace.h",
        "csrc/dpmmd.h",
    ),
    "sums on a CUDA device, in CUDA C++": (
        "csrc/bindings_cuda.cpp",
        "csrc/cuda/bounded_sums.cu",
        "csrc/cuda/device.h",
        "csrc/cuda/runtime.cu",
        "csrc/cuda/schedule.h",
    ),
}
# What stands behind the claim, and the tests that fail where it does not hold.
MUTATIONS = "tests/privacy/test_mutations.py::test_every_mutation_is_caught"
EVIDENCE = (
    (
        "accounting equals 60-digit arithmetic and dp-accounting, rounded to the safe side",
        "tests/privacy/test_accounting.py::test_calibration_is_tight_and_on_the_safe_side",
    ),
    (
        "declared sensitivities are reached and never passed, exhaustively on small integers",
        "tests/privacy/test_sensitivity.py::test_declared_sensitivity_is_reached_and_never_passed",
    ),
    (
        "no feature vector passes its bound, checked in exact integers on adversarial values",
        "tests/privacy/test_release.py::test_no_vector_passes_the_limit",
    ),
    (
        "a vector of the limit is summed, and one above it is not",
        "tests/privacy/test_certificate.py::test_a_vector_of_the_limit_passes_and_one_above_it_does_not",
    ),
    (
        "the native sums are those of their definition, bit for bit",
        "tests/core/test_bounded_sums.py::test_same_bits_as_the_definition",
    ),
    (
        "releases of neighbours differ by at most the sensitivity, and in nothing else",
        "tests/privacy/test_release.py::test_replay_neighbours_differ_by_at_most_the_sensitivity",
    ),
    (
        "the noise has exactly the declared law, to its lowest bit",
        "tests/privacy/test_noise.py::test_distribution",
    ),
    (
        "the sampler decides as its law does, next to every threshold",
        "tests/privacy/test_noise_replay.py::test_decisions_next_to_the_threshold",
    ),
    (
        "every released number has a draw of its own, of the declared sd",
        "tests/privacy/test_noising.py::test_every_released_number_has_a_draw_of_its_own",
    ),
    (
        "an attack with 10,000 and a million canaries does not refute the claim and nearly "
        "reaches it; releases broken on purpose are refuted",
        "tests/privacy/test_audit.py::test_a_broken_release_is_rejected",
    ),
    (
        "faults injected into the native sums, one at a time, are each caught",
        "tests/core/test_native_mutations.py::test_a_fault_is_caught",
    ),
    ("faults injected into this code, one at a time, are each caught by a named test", MUTATIONS),
)
RECORD = Path(__file__).with_name("evidence.json")
_HOW = (
    "In a checkout, `python -m tests.record` runs them and records it; here, `dpmmd audit "
    "--canaries 10000` attacks the installed package."
)


def python_digest() -> str | None:
    """sha256 over the trusted modules as they are installed; None where one is not a file."""
    whole = hashlib.sha256()
    for name in sorted(name for names in MODULES.values() for name in names):
        try:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:
                return None
            content = Path(spec.origin).read_bytes()
        except (ImportError, OSError):
            return None
        whole.update(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())
    return whole.hexdigest()


def native_digest() -> str | None:
    """sha256 over the sources of the compiled module; "" where there is none and none runs."""
    from dpmmd._cores import cpu

    if cpu.missing is not None:
        return ""
    return getattr(cpu._native, "sources", None)


def record(path: Path | None = None) -> dict[str, Any] | None:
    """What evidence.json says, if it is of exactly the code that is installed; else None."""
    try:
        found = json.loads((path or RECORD).read_text(encoding="ascii"))
        tests = {str(test): int(passed) for test, passed in found["tests"].items()}
        result = {
            "version": str(found["version"]),
            "date": str(found["date"]),
            "python_sha256": str(found["python_sha256"]),
            "native_sha256": str(found["native_sha256"]),
            "tests": tests,
            "mutations": int(found["mutations"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    same = (
        result["version"] == __version__
        and result["python_sha256"] == python_digest()
        and native_digest() in ("", result["native_sha256"])
        and all(tests.get(test, 0) > 0 for _, test in EVIDENCE)
    )
    return result if same else None


def facts(version: str) -> dict[str, Any]:
    """For the report of a release that ``version`` of dpmmd made.

    Returns:
        ``tested``: one line that says which run is on record, or that none is; ``evidence``: what
        each test shows, its name and how often it passed; empty where no run is on record.
    """
    if version != __version__:
        return {
            "tested": f"This release was made by dpmmd {version!r}, and this is dpmmd "
            f"{__version__!r}: no run of the tests is on record here for the code that made "
            "it. Install that version to see its own.",
            "evidence": [],
        }
    run = record()
    if run is None:
        return {
            "tested": f"No run of the tests is on record for exactly this code. {_HOW}",
            "evidence": [],
        }
    return {
        "tested": f"Run on exactly this code (dpmmd {run['version']}, sha256 "
        f"{run['python_sha256'][:12]}, native {run['native_sha256'][:12]}) on {run['date']}: "
        f"{sum(run['tests'].values())} tests passed, {run['mutations']} injected faults were "
        "caught, none failed.",
        "evidence": [
            {"what": what, "test": test, "passed": run["tests"][test]} for what, test in EVIDENCE
        ],
    }
