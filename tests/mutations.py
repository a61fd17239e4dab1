"""Faults injected into the trusted code, one at a time, each of which a named test must catch.

    python -m tests.mutations            all of them, with the test that caught each
    python -m tests.mutations NAME ...   some of them
    python -m tests.mutations --list     what they mean, nothing is run

The package and the tests are copied to temporary folders, one for each core that is found. First
the named tests must pass there as they are; then each mutation is applied, its tests run, and every
one of them must fail by itself (an error of import or syntax does not count). Exit code 1 if a
mutation survives. The native core's own faults are in tests/core/test_native_mutations.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MECHANISM = "dpmmd/privacy/mechanism.py"
BLOCKS = "dpmmd/privacy/blocks.py"
OPENING = "dpmmd/privacy/opening.py"
SPENDING = "dpmmd/privacy/spending.py"
COLLECTING = "dpmmd/privacy/collecting.py"
MODES = "dpmmd/privacy/modes.py"
COMPOSITION = "dpmmd/privacy/composition.py"
NOISING = "dpmmd/privacy/noising.py"
SUMS = "dpmmd/privacy/sums.py"
NOISE = "dpmmd/privacy/noise.py"
SENSITIVITY = "dpmmd/privacy/sensitivity.py"
FILE = "dpmmd/privacy/release_file.py"
ACCOUNTING = "dpmmd/privacy/accounting.py"
LEDGER = "dpmmd/privacy/ledger_file.py"
CHECKS = "dpmmd/privacy/checks.py"
ENCODER = "dpmmd/encoders/base.py"
ITEMS = "dpmmd/data/items.py"
DATASET = "dpmmd/data/dataset.py"
DRAWS = "dpmmd/data/draws.py"
PIXELS = "dpmmd/data/pixels.py"
CHECKPOINT = "dpmmd/train/checkpoint.py"
PARTIAL = "dpmmd/privacy/partial.py"
_RANKS = "tests/privacy/test_ranks.py"
_REPLAY = "tests/privacy/test_noise_replay.py"
_CERTIFICATE = "tests/privacy/test_certificate.py"
_NOISING = "tests/privacy/test_noising.py"
SECONDS = 300.0  # that the tests of one mutation may take


@dataclass(frozen=True)
class Edit:
    """``old``, which must occur exactly once in ``file``, becomes ``new``."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """A fault: its name, what it means, how it is made, and the tests that must fail."""

    name: str
    meaning: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


_NOISED = "torch.from_numpy(drawn).view_as(values)"
_SD = "level.sd_over_sensitivity * moved"
_CERTIFY = "return certify(integers, limits, nonnegative=nonnegative)"
_UNCERTIFIED = "return integers, torch.stack([(q != 0).any(dim=1) for q in integers]).any(dim=0)"
_SPHERE = "rate = limits * GUARD / norm"
_UNBOUNDED = "rate = limits * _power_of_two(exponent) / clip"
_COUNTS = "_noised(raw.counts, sd, sampler, unit, torch.float64)"
_OF_PART = "_noised(sums, sd, sampler, part.unit)"
_SHARED_DRAW = (
    "sampler, memory = (lambda n, s, fresh=sampler: memory.setdefault(n, fresh(n, s))), {}"
)
_BAD = "tests/privacy/test_release.py::test_a_bad_image_contributes_zero_in_silence"
_UNDECODABLE = "tests/data/test_data.py::test_an_undecodable_image_is_a_silent_zero_row"
_CLAIM = "tests/privacy/test_release.py::test_an_altered_claim_is_refused"
_AUDIT = (
    "tests/privacy/test_audit.py::test_the_release_keeps_its_claim_and_the_audit_nearly_reaches_it"
)
_ADD_REMOVE = "tests/privacy/test_release.py::test_n_stays_private_under_add_remove"
_SUMS_OF = "tests/privacy/test_release.py::test_sums_are_those_of_the_features[moments0-sphere]"
_TABLE = "tests/privacy/test_sensitivity.py::test_declared_sensitivity_is_reached_and_never_passed"

_UNITS = "tests/privacy/test_units.py"
_GROUPS = f"{_UNITS}::test_neighbours_in_a_group_differ_by_at_most_the_sensitivity"
_DECLARED_SD = "tests/privacy/test_release.py::test_noise_has_the_declared_sd"

_MODES = "tests/privacy/test_modes.py"
_NO_TOTAL = f"{_MODES}::test_two_releases_without_a_total_are_refused_before_the_spend"
_EDITED = "tests/privacy/test_checks.py::test_a_contradiction_is_refused_by_its_field"

MUTATIONS = (
    # ------------------------------------------------------------------------- modes
    Mutation(
        "modes-of-the-batch",
        "a mode depends on the other images of its batch: one image moves the rows of others",
        (Edit(MODES, "(scores > thresholds[k])", "(scores > scores.median(0).values)"),),
        (
            f"{_MODES}::test_a_row_is_a_function_of_its_record",
            "tests/privacy/test_pipeline.py::test_releases_with_modes_are_consistent[replace-one]",
        ),
    ),
    Mutation(
        "modes-by-rounded-scores",
        "scores are rounded, so that a mode depends on the device and on the size of the batch",
        (
            Edit(
                MODES,
                ".double() @ directions.view(-1, d).T)",
                ".float() @ directions.float().view(-1, d).T)",
            ),
        ),
        (f"{_MODES}::test_a_score_at_its_threshold_is_below_it",),
    ),
    Mutation(
        "modes-of-interpolated-floats",
        "images are resized by the encoders' float32, whose last bits no device promises",
        (
            Edit(
                MODES,
                'torch.div(2 * x + unit // 2, unit, rounding_mode="floor").flatten(1)',
                "_levels(torch.nn.functional.interpolate("
                'images.float(), (side, side), mode="bilinear")).flatten(1)',
            ),
        ),
        (f"{_MODES}::test_images_are_brought_to_the_side_as_encoders_do",),
    ),
    Mutation(
        "no-number-has-no-mode",
        "what an image holds that is no number reaches the integers",
        (Edit(MODES, ".nan_to_num_(0.0)", ""),),
        (f"{_MODES}::test_no_image_can_make_the_rule_raise_or_leave_its_rows",),
    ),
    Mutation(
        "pixels-by-class-part-with-modes",
        "a new mode is taken to mean disjoint rows in blocks that are summed by class",
        (Edit(BLOCKS, "or kind.pooled or by_class", "or kind.pooled"),),
        (
            "tests/privacy/test_sensitivity.py"
            "::test_blocks_by_class_are_spread_where_there_are_modes",
            f"{_EDITED}",
        ),
    ),
    Mutation(
        "the-origin-of-modes-is-free",
        "a release with modes of another one states its own part for both",
        (
            Edit(
                COMPOSITION,
                "return composed([m.modes.origin, m], m.adjacency, m.unit)",
                "return m.mu",
            ),
        ),
        (
            f"{_MODES}::test_both_releases_are_stated_together",
            f"{_MODES}::test_totals_are_stated_under_the_second_release",
            f"{_NO_TOTAL}[adjacency]",
        ),
    ),
    Mutation(
        "origins-under-any-adjacency-add-up",
        "mu^2 are added, whatever the two releases take for neighbours",
        (
            Edit(
                COMPOSITION,
                "return composed([m.modes.origin, m], m.adjacency, m.unit)",
                "return math.hypot(m.modes.origin.mu, m.mu) * accounting.UP",
            ),
        ),
        (
            f"{_MODES}::test_totals_are_stated_under_the_second_release",
            f"{_NO_TOTAL}[adjacency]",
            f"{_NO_TOTAL}[other groups]",
        ),
    ),
    Mutation(
        "modes-of-raw-numbers",
        "modes of a release with test noise are taken for a private release",
        (Edit(COMPOSITION, "if m.private and not origin.private:", "if False:"),),
        (f"{_NO_TOTAL}[test noise]",),
    ),
    Mutation(
        "modes-without-a-total",
        "what two releases have no total for is not asked before the spend",
        (Edit(MECHANISM, "    refuse_unfounded(claim)\n", ""),),
        (_NO_TOTAL,),
    ),
    Mutation(
        "the-whole-twice",
        "the second of two releases gets all that both together may take",
        (Edit(COMPOSITION, "math.sqrt(1 - share) * mu", "mu"),),
        (f"{_MODES}::test_two_releases_never_exceed_what_was_split",),
    ),
    Mutation(
        "modes-are-no-setting",
        "a release does not record its modes: sums by other modes are mixed with its own",
        (
            Edit(
                MECHANISM,
                "modes=None if layout.modes is None else layout.modes.record",
                "modes=None",
            ),
        ),
        ("tests/privacy/test_partial.py::test_sums_of_other_modes_are_not_mixed_in",),
    ),
    Mutation(
        "any-rule-is-the-recorded-one",
        "the modes that lie in a file need not be those that its metadata name",
        (Edit(CHECKS, '            ("sha256", record.sha256, made.sha256),\n', ""),),
        (_EDITED,),
    ),
    Mutation(
        "any-origin-is-believed",
        "the mu of the release that modes come from need not follow from its epsilon",
        (Edit(COMPOSITION, "if not math.isclose(origin.mu, least, rel_tol=GUESS):", "if False:"),),
        (_EDITED,),
    ),
    # ------------------------------------------------------------------------- noise
    Mutation(
        "half-the-noise",
        "every coordinate gets half the standard deviation that is declared",
        (Edit(NOISING, "sampler(values.numel(), sd)", "sampler(values.numel(), sd / 2)"),),
        (
            _DECLARED_SD,
            f"{_AUDIT}[signed-zero-out]",
        ),
    ),
    Mutation(
        "no-noise",
        "the raw sums leave",
        (Edit(NOISING, f"values += {_NOISED}", "pass"),),
        (
            _DECLARED_SD,
            f"{_AUDIT}[signed-zero-out]",
        ),
    ),
    Mutation(
        "two-draws-averaged",
        "noise is drawn twice for the same sums and averaged: sqrt(2) too little",
        (
            Edit(
                NOISING,
                f"values += {_NOISED}",
                "values += torch.from_numpy("
                "(sampler(values.numel(), sd) + sampler(values.numel(), sd)) // 2"
                ").view_as(values)",
            ),
        ),
        (_DECLARED_SD,),
    ),
    Mutation(
        "sums-can-be-taken-twice",
        "two noised copies of one vector can be made for the price of one",
        (Edit(SUMS, "sums, self._sums = self._sums.cpu(), None", "sums = self._sums.cpu()"),),
        ("tests/privacy/test_release.py::test_raw_sums_cannot_be_looked_at",),
    ),
    Mutation(
        "one-noise-for-all-blocks",
        "two blocks of one size get the same draw: their difference is free of noise",
        (
            Edit(
                MECHANISM,
                "sampler = insecure_test_noise or rounded_gaussian",
                "memory: dict[int, Any] = {}\n"
                "        fresh = insecure_test_noise or rounded_gaussian\n"
                "        sampler = lambda n, sd: memory.setdefault(n, fresh(n, sd))",
            ),
        ),
        ("tests/privacy/test_release.py::test_every_block_has_noise_of_its_own",),
    ),
    Mutation(
        "fixed-seed",
        "the key of the noise is a constant that anybody can read",
        (Edit(NOISE, "ChaCha20(os.urandom(32),", "ChaCha20(bytes(32),"),),
        (
            "tests/privacy/test_noise.py::test_runs_differ",
            "tests/privacy/test_release.py::test_every_block_has_noise_of_its_own",
        ),
    ),
    Mutation(
        "float32-noise-on-the-integers",
        "rounded float32 noise: its low bits are zero, so those of the raw sums can be read",
        (
            Edit(
                NOISE,
                "out[done : done + take] = accepted[:take]",
                "out[done : done + take] = accepted[:take].astype(np.float32).astype(np.int64)",
            ),
        ),
        (
            "tests/privacy/test_float_attack.py::test_the_noise_takes_every_residue",
            "tests/privacy/test_float_attack.py::test_last_bits_of_the_integers_tell_nothing",
        ),
    ),
    Mutation(
        "noise-scaled-by-private-n",
        "under add-remove the standard deviation depends on the number of images",
        (
            Edit(
                MECHANISM,
                "    raw = layout.blocks.zero(layout.device)\n",
                "    sd = scale.sd * (1 + 1 / opened.images.num_images)\n"
                "    scale = _Scale(scale.sensitivity, sd, scale.mu)\n"
                "    raw = layout.blocks.zero(layout.device)\n",
            ),
        ),
        (_ADD_REMOVE,),
    ),
    Mutation(
        "noise-scaled-by-class-counts",
        "a class of many images gets less noise, the declared sd is that of the smallest",
        (
            Edit(
                NOISING,
                _OF_PART,
                "_noised(sums, sd / int(raw.counts._sums.max() // blocks.counts.bound"
                " if blocks.counts else 1) ** 0.5, sampler, part.unit)",
            ),
        ),
        (_DECLARED_SD,),
    ),
    Mutation(
        "selection-not-noised",
        "the embedding that picks the checkpoint is the private one",
        (
            Edit(
                NOISING,
                _OF_PART,
                "_noised(sums, sd, (lambda n, _: np.zeros(n, np.int64))"
                ' if part.block.name == "selection" else sampler, part.unit)',
            ),
        ),
        (
            "tests/privacy/test_release.py::test_selection_block",
            "tests/privacy/test_release.py::test_every_block_has_noise_of_its_own",
        ),
    ),
    Mutation(
        "pixels-not-noised",
        "the means of pixels are released as they are",
        (
            Edit(
                NOISING,
                _OF_PART,
                "_noised(sums, sd, (lambda n, _: np.zeros(n, np.int64))"
                ' if part.block.name == "pixels" else sampler, part.unit)',
            ),
        ),
        ("tests/privacy/test_release.py::test_every_block_has_noise_of_its_own",),
    ),
    Mutation(
        "products-not-spread",
        "the products of all classes counted as if they lay in their class's row",
        (
            Edit(
                BLOCKS,
                "grouped or shared > 0 or kind.pooled",
                "grouped or shared > 0",
            ),
        ),
        ("tests/privacy/test_release.py::test_pixel_moments",),
    ),
    Mutation(
        "pixels-as-if-nonnegative",
        "means of pixels in a signed basis counted as if no entry were negative",
        (
            Edit(
                BLOCKS,
                "one.moments == (2,) or its.nonnegative",
                'one.moments == (2,) or its.nonnegative or name == "pixels"',
            ),
        ),
        ("tests/privacy/test_release.py::test_pixel_moments",),
    ),
    Mutation(
        "products-less-noise",
        "what is above the diagonal has the noise of its half",
        (Edit(NOISING, "sd / math.sqrt(2)", "sd / 2"),),
        ("tests/privacy/test_release.py::test_every_block_has_noise_of_its_own",),
    ),
    Mutation(
        "products-of-a-group",
        "the products of every image of a group are bounded as if it were alone",
        (Edit(COLLECTING, "places, valid, limits)", "places, valid, limits * share)"),),
        ("tests/privacy/test_units.py::test_a_large_group_weighs_no_more_than_a_small_one",),
    ),
    Mutation(
        "products-rounded-up",
        "no room is left for rounding, nor is the norm looked at again",
        (
            Edit(SUMS, "slack = math.ceil(math.sqrt(vectors.shape[1]) / 2)", "slack = 0"),
            Edit(
                SUMS,
                "integers, within = certify([(fine[0] + (1 << _HALF >> 1)) >> _HALF], roots,"
                " nonnegative=False)",
                "integers = [(fine[0] + (1 << _HALF >> 1)) >> _HALF]; within = integers[0].any(1)",
            ),
        ),
        ("tests/privacy/test_products.py::test_norms_keep_to_the_limit",),
    ),
    Mutation(
        "counts-not-noised",
        "exact class counts are released, and every class mean is divided by them",
        (
            Edit(
                NOISING,
                _COUNTS,
                "_noised(raw.counts, sd, lambda n, _: np.zeros(n, np.int64), unit, torch.float64)",
            ),
        ),
        ("tests/privacy/test_release.py::test_every_block_has_noise_of_its_own", _ADD_REMOVE),
    ),
    Mutation(
        "exact-class-counts-as-divisors",
        "what is released are means over the exact class counts",
        (
            Edit(
                NOISING,
                "torch.stack([sums for sums, _ in phi])",
                "torch.stack([sums / exact for sums, _ in phi])",
            ),
            Edit(
                NOISING,
                "    arrays: dict[str, Tensor] = {}\n",
                "    exact = 1.0\n"
                "    if blocks.counts is not None:\n"
                "        exact = (raw.counts._sums / blocks.counts.bound).clamp(min=1)\n"
                "    arrays: dict[str, Tensor] = {}\n",
            ),
        ),
        (_SUMS_OF, _DECLARED_SD),
    ),
    # ------------------------------------------------------------------------- the sampler
    Mutation(
        "key-of-16-bits",
        "the noise has 65,536 values, which anybody can try",
        (Edit(NOISE, "ChaCha20(os.urandom(32),", "ChaCha20(os.urandom(2) + bytes(30),"),),
        (f"{_REPLAY}::test_every_draw_reads_a_key_of_32_bytes",),
    ),
    Mutation(
        "key-used-in-part",
        "32 bytes are read, two of them used",
        (Edit(NOISE, "ChaCha20(os.urandom(32),", "ChaCha20(os.urandom(32)[:2] + bytes(30),"),),
        (f"{_REPLAY}::test_every_draw_reads_a_key_of_32_bytes",),
    ),
    Mutation(
        "key-drawn-at-import",
        "one key for all releases of a process, and of its forks: their noise is the same",
        (
            Edit(NOISE, "MARGIN = 2.0**-40\n", "MARGIN = 2.0**-40\n_KEY = os.urandom(32)\n"),
            Edit(NOISE, "ChaCha20(os.urandom(32),", "ChaCha20(_KEY,"),
        ),
        (f"{_REPLAY}::test_every_draw_reads_a_key_of_32_bytes",),
    ),
    Mutation(
        "key-kept-for-the-process",
        "one stream for all releases of a process: that of its forks is the same",
        (
            Edit(
                NOISE,
                "words = words or operating_system_words()",
                'words = words or globals().setdefault("_KEPT", operating_system_words())',
            ),
        ),
        (f"{_REPLAY}::test_every_draw_reads_a_key_of_32_bytes",),
    ),
    Mutation(
        "words-used-again",
        "rounds of one size read the same words: their noise is the same",
        (
            Edit(
                NOISE,
                "    def words(n: int)",
                "    memory: dict[int, bytes] = {}\n\n    def words(n: int)",
            ),
            Edit(
                NOISE,
                "cipher.update(bytes(8 * n))",
                "memory.setdefault(n, cipher.update(bytes(8 * n)))",
            ),
        ),
        (f"{_REPLAY}::test_no_word_is_used_twice",),
    ),
    Mutation(
        "margin-too-narrow",
        "decisions that double precision cannot make are made in it",
        (Edit(NOISE, "MARGIN = 2.0**-40", "MARGIN = 2.0**-60"),),
        (f"{_REPLAY}::test_decisions_next_to_the_threshold",),
    ),
    Mutation(
        "unsure-decisions-in-double",
        "proposals within the margin are taken without a look",
        (Edit(NOISE, "p * (1.0 - margin)", "p * (1.0 + margin)"),),
        (f"{_REPLAY}::test_decisions_next_to_the_threshold",),
    ),
    Mutation(
        "small-uniforms-in-double",
        "U below 2^-23 is compared by the 64 bits that are known of it",
        (Edit(NOISE, "_TINY = 2.0**-23", "_TINY = 0.0"),),
        ("tests/privacy/test_noise.py::test_small_uniforms_are_decided_exactly",),
    ),
    Mutation(
        "acceptance-constant-too-small",
        "the probability of acceptance passes 1, where the law is cut off",
        (Edit(NOISE, "for v in range(64)) + 1e-9", "for v in range(64)) - 1e-3"),),
        (
            f"{_REPLAY}::test_the_acceptance_never_passes_one_and_wastes_nothing",
            f"{_REPLAY}::test_decisions_next_to_the_threshold",
        ),
    ),
    Mutation(
        "acceptance-constant-of-no-tail",
        "the constant is that of V = 0: the tails of the noise are too light",
        (Edit(NOISE, "for v in range(64)) + 1e-9", "for v in range(1)) + 1e-9"),),
        (
            f"{_REPLAY}::test_the_acceptance_never_passes_one_and_wastes_nothing",
            f"{_REPLAY}::test_decisions_next_to_the_threshold",
        ),
    ),
    Mutation(
        "logarithm-off",
        "ln 2 is off by 1e-3: V has another law",
        (Edit(NOISE, "_LN2 = math.log(2.0)", "_LN2 = 0.6938"),),
        (
            f"{_REPLAY}::test_the_acceptance_never_passes_one_and_wastes_nothing",
            f"{_REPLAY}::test_decisions_next_to_the_threshold",
        ),
    ),
    Mutation(
        "sampler-sd-small",
        "the sampler's sd is 0.1 % too small",
        (
            Edit(
                NOISE,
                "words = words or operating_system_words()",
                "words, sd = words or operating_system_words(), sd * 0.999",
            ),
        ),
        (f"{_REPLAY}::test_decisions_next_to_the_threshold",),
    ),
    Mutation(
        "sampler-sd-small-in-double",
        "it is so where decisions are made in double precision",
        (Edit(NOISE, "tau = math.ldexp(1.0, m) / sd", "tau = math.ldexp(1.0, m) / sd * 1.001"),),
        (f"{_REPLAY}::test_decisions_next_to_the_threshold",),
    ),
    Mutation(
        "sampler-sd-small-in-exact-path",
        "it is so where decisions are made by intervals",
        (Edit(NOISE, "(u_in + v) / iv.mpf(sd)", "(u_in + v) / iv.mpf(sd * 0.999)"),),
        (f"{_REPLAY}::test_decisions_next_to_the_threshold",),
    ),
    Mutation(
        "uncertain-is-accepted",
        "the cell that holds p is accepted without further bits",
        (Edit(NOISE, "if w_in.b <= p.a:", "if w_in.a <= p.b:"),),
        (f"{_REPLAY}::test_the_cell_that_holds_p_is_decided_by_further_bits",),
    ),
    Mutation(
        "further-bits-are-zero",
        "U goes on with zeros where further bits are needed",
        (
            Edit(
                NOISE,
                "w, w_bits = (w << 64) | int(words(1)[0]), w_bits + 64",
                "w, w_bits = (w << 64) | int(words(1)[0]) * 0, w_bits + 64",
            ),
        ),
        (f"{_REPLAY}::test_the_cell_that_holds_p_is_decided_by_further_bits",),
    ),
    Mutation(
        "further-bits-of-u-are-zero",
        "so it is with u: |X| is a little too small where it decides",
        (
            Edit(
                NOISE,
                "u, u_bits = (u << 64) | int(words(1)[0]), u_bits + 64",
                "u, u_bits = (u << 64) | int(words(1)[0]) * 0, u_bits + 64",
            ),
        ),
        (f"{_REPLAY}::test_the_cell_that_holds_p_is_decided_by_further_bits",),
    ),
    Mutation(
        "unsure-are-refused",
        "proposals within the margin are refused without a look",
        (Edit(NOISE, "(w <= p * (1.0 + margin))", "(w <= p * (1.0 - margin))"),),
        (f"{_REPLAY}::test_decisions_next_to_the_threshold",),
    ),
    Mutation(
        "no-sign",
        "noise is never negative",
        (
            Edit(
                NOISE,
                "np.where(negative, -magnitude, magnitude)",
                "np.where(negative, magnitude, magnitude)",
            ),
        ),
        (
            f"{_REPLAY}::test_decisions_next_to_the_threshold",
            f"{_REPLAY}::test_a_recorded_stream_is_read_as_the_law_says",
        ),
    ),
    Mutation(
        "v-off-by-one",
        "V is taken for one more than the zeros of its word",
        (Edit(NOISE, "[1].astype(np.int64) - 1", "[1].astype(np.int64)"),),
        (
            f"{_REPLAY}::test_decisions_next_to_the_threshold",
            f"{_REPLAY}::test_a_recorded_stream_is_read_as_the_law_says",
        ),
    ),
    Mutation(
        "sd-too-large-for-the-words",
        "above 2^60 the integers have fewer random bits than digits",
        (Edit(NOISE, "SD_MAX = 2.0**60", "SD_MAX = 2.0**62"),),
        ("tests/privacy/test_noise.py::test_refuses_sd",),
    ),
    Mutation(
        "margin-not-checked",
        "a margin of 0 is taken: decisions in double precision alone",
        (Edit(NOISE, "if margin < MARGIN:", "if False:"),),
        ("tests/privacy/test_noise.py::test_refuses_a_smaller_margin",),
    ),
    Mutation(
        "rounded-down",
        "|X| is rounded toward zero",
        (Edit(NOISE, "((half_bits + 1) >> 1)", "(half_bits >> 1)"),),
        (
            f"{_REPLAY}::test_decisions_next_to_the_threshold",
            f"{_REPLAY}::test_a_recorded_stream_is_read_as_the_law_says",
        ),
    ),
    Mutation(
        "low-bits-missing",
        "u has 62 bits: half of every interval is never drawn",
        (Edit(NOISE, "u63 = bits >> np.uint64(1)", "u63 = bits >> np.uint64(2)"),),
        (
            f"{_REPLAY}::test_decisions_next_to_the_threshold",
            f"{_REPLAY}::test_a_recorded_stream_is_read_as_the_law_says",
        ),
    ),
    Mutation(
        "one-word-for-two-uniforms",
        "the uniform that decides is the one that was proposed",
        (
            Edit(
                NOISE, "uniform.astype(np.float64) * 2.0**-64", "bits.astype(np.float64) * 2.0**-64"
            ),
        ),
        (
            f"{_REPLAY}::test_decisions_next_to_the_threshold",
            f"{_REPLAY}::test_a_recorded_stream_is_read_as_the_law_says",
        ),
    ),
    Mutation(
        "sign-of-another-word",
        "the sign follows from V",
        (Edit(NOISE, "negative = (bits & np.uint64(1))", "negative = (geometric & np.uint64(1))"),),
        (
            f"{_REPLAY}::test_decisions_next_to_the_threshold",
            f"{_REPLAY}::test_a_recorded_stream_is_read_as_the_law_says",
        ),
    ),
    Mutation(
        "tail-begins-again",
        "a zero word, of probability 2^-64, leaves V = 0",
        (Edit(NOISE, "v[i] = 64\n", "v[i] = 0\n"),),
        ("tests/privacy/test_noise.py::test_zero_words_extend_the_geometric",),
    ),
    Mutation(
        "tail-cut-off",
        "further zero words add nothing to V",
        (Edit(NOISE, "v[i] += 64\n", "pass\n"),),
        ("tests/privacy/test_noise.py::test_zero_words_extend_the_geometric",),
    ),
    Mutation(
        "tail-ends-early",
        "the zeros of the last word add nothing to V",
        (Edit(NOISE, "v[i] += (word & -word).bit_length() - 1", "pass"),),
        ("tests/privacy/test_noise.py::test_zero_words_extend_the_geometric",),
    ),
    # ------------------------------------------------------------------------- what is noised
    Mutation(
        "one-draw-for-every-piece",
        "the pieces of a long vector get the same noise: their differences have none",
        (
            Edit(
                NOISING,
                "    result = torch.empty(whole.shape, dtype=dtype)\n",
                f"    {_SHARED_DRAW}\n    result = torch.empty(whole.shape, dtype=dtype)\n",
            ),
        ),
        (f"{_NOISING}::test_a_vector_of_several_pieces_has_a_draw_for_every_number",),
    ),
    Mutation(
        "one-draw-for-the-classes-products",
        "the products of all classes get the same noise: their differences have none",
        (
            Edit(
                NOISING,
                "    rows, columns = torch.triu_indices(d, d, 1)\n",
                f"    {_SHARED_DRAW}\n    rows, columns = torch.triu_indices(d, d, 1)\n",
            ),
        ),
        (f"{_NOISING}::test_every_released_number_has_a_draw_of_its_own",),
    ),
    Mutation(
        "noise-a-little-small",
        "the sd of what is added is 0.1 % below the declared one",
        (Edit(NOISING, "sampler(values.numel(), sd)", "sampler(values.numel(), sd * 0.999)"),),
        (
            f"{_NOISING}::test_every_released_number_has_a_draw_of_its_own",
            f"{_NOISING}::test_a_vector_of_several_pieces_has_a_draw_for_every_number",
            f"{_NOISING}::test_the_sampler_is_asked_for_the_declared_sd_of_every_block",
        ),
    ),
    Mutation(
        "sd-a-little-small",
        "the declared sd is 0.1 % below what the calibration asks for",
        (
            Edit(
                MECHANISM,
                _SD,
                f"{_SD} * 0.999",
            ),
        ),
        (f"{_NOISING}::test_the_sampler_is_asked_for_the_declared_sd_of_every_block",),
    ),
    Mutation(
        "noise-scaled-by-the-weight",
        "a block of small weight gets that much less noise",
        (
            Edit(
                NOISING,
                _OF_PART,
                "_noised(sums, sd * part.block.bound / 2**30, sampler, part.unit)",
            ),
        ),
        (f"{_NOISING}::test_every_released_number_has_a_draw_of_its_own",),
    ),
    Mutation(
        "counts-half-the-noise",
        "the counts get half the sd",
        (
            Edit(
                NOISING,
                "_noised(raw.counts, sd, sampler,",
                "_noised(raw.counts, sd / 2, sampler,",
            ),
        ),
        (f"{_NOISING}::test_every_released_number_has_a_draw_of_its_own",),
    ),
    Mutation(
        "squares-not-noised",
        "the diagonal of the products is released as it is",
        (
            Edit(
                NOISING,
                "with_noise(square.diagonal().clone(), sd, sampler, unit)",
                "square.diagonal() * unit",
            ),
        ),
        (f"{_NOISING}::test_every_released_number_has_a_draw_of_its_own",),
    ),
    Mutation(
        "products-above-not-noised",
        "what is above the diagonal is released as it is",
        (
            Edit(
                NOISING,
                "with_noise(square[rows, columns], sd / math.sqrt(2), sampler, unit)",
                "square[rows, columns] * unit",
            ),
        ),
        (f"{_NOISING}::test_every_released_number_has_a_draw_of_its_own",),
    ),
    Mutation(
        "products-below-not-noised",
        "what is below the diagonal is released as it is",
        (
            Edit(
                NOISING,
                "out[rows, columns] = out[columns, rows] = above",
                "out[rows, columns], out[columns, rows] = above, square[rows, columns] * unit",
            ),
        ),
        (f"{_NOISING}::test_every_released_number_has_a_draw_of_its_own",),
    ),
    Mutation(
        "products-below-noised-again",
        "what is below the diagonal has noise of its own: the mean of both has too little",
        (
            Edit(
                NOISING,
                "out[rows, columns] = out[columns, rows] = above",
                "out[rows, columns], out[columns, rows] = above, with_noise("
                "square[rows, columns], sd / math.sqrt(2), sampler, unit)",
            ),
        ),
        (f"{_NOISING}::test_every_released_number_has_a_draw_of_its_own",),
    ),
    Mutation(
        "unit-forgotten",
        "what is released is in grid units of another bound than its block's",
        (
            Edit(
                BLOCKS, "return self.bound.clip / self.block.bound", "return self.bound.clip / GRID"
            ),
        ),
        (f"{_NOISING}::test_every_released_number_has_a_draw_of_its_own",),
    ),
    Mutation(
        "shares-not-shifted",
        "a release that goes on takes the groups of its first images for those of the rest",
        (
            Edit(
                COLLECTING,
                "(spent.numbers.start + done) * layout.batch_size",
                "(spent.numbers.start + done - spent.done) * layout.batch_size",
            ),
        ),
        ("tests/privacy/test_partial.py::test_it_goes_on_with_the_shares_of_its_own_images",),
    ),
    # ------------------------------------------------------------------------- from step to step
    Mutation(
        "raw-sums-are-sealed",
        "what is sealed is the first block as it was before its noise",
        (
            Edit(
                MECHANISM,
                "        noised = noise(raw, layout.blocks, scale.sd, sampler)\n",
                "        kept = raw.parts[0]._sums.clone() * layout.blocks.parts[0].unit\n"
                "        noised = noise(raw, layout.blocks, scale.sd, sampler)\n"
                '        noised.arrays["sums"][0].copy_(kept)\n',
            ),
        ),
        (
            "tests/privacy/test_release.py::test_every_block_has_noise_of_its_own",
            _DECLARED_SD,
        ),
    ),
    Mutation(
        "counts-of-the-sums-are-sealed",
        "the divisors are the exact class counts, though noised ones were made",
        (
            Edit(
                MECHANISM,
                "        noised = noise(raw, layout.blocks, scale.sd, sampler)\n",
                "        kept = None if raw.counts is None else raw.counts._sums[:, 0].clone()\n"
                "        noised = noise(raw, layout.blocks, scale.sd, sampler)\n"
                "        if kept is not None:\n"
                "            noised.counts.copy_(kept / layout.blocks.counts.bound)\n",
            ),
        ),
        ("tests/privacy/test_release.py::test_every_block_has_noise_of_its_own", _ADD_REMOVE),
    ),
    Mutation(
        "collected-before-the-spend",
        "images are read when the ledger has not yet got the release",
        (
            Edit(
                SPENDING,
                "    if book is not None and asked:\n",
                "    next(iter(images.batches(layout.batch_size)))\n"
                "    if book is not None and asked:\n",
            ),
        ),
        ("tests/privacy/test_ledger.py::test_a_crash_after_the_spend_leaves_it_counted",),
    ),
    Mutation(
        "calibrated-for-other-blocks",
        "the noise is made for the first block alone, and all of them are released",
        (
            Edit(
                MECHANISM,
                "scale = _calibrated(level, adjacency, layout.blocks)",
                "scale = _calibrated("
                "level, adjacency, Blocks(layout.blocks.parts[:1], None, layout.blocks.classes))",
            ),
        ),
        ("tests/privacy/test_release.py::test_a_release_passes_its_own_check",),
    ),
    # ------------------------------------------------------------------------- several processes
    Mutation(
        "noise-before-the-reduction",
        "every rank noises its own sums: as much noise as there are ranks, drawn in all of them",
        (
            Edit(
                MECHANISM,
                "    collect(opened, layout, raw, spent, ranks, progress=shown)\n",
                "    drawn = insecure_test_noise or rounded_gaussian\n"
                "    ranks.reduce = lambda v: Ranks.reduce(ranks, v + torch.from_numpy("
                "drawn(v.numel(), scale.sd)).view_as(v))\n"
                "    collect(opened, layout, raw, spent, ranks, progress=shown)\n",
            ),
            Edit(
                MECHANISM,
                "sampler = insecure_test_noise or rounded_gaussian",
                "sampler = lambda n, sd: torch.zeros(n, dtype=torch.int64).numpy()",
            ),
        ),
        (f"{_RANKS}::test_the_integers_are_those_of_one_process[2]",),
    ),
    Mutation(
        "noise-in-every-rank",
        "every rank draws noise for the same sums: the noises of several releases can be averaged",
        (
            Edit(MECHANISM, "if ranks.rank:\n            return", "if False:\n            return"),
            Edit(SUMS, "        if ranks.rank:\n", "        if False:\n"),
        ),
        (
            f"{_RANKS}::test_the_integers_are_those_of_one_process[2]",
            f"{_RANKS}::test_only_the_first_rank_keeps_sums",
        ),
    ),
    Mutation(
        "spend-in-every-rank",
        "every rank books the one release",
        (Edit(MECHANISM, "ledger is None or ranks.rank else", "ledger is None else"),),
        (f"{_RANKS}::test_one_spend_and_what_is_refused_everywhere",),
    ),
    Mutation(
        "ranks-not-compared",
        "ranks with other data, encoders or arguments add up their sums under rank 0's claim",
        (Edit(SPENDING, "ranks.agree(", "ranks.gather("),),
        (f"{_RANKS}::test_one_spend_and_what_is_refused_everywhere",),
    ),
    Mutation(
        "every-rank-reads-everything",
        "each image is summed as often as there are ranks: the sensitivity is that many times more",
        (
            Edit(
                SPENDING,
                "ranks.shard(images.num_batches(layout.batch_size))",
                "range(images.num_batches(layout.batch_size))",
            ),
        ),
        (f"{_RANKS}::test_the_integers_are_those_of_one_process[2]",),
    ),
    # ------------------------------------------------------------------------- bound, certificate
    Mutation(
        "no-bound",
        "features are not clipped; the certificate drops what is too long, so privacy holds but "
        "the release is of nothing",
        (Edit(SUMS, _SPHERE, _UNBOUNDED),),
        ("tests/privacy/test_release.py::test_integers_are_the_bounded_features[sphere]", _SUMS_OF),
    ),
    Mutation(
        "no-bound-and-no-certificate",
        "one image moves the sums by as much as its features are long",
        (Edit(SUMS, _SPHERE, _UNBOUNDED), Edit(SUMS, _CERTIFY, _UNCERTIFIED)),
        (
            "tests/privacy/test_release.py::test_no_vector_passes_the_limit",
            f"{_AUDIT}[signed-replace-one]",
        ),
    ),
    Mutation(
        "float-clip-without-certificate",
        "scaled in floating point and rounded to nearest, without guard and without exact check",
        (
            Edit(SUMS, _CERTIFY, _UNCERTIFIED),
            Edit(SUMS, "GUARD = 1.0 - 2.0**-20", "GUARD = 1.0"),
            Edit(SUMS, "g.mul_(rate).trunc_()", "g.mul_(rate).round_()"),
        ),
        ("tests/privacy/test_release.py::test_no_vector_passes_the_limit",),
    ),
    Mutation(
        "certificate-ignores-sign",
        "negative entries enter a block whose sensitivity assumes there are none",
        (Edit(SUMS, "if nonnegative and q.shape[1]:", "if False:"),),
        ("tests/privacy/test_release.py::test_negative_entries_fail_a_nonnegative_block",),
    ),
    Mutation(
        "float-sums",
        "class sums in float32: their last bits depend on the order of the images",
        (
            Edit(
                SUMS, "num_classes, dim, dtype=torch.int64", "num_classes, dim, dtype=torch.float"
            ),
            Edit(SUMS, "q.mul_(within[:, None]))\n", "q.mul_(within[:, None]).float())\n"),
            Edit(SUMS, "valid.to(torch.int64) * taus", "(valid.to(torch.int64) * taus).float()"),
            Edit(SUMS, "self._sums.cpu(), None", "self._sums.cpu().to(torch.int64), None"),
        ),
        ("tests/privacy/test_release.py::test_order_changes_no_bit",),
    ),
    Mutation(
        "square-not-checked",
        "vectors of any length are summed",
        (Edit(SUMS, "within &= square <= limits * limits\n", "pass\n"),),
        (
            f"{_CERTIFICATE}::test_a_vector_of_the_limit_passes_and_one_above_it_does_not",
            f"{_CERTIFICATE}::test_what_is_summed_has_passed",
        ),
    ),
    Mutation(
        "square-checked-loosely",
        "one above the squared limit passes",
        (Edit(SUMS, "square <= limits * limits\n", "square <= limits * limits + 1\n"),),
        (
            f"{_CERTIFICATE}::test_a_vector_of_the_limit_passes_and_one_above_it_does_not",
            f"{_CERTIFICATE}::test_what_is_summed_has_passed",
        ),
    ),
    Mutation(
        "taps-certified-alone",
        "every tap may be as long as the limit",
        (Edit(SUMS, "square += torch.where(", "square = torch.where("),),
        (f"{_CERTIFICATE}::test_a_vector_of_the_limit_passes_and_one_above_it_does_not",),
    ),
    Mutation(
        "one-limit-for-all",
        "an image of a large group may be as long as one that is alone",
        (Edit(SUMS, "square <= limits * limits\n", "square <= limits.max() ** 2\n"),),
        (
            f"{_CERTIFICATE}::test_a_vector_of_the_limit_passes_and_one_above_it_does_not",
            f"{_CERTIFICATE}::test_what_is_summed_has_passed",
        ),
    ),
    Mutation(
        "overflow-not-excluded",
        "squares that are small modulo 2^64 pass",
        (Edit(SUMS, "within &= (q.double() ** 2).sum(dim=1) < 2.0**61", "pass"),),
        (f"{_CERTIFICATE}::test_squares_that_overflow_do_not_pass",),
    ),
    Mutation(
        "sign-of-the-last-tap",
        "a negative entry is forgiven where a later tap has none",
        (
            Edit(
                SUMS,
                "within &= q.amin(dim=1) >= 0",
                "within = (square <= limits * limits) & (q.amin(dim=1) >= 0)",
            ),
        ),
        (f"{_CERTIFICATE}::test_a_negative_entry_of_any_tap_fails_a_nonnegative_block",),
    ),
    Mutation(
        "zero-vectors-pass",
        "what contributes nothing is said to contribute",
        (Edit(SUMS, "    within &= square > 0\n", ""),),
        (f"{_CERTIFICATE}::test_a_vector_of_the_limit_passes_and_one_above_it_does_not",),
    ),
    Mutation(
        "refused-but-not-zeroed",
        "what fails the certificate keeps its numbers",
        (
            Edit(
                SUMS,
                "return [q.mul_(within[:, None]) for q in integers], within",
                "return integers, within",
            ),
        ),
        (f"{_CERTIFICATE}::test_a_vector_of_the_limit_passes_and_one_above_it_does_not",),
    ),
    Mutation(
        "certificate-not-asked",
        "the bounded integers are believed",
        (
            Edit(
                SUMS,
                "return certify(integers, limits, nonnegative=nonnegative)",
                "return integers, limits > 0",
            ),
        ),
        (f"{_CERTIFICATE}::test_what_is_summed_has_passed",),
    ),
    Mutation(
        "products-certified-loosely",
        "the vectors of products may be twice as long, their products four times",
        (Edit(SUMS, ">> _HALF], roots,", ">> _HALF], roots * 2,"),),
        (f"{_CERTIFICATE}::test_the_vectors_of_products_are_certified_to_the_root",),
    ),
    Mutation(
        "root-rounded-up",
        "the square of the bound of a products' vector is above the limit",
        (Edit(SUMS, ".sqrt().to(torch.int64)", ".sqrt().ceil().to(torch.int64)"),),
        (f"{_CERTIFICATE}::test_the_limit_of_a_products_vector",),
    ),
    Mutation(
        "invalid-images-count",
        "an image that could not be decoded contributes what its padding is",
        (Edit(SUMS, "            within &= valid[part]\n", ""),),
        (f"{_CERTIFICATE}::test_every_image_has_its_own_limit_label_and_validity",),
    ),
    Mutation(
        "limits-of-other-images",
        "from the second piece of a batch on, images have the limits of the first",
        (
            Edit(
                SUMS, "vectors, limits[part], bound", "vectors, limits[: len(labels[part])], bound"
            ),
        ),
        (f"{_CERTIFICATE}::test_every_image_has_its_own_limit_label_and_validity",),
    ),
    Mutation(
        "labels-of-other-images",
        "so it is with their labels",
        (
            Edit(
                SUMS,
                "rows_of, target = labels[part], self._sums",
                "rows_of, target = labels[: len(labels[part])], self._sums",
            ),
        ),
        (f"{_CERTIFICATE}::test_every_image_has_its_own_limit_label_and_validity",),
    ),
    Mutation(
        "shared-taps-of-the-first-moment",
        "the shared taps of the second moment are summed by class, over other numbers",
        (
            Edit(
                SUMS,
                "shared = position % len(features) < shared_taps",
                "shared = position < shared_taps",
            ),
        ),
        (f"{_CERTIFICATE}::test_every_image_has_its_own_limit_label_and_validity",),
    ),
    Mutation(
        "columns-that-overlap",
        "the taps of a vector are added into the same columns",
        (Edit(SUMS, "                columns[shared] += q.shape[1]\n", ""),),
        (f"{_CERTIFICATE}::test_every_image_has_its_own_limit_label_and_validity",),
    ),
    Mutation(
        "invalid-images-are-counted",
        "an image that contributes nothing moves the counts",
        (Edit(SUMS, "valid.to(torch.int64) * taus", "taus"),),
        (f"{_CERTIFICATE}::test_counts_are_of_valid_images_in_their_classes",),
    ),
    Mutation(
        "counts-in-one-class",
        "all images are counted in the first class",
        (
            Edit(
                SUMS,
                "self._sums[:, 0].index_add_(0, labels,",
                "self._sums[:, 0].index_add_(0, labels * 0,",
            ),
        ),
        (f"{_CERTIFICATE}::test_counts_are_of_valid_images_in_their_classes",),
    ),
    Mutation(
        "invalid-images-have-products",
        "an image that could not be decoded has products",
        (Edit(SUMS, "q.mul_((within & valid)[:, None])", "q.mul_(within[:, None])"),),
        (
            f"{_CERTIFICATE}::test_products_are_of_valid_images_in_their_classes",
            "tests/privacy/test_products.py::test_sums_are_exact_in_any_batches",
        ),
    ),
    Mutation(
        "products-in-every-class",
        "an image's products are added to those of all classes",
        (Edit(SUMS, "for part in q[labels == k].split(", "for part in q.split("),),
        (
            f"{_CERTIFICATE}::test_products_are_of_valid_images_in_their_classes",
            "tests/privacy/test_products.py::test_classes_have_matrices_of_their_own",
        ),
    ),
    Mutation(
        "products-in-float32",
        "products are summed in float32, which rounds",
        (Edit(SUMS, "valid)[:, None]).double()", "valid)[:, None]).float()"),),
        (
            f"{_CERTIFICATE}::test_products_are_summed_where_float64_is_exact",
            "tests/privacy/test_products.py::test_sums_are_exact_in_any_batches",
        ),
    ),
    Mutation(
        "too-many-products-at-once",
        "partial sums of products may pass 2^53, where float64 rounds",
        (Edit(SUMS, "_EXACTLY = 1 << 20", "_EXACTLY = 1 << 30"),),
        (f"{_CERTIFICATE}::test_products_are_summed_where_float64_is_exact",),
    ),
    Mutation(
        "products-not-split",
        "so it is where a batch is not cut",
        (Edit(SUMS, ".split(_EXACTLY)", ".split(1 << 30)"),),
        (f"{_CERTIFICATE}::test_products_are_summed_where_float64_is_exact",),
    ),
    Mutation(
        "shared-row-not-reduced",
        "of the row that all classes share, rank 0 has its own part alone",
        (
            Edit(
                SUMS,
                "ranks.reduce(self._sums), ranks.reduce(self._shared)",
                "ranks.reduce(self._sums), self._shared",
            ),
        ),
        (f"{_RANKS}::test_the_integers_are_those_of_one_process[2]",),
    ),
    # ------------------------------------------------------------------------- sensitivity
    Mutation(
        "second-moment-forgotten",
        "the table counts the first block alone: sqrt(2) too small for two moments",
        (
            Edit(
                SENSITIVITY,
                "square = _sum_of_squares(b.bound for b in blocks)",
                "square = _sum_of_squares(b.bound for b in blocks[:1])",
            ),
        ),
        ("tests/privacy/test_sensitivity.py::test_second_moment_costs_its_share",),
    ),
    Mutation(
        "second-moment-without-noise-for-it",
        "the table is right, but the noise is made for phi1 alone",
        (
            Edit(
                MECHANISM,
                _SD,
                "level.sd_over_sensitivity * sensitivity("
                'adjacency, [b for b in blocks.all() if b.name != "phi2"])',
            ),
        ),
        (
            "tests/privacy/test_release.py::test_a_release_passes_its_own_check",
            "tests/privacy/test_audit.py::test_both_moments[add-remove]",
        ),
    ),
    Mutation(
        "replace-one-taken-as-add-remove",
        "an image exchanged is taken for an image removed: a factor of 2",
        (
            Edit(
                SENSITIVITY,
                'if adjacency in ("add-remove", "zero-out"):',
                'if adjacency in ("add-remove", "zero-out", "replace-one"):',
            ),
        ),
        (
            "tests/privacy/test_release.py::test_sign_of_the_taps_sets_the_sensitivity",
            "tests/privacy/test_release.py::test_replay_neighbours_differ_by_at_most_the_sensitivity"
            "[moments0-small_encoder-replace-one]",
            f"{_AUDIT}[signed-replace-one]",
        ),
    ),
    Mutation(
        "signed-taken-as-nonnegative",
        "the sensitivity of signed taps is that of ReLU outputs: sqrt(2) too small",
        (
            Edit(
                BLOCKS,
                'return cls(sizes, all(tap["sign"] == "nonnegative" for tap in spec["taps"]))',
                "return cls(sizes, True)",
            ),
            Edit(SUMS, "if nonnegative and q.shape[1]:", "if False:"),
        ),
        (
            "tests/privacy/test_release.py::test_sign_of_the_taps_sets_the_sensitivity",
            f"{_AUDIT}[signed-replace-one]",
        ),
    ),
    Mutation(
        "group-not-bounded",
        "every image of a group contributes as if it were alone",
        (
            Edit(
                COLLECTING,
                "int(part.block.bound) // share",
                "int(part.block.bound) // (share * 0 + 1)",
            ),
        ),
        (
            _GROUPS,
            f"{_UNITS}::test_a_group_shares_one_contribution_among_its_images",
        ),
    ),
    Mutation(
        "group-counted-by-its-images",
        "the counts of a group are not bounded",
        (
            Edit(
                COLLECTING,
                "int(blocks.counts.bound) // share",
                "int(blocks.counts.bound) // (share * 0 + 1)",
            ),
        ),
        (f"{_UNITS}::test_a_group_shares_one_contribution_among_its_images",),
    ),
    Mutation(
        "spread-forgotten",
        "shared taps, or groups, are taken for images whose label parts the rows",
        (Edit(BLOCKS, "kind.weight), nonnegative, spread)", "kind.weight), nonnegative, False)"),),
        ("tests/privacy/test_units.py::test_shared_taps_and_counts_move_together",),
    ),
    Mutation(
        "spread-sensitivity-too-small",
        "counts are taken to be free beside sums that several classes share",
        (Edit(SENSITIVITY, "if any(b.spread for b in blocks):", "if False:"),),
        (
            "tests/privacy/test_sensitivity.py::test_units_that_reach_several_rows",
            "tests/privacy/test_units.py::test_shared_taps_and_counts_move_together",
        ),
    ),
    Mutation(
        "shared-row-not-noised",
        "the row that all classes share is released as it is",
        (
            Edit(
                NOISING,
                "for whole in sums.take())",
                "for whole, sampler in zip(sums.take(),"
                " (sampler, lambda n, _: np.zeros(n, np.int64)), strict=True))",
            ),
        ),
        ("tests/privacy/test_units.py::test_shared_rows_get_noise_of_their_own",),
    ),
    Mutation(
        "sign-not-checked-by-the-encoder",
        "a tap with negative values may be declared non-negative",
        (Edit(ENCODER, 'if signs[name] == "nonnegative" and', "if False and"),),
        ("tests/train/test_encoders.py::test_refuses_own_backbone_that_breaks_a_promise",),
    ),
    # ------------------------------------------------------------------------- what leaves
    Mutation(
        "n-in-the-metadata",
        "under add-remove the exact number of images stands in the file",
        (
            Edit(
                OPENING,
                "num_units=num_units if public_n else None",
                "num_units=num_units",
            ),
        ),
        (_ADD_REMOVE,),
    ),
    Mutation(
        "group-sizes-in-the-metadata",
        "the number of images stands in the file, though a group may be exchanged for a larger one",
        (
            Edit(
                OPENING,
                "num_units = images.num_images if images.groups is None else",
                "num_units = images.num_images if True else",
            ),
        ),
        ("tests/privacy/test_units.py::test_the_number_of_images_of_a_group_is_private",),
    ),
    Mutation(
        "no-image-raises",
        "an empty data set stops the release under add-remove, one image does not",
        (Edit(OPENING, "allow_empty=not public_n", "allow_empty=False"),),
        ("tests/privacy/test_partial.py::test_no_image_is_released_as_one_is_under_add_remove",),
    ),
    Mutation(
        "partial-sums-open-to-others",
        "raw sums are written where others can read them",
        (Edit(PARTIAL, "or found.st_mode & 0o077 ", ""),),
        ("tests/privacy/test_partial.py::test_a_folder_that_others_can_enter_is_refused",),
    ),
    Mutation(
        "partial-sums-kept",
        "raw sums stay behind when the release is done",
        (Edit(MECHANISM, "    if store is not None:\n        store.delete()\n", ""),),
        ("tests/privacy/test_partial.py::test_it_goes_on_to_the_same_bits",),
    ),
    Mutation(
        "partial-sums-mixed",
        "raw sums of another release are taken up, under this one's claim",
        (Edit(PARTIAL, 'if foot["release"] != self._release:', "if False:"),),
        (
            "tests/privacy/test_partial.py::test_sums_of_another_release_are_not_mixed_in",
            "tests/privacy/test_partial.py::test_other_data_are_not_mixed_in",
        ),
    ),
    Mutation(
        "half-a-batch-kept",
        "an interruption within a batch: its images are summed twice in some blocks",
        (Edit(COLLECTING, "if store is not None and whole:", "if store is not None:"),),
        (
            "tests/privacy/test_partial.py::test_an_interruption_within_a_batch_keeps_whole_batches_only",
        ),
    ),
    Mutation(
        "released-spend-used-again",
        "a second release from the same sums hides behind the ledger's line of the first",
        (
            Edit(
                SPENDING,
                "if book is not None and not (line and book.is_open(line)):",
                "if book is not None and not line:",
            ),
            Edit(
                MECHANISM,
                "    if book is not None and line is not None:",
                "    if book is not None and line is not None and book.is_open(line):",
            ),
        ),
        ("tests/privacy/test_partial.py::test_a_spend_that_was_released_is_not_used_again",),
    ),
    Mutation(
        "progress-under-add-remove",
        "a progress bar counts the batches",
        (
            Edit(
                MECHANISM,
                "shown = progress and public.num_units is not None and opened.sizes is None and ",
                "shown = progress and ",
            ),
        ),
        (_ADD_REMOVE,),
    ),
    Mutation(
        "log-line-under-add-remove",
        "a log record names the number of images",
        (
            Edit(
                MECHANISM,
                "    public = opened.public\n",
                "    public = opened.public\n"
                '    __import__("logging").getLogger("dpmmd").info('
                '"%d", opened.images.num_images)\n',
            ),
        ),
        ("tests/privacy/test_release.py::test_messages_under_add_remove_do_not_depend_on_n",),
    ),
    Mutation(
        "warning-under-add-remove",
        "a warning about delta appears or not by the exact number of images",
        (
            Edit(
                MECHANISM,
                "    if public.num_units is not None:\n"
                "        _warn_delta(delta, public.num_units)",
                "    _warn_delta(delta, opened.images.num_images)",
            ),
        ),
        ("tests/privacy/test_release.py::test_messages_under_add_remove_do_not_depend_on_n",),
    ),
    Mutation(
        "hash-not-checked",
        "the arrays of a file were altered and nobody notices",
        (
            Edit(
                CHECKS,
                "if found != m.array_sha256:",
                "if False:",
            ),
        ),
        ("tests/privacy/test_release.py::test_altered_files_are_refused",),
    ),
    Mutation(
        "metadata-not-checked",
        "the metadata of a file were altered and nobody notices",
        (Edit(FILE, 'if kept.get("sha256") != _text_hash(text):', "if False:"),),
        ("tests/privacy/test_release.py::test_altered_metadata_are_refused",),
    ),
    Mutation(
        "epsilon-not-checked",
        "a file may claim a smaller epsilon than its noise gives",
        (
            Edit(CHECKS, '("mu", calibrate(epsilon=m.epsilon, delta=m.delta).mu, GUESS),', ""),
            Edit(CHECKS, "> allowed:", "> 1:"),
        ),
        (f"{_CLAIM}[change0]",),
    ),
    Mutation(
        "noise-not-checked",
        "a file may claim other noise than its mu needs",
        (
            Edit(CHECKS, '("sd", m.sensitivity / m.mu, _CLOSE),', ""),
            Edit(CHECKS, '("noise_sd", m.sd / GRID * m.clip, _CLOSE),', ""),
        ),
        (f"{_CLAIM}[change2]",),
    ),
    Mutation(
        "adjacency-not-checked",
        "a file may claim another adjacency, or another sensitivity, than its blocks have",
        (Edit(CHECKS, '("sensitivity", m.sensitivity_under(m.adjacency), _CLOSE),', ""),),
        (f"{_CLAIM}[change3]",),
    ),
    Mutation(
        "test-noise-not-stamped",
        "a release with test noise passes for a private one",
        (
            Edit(
                MECHANISM,
                "        private=private,\n        adjacency",
                "        private=True,\n        adjacency",
            ),
        ),
        ("tests/privacy/test_release.py::test_test_noise_is_stamped",),
    ),
    Mutation(
        "stamp-lost-in-the-checkpoint",
        "the checkpoint of a release stamped NOT PRIVATE says that it is private",
        (
            Edit(
                CHECKPOINT,
                '"private": _Field(lambda task, _: task.release.metadata.private)',
                '"private": _Field(lambda task, _: True)',
            ),
        ),
        ("tests/train/test_train.py::test_the_stamp_is_carried_on",),
    ),
    Mutation(
        "stamp-lost-on-loading",
        "a generator loaded from such a checkpoint says that it is private",
        (Edit(CHECKPOINT, 'bool(state["private"]),', "True,"),),
        ("tests/train/test_train.py::test_the_stamp_is_carried_on",),
    ),
    Mutation(
        "budget-checked-after-reading",
        "private images are read before the budget is asked",
        (
            Edit(
                SPENDING,
                "    asked: dict[str, Any] = {}\n",
                "    next(iter(images.batches(layout.batch_size)))\n"
                "    asked: dict[str, Any] = {}\n",
            ),
        ),
        (
            "tests/privacy/test_ledger.py::test_over_the_budget_no_image_is_read_and_nothing_is_written",
        ),
    ),
    # ------------------------------------------------------------------------- accounting, ledger
    Mutation(
        "epsilon-rounded-down",
        "the epsilon that is printed is below the true one",
        (
            Edit(
                ACCOUNTING,
                "def calibrate(*,",
                "_up = epsilon\n\n\ndef epsilon(*, mu, delta):\n"
                "    return _up(mu=mu, delta=delta) * (1 - 1e-8)\n\n\ndef calibrate(*,",
            ),
        ),
        ("tests/privacy/test_accounting.py::test_epsilon_is_tight_and_on_the_safe_side",),
    ),
    Mutation(
        "delta-rounded-down",
        "the delta that is printed is below the true one",
        (
            Edit(
                ACCOUNTING,
                "def epsilon(*,",
                "_up = delta\n\n\ndef delta(*, mu, epsilon):\n"
                "    return _up(mu=mu, epsilon=epsilon) * (1 - 1e-8)\n\n\ndef epsilon(*,",
            ),
        ),
        ("tests/privacy/test_accounting.py::test_delta_against_mpmath",),
    ),
    Mutation(
        "calibration-rounded-down",
        "the noise is a little less than epsilon and delta need",
        (
            Edit(
                ACCOUNTING,
                "def compose(",
                "_up = calibrate\n\n\ndef calibrate(*, epsilon, delta):\n"
                "    sd = _up(epsilon=epsilon, delta=delta).sd_over_sensitivity * (1 - 1e-8)\n"
                "    return Calibration(sd, 1 / sd)\n\n\ndef compose(",
            ),
        ),
        ("tests/privacy/test_accounting.py::test_calibration_is_tight_and_on_the_safe_side",),
    ),
    Mutation(
        "ledger-without-fsync",
        "a power cut after the release undoes its spend",
        (Edit(LEDGER, "os.fsync(file.fileno())", "pass"),),
        ("tests/privacy/test_ledger.py::test_every_line_is_on_disk_before_anything_goes_on",),
    ),
    Mutation(
        "ledger-name-without-fsync",
        "so it is with the name of a new ledger",
        (Edit(LEDGER, "os.fsync(directory)", "pass"),),
        ("tests/privacy/test_ledger.py::test_every_line_is_on_disk_before_anything_goes_on",),
    ),
    # ------------------------------------------------------------------------- single images
    Mutation(
        "encoder-in-train-mode",
        "batch norm uses the statistics of the batch: one image changes every image's features",
        (
            Edit(ENCODER, "return super().train(False)", "return super().train(mode)"),
            Edit(ENCODER, "if any(module.training for module in", "if False and any(m for m in"),
        ),
        ("tests/train/test_encoders.py::test_own_backbone",),
    ),
    Mutation(
        "counts-of-contributing-images-only",
        "whether an image is zero in one block moves the counts while its label stays",
        (
            Edit(
                COLLECTING,
                "raw.counts.add_counts(rows.cells, valid, ",
                "raw.counts.add_counts(rows.cells, valid"
                " & features[blocks.parts[-1].kind.encoder][0].any(1), ",
            ),
        ),
        (
            "tests/privacy/test_release.py"
            "::test_an_image_that_is_zero_in_one_block_alone_keeps_to_the_sensitivity",
        ),
    ),
    Mutation(
        "batch-statistics-accepted",
        "a backbone that normalises over its batch is not refused",
        (
            Edit(
                ENCODER,
                "for name, one, two in zip(self._names, first, second, strict=True):",
                "for name, one, two in zip((), (), (), strict=True):",
            ),
        ),
        ("tests/train/test_encoders.py::test_refuses_own_backbone_that_breaks_a_promise",),
    ),
    Mutation(
        "undecodable-image-raises",
        "one damaged file stops the release, and its neighbour does not",
        (
            Edit(
                ITEMS,
                "except BaseException as error:\n                if",
                "except ImportError as error:\n                if",
            ),
        ),
        (f"{_UNDECODABLE}[True-noise-folder]",),
    ),
    Mutation(
        "undecodable-image-is-logged",
        "one damaged file is named in a message",
        (
            Edit(
                ITEMS,
                "except BaseException as error:\n                if",
                'except BaseException as error:\n                print("image", index)\n'
                "                if",
            ),
        ),
        (f"{_UNDECODABLE}[True-noise-folder]",),
    ),
    Mutation(
        "undecodable-image-is-skipped",
        "one damaged file makes its batch shorter",
        (
            Edit(
                ITEMS,
                "return images, labels, valid\n",
                "return images[valid], labels[valid], valid[valid]\n",
            ),
        ),
        (f"{_UNDECODABLE}[True-noise-folder]",),
    ),
    Mutation(
        "bad-pixels-reach-the-encoder",
        "an image with a NaN raises in the encoder, which its neighbour does not",
        (
            Edit(
                COLLECTING,
                "valid = valid & ((pixels >= 0) & (pixels <= 1))",
                "valid & (pixels > 0)",
            ),
        ),
        (f"{_BAD}[nan-replace-one]",),
    ),
    Mutation(
        "nan-poisons-the-loss",
        "an image with zero or non-finite features turns the mean embedding into NaN",
        (
            Edit(
                "dpmmd/_cores/plain.py",
                "usable = torch.isfinite(squares) & (squares > 0)",
                "usable = torch.ones_like(squares, dtype=torch.bool)",
            ),
        ),
        ("tests/core/test_functional.py::test_unusable_rows_are_zero_and_harm_nobody",),
    ),
    Mutation(
        "nan-poisons-the-sums",
        "non-finite features become integers that no check stops",
        (
            Edit(
                SUMS,
                "usable = (largest >= 2.0**-1000) & (largest <= 2.0**1000)",
                "usable = torch.ones_like(largest, dtype=torch.bool)",
            ),
            Edit(SUMS, _CERTIFY, _UNCERTIFIED),
        ),
        ("tests/privacy/test_release.py::test_no_vector_passes_the_limit",),
    ),
    Mutation(
        "pixel-range-not-checked",
        "images in 0..255 or -1..1 pass for images in 0..1: real and generated ones need not match",
        (Edit(ENCODER, "elif not bool(inside):", "elif False:"),),
        ("tests/train/test_encoders.py::test_refuses_bad_images",),
    ),
    # ------------------------------------------------------------------------- one record, once
    Mutation(
        "one-stream-for-all-records",
        "random augmentation reads one stream: one record less re-draws all later ones",
        (
            Edit(
                DATASET,
                "            draws.rekey(index)\n            record",
                "            record",
            ),
        ),
        (
            "tests/data/test_draws.py::test_one_record_less_leaves_the_others_as_they_were",
            "tests/data/test_draws.py::test_one_record_exchanged_moves_the_sums_by_its_own_share",
        ),
    ),
    Mutation(
        "one-key-for-all-readings",
        "every reading of a data set draws the same, by a key that anybody can read",
        (Edit(DRAWS, "os.urandom(32) if key is None else key", "bytes(32)"),),
        (
            "tests/data/test_draws.py::test_every_reading_has_keys_of_its_own",
            "tests/data/test_draws.py::test_keys_differ_by_record_stream_and_source",
        ),
    ),
    Mutation(
        "own-generators-not-keyed",
        "a generator that the data set keeps runs on from record to record",
        (Edit(DRAWS, "found.append(value)", "pass"),),
        ("tests/data/test_draws.py::test_one_record_less_leaves_the_others_as_they_were",),
    ),
    Mutation(
        "dependent-items-not-refused",
        "items that keep something between records are released",
        (Edit(DATASET, "if not all(map(_same, first, second)):", "if False:"),),
        ("tests/data/test_draws.py::test_items_that_depend_on_what_was_read_before_are_refused",),
    ),
    Mutation(
        "batches-not-copied",
        "a source that fills one array again is read ahead: some images count twice",
        (
            Edit(
                "dpmmd/data/loader.py",
                "yield Batch(batch.images.clone(), batch.labels.clone(), batch.valid.clone())",
                "yield batch",
            ),
        ),
        ("tests/data/test_draws.py::test_a_source_may_fill_one_array_again_and_again",),
    ),
    Mutation(
        "padding-counted",
        "rows after the last record count as further images",
        (
            Edit(
                COLLECTING,
                "    valid = valid & (torch.arange(size, device=device) < num_images - start)\n",
                "",
            ),
        ),
        ("tests/data/test_draws.py::test_rows_after_the_last_record_are_not_counted",),
    ),
    Mutation(
        "one-record-ends-the-release",
        "an exception of a data set's item ends the release, where its neighbour completes",
        (
            Edit(
                DATASET,
                "except BaseException as error:  # of any kind",
                "except OSError as error:  # of any kind",
            ),
        ),
        (
            "tests/data/test_data.py::test_no_exception_of_one_record_ends_the_reading[SystemError-0]",
        ),
    ),
    Mutation(
        "nothing-usable-is-released",
        "a data set of which nothing is usable is spent for",
        (Edit("dpmmd/data/look.py", "    if not found.usable:\n", "    if False:\n"),),
        (
            "tests/data/test_look.py::test_a_normalised_data_set_is_refused",
            "tests/data/test_look.py::test_files_that_only_stand_for_images_are_refused",
        ),
    ),
    Mutation(
        "pixels-not-bounded",
        "a file of a few kilobytes asks for gigabytes",
        (Edit(PIXELS, "if image.size[0] * image.size[1] > MAX_PIXELS:", "if False:"),),
        ("tests/data/test_data.py::test_an_image_of_too_many_pixels_is_not_decoded",),
    ),
    Mutation(
        "any-file-is-opened",
        "a FIFO among the images hangs the release",
        (Edit(PIXELS, "if not stat.S_ISREG(os.fstat(descriptor).st_mode):", "if False:"),),
        ("tests/data/test_pixels.py::test_what_is_no_regular_file_is_not_waited_for",),
    ),
    Mutation(
        "a-file-counts-by-its-name",
        "a second name of a file is a second record",
        (
            Edit(
                "dpmmd/data/once.py",
                "    if status.st_ino:\n        return status.st_dev, status.st_ino\n",
                "",
            ),
            Edit("dpmmd/data/once.py", "return os.path.realpath(path)", "return os.fspath(path)"),
        ),
        ("tests/data/test_containers.py::test_a_second_name_of_a_file_counts_once",),
    ),
)


class Broken(Exception):
    """The harness itself cannot do what it should."""


def copy_tree(folder: Path) -> None:
    """The package and the tests, without compiled files."""
    for name in ("dpmmd", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)


def apply(folder: Path, edits: Sequence[Edit]) -> dict[Path, str]:
    """Makes the edits; returns the files as they were."""
    before: dict[Path, str] = {}
    for edit in edits:
        path = folder / edit.file
        text = path.read_text()
        before.setdefault(path, text)
        if text.count(edit.old) != 1:
            raise Broken(f"{edit.file}: has {text.count(edit.old)} times, not once:\n{edit.old}")
        path.write_text(text.replace(edit.old, edit.new))
    return before


def _child(folder: str, tests: list[str], log: str) -> None:
    """Runs in a fork of a process that has imported everything but the package and the tests."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ["DPMMD_BACKEND"] = "torch"  # the definitions; the native core is not copied
    sys.dont_write_bytecode = True
    for name in [m for m in sys.modules if m.split(".")[0] in ("dpmmd", "tests")]:
        del sys.modules[name]
    sys.path[:] = [folder, *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    import pytest

    options = ["-q", "--tb=short", "-rfE", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = pytest.main([*options, "--rootdir", folder, *tests])
    import dpmmd

    if not str(dpmmd.__file__).startswith(folder):
        code = 70
    sys.stdout.flush()
    os._exit(int(code))


@dataclass
class Run:
    """Some tests in a process of its own, on a copy of the tree that nobody else uses meanwhile."""

    name: str
    folder: Path
    tests: Sequence[str]
    edits: Sequence[Edit] = ()
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._before = apply(self.folder, self.edits)
        self._log = self.folder / "log"
        self.process = multiprocessing.get_context("fork").Process(
            target=_child, args=(str(self.folder), list(self.tests), str(self._log))
        )
        self.process.start()

    def overdue(self) -> bool:
        return time.monotonic() - self.started > SECONDS

    def end(self) -> tuple[int, str]:
        """pytest's exit code, 124 if it took too long, and its output; the tree is mended."""
        late = self.process.is_alive()
        if late:
            self.process.kill()
        self.process.join()
        for path, text in self._before.items():
            path.write_text(text)
        return 124 if late else int(self.process.exitcode or 0), self._log.read_text()


def run_all(
    folders: Sequence[Path], jobs: Sequence[tuple[str, Sequence[Edit], Sequence[str]]]
) -> Iterator[tuple[str, int, str]]:
    """Name, exit code and output of every (name, edits, tests), as they end; one in each folder."""
    free, waiting = list(folders), list(reversed(jobs))
    active: list[Run] = []
    try:
        while waiting or active:
            while free and waiting:
                name, edits, tests = waiting.pop()
                active.append(Run(name, free.pop(), tests, edits))
            wait([one.process.sentinel for one in active], timeout=1)
            for one in [r for r in active if not r.process.is_alive() or r.overdue()]:
                active.remove(one)
                code, output = one.end()
                free.append(one.folder)
                yield one.name, code, output
    finally:
        for one in active:
            one.end()


def caught(code: int, output: str, tests: Sequence[str]) -> str | None:
    """None if every named test failed by itself, else what is wrong."""
    if code == 0:
        return "SURVIVED: its tests pass"
    if code != 1:
        return f"pytest ended with {code}:\n{output[-1500:]}"
    if found := re.search(r"\b(NameError|SyntaxError|ImportError|ModuleNotFoundError)\b", output):
        return f"broken by a {found[0]}, not by the fault:\n{output[-1500:]}"
    failed = re.findall(r"^FAILED (\S+::.+?)(?: - .*)?$", output, flags=re.MULTILINE)
    missed = [t for t in tests if not any(f == t or f.startswith(f"{t}[") for f in failed)]
    return f"SURVIVED {', '.join(missed)}" if missed else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutations to run; all if none is given")
    parser.add_argument("--list", action="store_true", help="say what they mean and stop")
    options = parser.parse_args(arguments)
    known = {m.name: m for m in MUTATIONS}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no mutation {unknown[0]!r}; they are {', '.join(known)}")
    chosen = [known[name] for name in options.names] or list(MUTATIONS)
    if options.list:
        for m in chosen:
            print(f"{m.name}: {m.meaning}")
        return 0

    # Imported once, here, and shared by every fork.
    import hypothesis
    import mpmath
    import pydantic
    import safetensors.torch
    import scipy.optimize
    import scipy.special
    import scipy.stats
    import torch
    import typer.testing

    del hypothesis, mpmath, pydantic, safetensors, scipy, typer
    torch.set_num_threads(1)  # threads do not survive a fork
    started, survived = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name).resolve() / str(i) for i in range(_cores())]
        for folder in folders:
            copy_tree(folder)
        tests = sorted({test for m in chosen for test in m.tests})
        parts = [tests[i :: 4 * len(folders)] for i in range(4 * len(folders))]
        for _, code, output in run_all(folders, [("unmutated", (), p) for p in parts if p]):
            if code != 0 or re.search(r"\b\d+ skipped", output):
                print(f"unmutated, the named tests do not pass:\n{output[-6000:]}")
                return 1
        print(f"unmutated: {len(tests)} tests pass", flush=True)
        for which, code, output in run_all(folders, [(m.name, m.edits, m.tests) for m in chosen]):
            fault = caught(code, output, known[which].tests)
            survived += fault is not None
            names = ", ".join(test.removeprefix("tests/") for test in known[which].tests)
            print(f"{which}: {fault or f'caught by {names}'}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{len(chosen) - survived} of {len(chosen)} mutations caught, {seconds:.0f} s")
    return 1 if survived else 0


def _cores() -> int:
    """How many this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
