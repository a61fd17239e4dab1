"""The trusted core: everything that a privacy claim rests on, and nothing else."""

from typing import TYPE_CHECKING

from dpmmd._lazy import importer
from dpmmd.privacy.sensitivity import ADJACENCIES, Block, optimal_weights, sensitivity

if TYPE_CHECKING:
    from dpmmd.privacy.accounting import Calibration, calibrate, compose, delta, epsilon
    from dpmmd.privacy.canaries import Audit, audit
    from dpmmd.privacy.composition import split_epsilon
    from dpmmd.privacy.ledger import Ledger
    from dpmmd.privacy.mechanism import release
    from dpmmd.privacy.metadata import PrivacyError
    from dpmmd.privacy.modes import Modes
    from dpmmd.privacy.pipeline import SourceAudit, audit_source
    from dpmmd.privacy.release_file import Release, UnsavedRelease
    from dpmmd.privacy.verdicts import SourceCheck
else:
    __getattr__ = importer(
        __name__,
        {
            "dpmmd.privacy.accounting": ("Calibration", "calibrate", "compose", "delta", "epsilon"),
            "dpmmd.privacy.canaries": ("Audit", "audit"),
            "dpmmd.privacy.composition": ("split_epsilon",),
            "dpmmd.privacy.ledger": ("Ledger",),
            "dpmmd.privacy.mechanism": ("release",),
            "dpmmd.privacy.metadata": ("PrivacyError",),
            "dpmmd.privacy.modes": ("Modes",),
            "dpmmd.privacy.pipeline": ("SourceAudit", "audit_source"),
            "dpmmd.privacy.release_file": ("Release", "UnsavedRelease"),
            "dpmmd.privacy.verdicts": ("SourceCheck",),
        },
    )

__all__ = [
    "ADJACENCIES",
    "Audit",
    "Block",
    "Calibration",
    "Ledger",
    "Modes",
    "PrivacyError",
    "Release",
    "SourceAudit",
    "SourceCheck",
    "UnsavedRelease",
    "audit",
    "audit_source",
    "calibrate",
    "compose",
    "delta",
    "epsilon",
    "optimal_weights",
    "release",
    "sensitivity",
    "split_epsilon",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
