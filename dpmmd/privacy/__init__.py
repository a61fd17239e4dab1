"""The trusted core: everything that a privacy claim rests on, and nothing else."""

from dpmmd.privacy.accounting import Calibration, calibrate, compose, delta, epsilon
from dpmmd.privacy.audit import Audit, audit
from dpmmd.privacy.ledger import Ledger
from dpmmd.privacy.mechanism import release
from dpmmd.privacy.metadata import PrivacyError
from dpmmd.privacy.pipeline import SourceAudit, audit_source
from dpmmd.privacy.release_file import Release, UnsavedRelease
from dpmmd.privacy.sensitivity import ADJACENCIES, Block, optimal_weights, sensitivity
from dpmmd.privacy.verdicts import SourceCheck

__all__ = [
    "ADJACENCIES",
    "Audit",
    "Block",
    "Calibration",
    "Ledger",
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
]
