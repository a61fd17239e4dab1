"""How far one unit can move the released vector: the L2 sensitivity of its blocks.

The vector that is noised is the concatenation of blocks. Per image i a *sums* block adds one vector
v_i, |v_i| <= c, to the row of i's class; the *counts* block adds tau to the entry of i's class. Two
data sets are neighbours when they differ in one unit: one image (with its label) or one group of
images, such as all of a patient's:

==============================  ===========  ==========  =====================  ====================
one block, bound c (tau)        add-remove   zero-out    replace-one, signed    replace-one, v >= 0
==============================  ===========  ==========  =====================  ====================
class sums (label private too)  c            c           2 c                    sqrt(2) c
counts                          tau          tau         sqrt(2) tau            sqrt(2) tau
==============================  ===========  ==========  =====================  ====================

Proofs. *add-remove*, *zero-out*: the difference of the sums is +-v_i in one row, of norm <= c.
*replace-one*: it is v_i in row y_i minus v'_i in row y'_i. Different classes: disjoint rows, norm
sqrt(|v|^2 + |v'|^2) <= sqrt(2) c. Same class: |v - v'|^2 = |v|^2 + |v'|^2 - 2 <v, v'> <= 4 c^2 in
general (antipodal vectors reach it), and <= 2 c^2 where no entry is negative, since then
<v, v'> >= 0. Counts: e_y - e_y' has norm 0 or sqrt(2). Squares of blocks add.

An image that is not valid (undecodable, a label out of range) adds nothing to any block, counts
included; a valid one is counted whatever its vectors are, zero ones too. Blocks together under
replace-one: either the label stays (signed sums at most 2 c_b each, counts
exactly 0) or it changes (every sums block at most sqrt(2) c_b, counts sqrt(2) tau), hence

    Delta^2 = max( sum_b s_b^2 c_b^2,  2 sum_b c_b^2 + 2 tau^2 )

with s_b^2 = 4 for signed blocks and 2 for non-negative ones.

Counts are therefore free beside signed sums as long as tau^2 <= sum of the signed blocks' c_b^2.
Every entry of this table is reached, and never passed, by exhaustive enumeration in the tests.

*Spread contributions.* A unit may reach several rows: a group of g images, each of which adds at
most c / g (tau / g), or an image whose shallow taps go to a row shared by all classes. What it adds
to a block is still one vector V with |V| <= c (triangle inequality; a split of one vector), and
counts t >= 0 with |t| <= sum t = tau at most. So the rows above stand: |V - V'| <= 2 c, at most
sqrt(2) c where V, V' >= 0, and |t - t'|^2 <= |t|^2 + |t'|^2 <= 2 tau^2. But a new label no longer
means disjoint rows, so the two cases under replace-one are not told apart:

    Delta^2 = sum_b s_b^2 c_b^2 + 2 tau^2        (spread, replace-one)

*Modes.* A public rule may send an image to one of C rows of its class, of K C in all. The row is a
function of the record alone, so that K C rows are K C classes to everything above: read "row" for
"class" and for "label". But a block may stay by class, such as that of pixels. Then replace-one has
a third case: the row changes, while the class stays. Counts move by sqrt(2) tau and blocks by row
by sqrt(2) c_b, and a block by class moves in its one row by s_b c_b, up to 2 c_b. So

    Delta^2 = max( sum_b s_b^2 c_b^2,  sum_by-row 2 c_b^2 + sum_by-class s_b^2 c_b^2 + 2 tau^2 ),

the case of another class being less than the second term, since s_b^2 >= 2. Blocks by class are
declared spread beside modes, and Delta^2 = sum_b s_b^2 c_b^2 + 2 tau^2 is counted. That is the
second term where no block by row is signed, and never less than the maximum. With a signed one it
is more by at most 2 tau^2, a quarter of a percent of Delta at the usual weights, which saves a case
in the code and a field in the file.

*Products.* An image may add q q' of an integer vector q to the matrix of its class, or to one for
all classes (spread), with its numbers above the diagonal times sqrt(2) and those below left out. So
its inner product with another is that of the matrices, <q, r>^2 >= 0 or (in two classes) 0, and its
norm |q|^2 <= c. This is a block whose vectors have no negative inner products, like those without
negative entries: sqrt(2) c. Those of a group, c / g each, add up to a V of norm c at most, and
<V, V'> >= 0 is a sum of such squares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

ADJACENCIES = ("replace-one", "zero-out", "add-remove")


@dataclass(frozen=True)
class Block:
    """One block of the released vector.

    Attributes:
        name: what it holds, e.g. ``"phi1"``.
        kind: ``"sums"`` (one bounded vector an image, summed per class) or ``"counts"``.
        bound: L2 norm of one image's contribution, in any unit shared by all blocks: c or tau.
        nonnegative: no two contributions have an inner product < 0: no entry is (sums of post-ReLU
            features), or they are products.
        spread: one unit's contribution may lie in several rows, or in a row that stays the same
            while the counts move (a group, shared taps, products, blocks by class beside modes).
    """

    name: str
    kind: str
    bound: float
    nonnegative: bool = False
    spread: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("sums", "counts"):
            raise ValueError(f"kind={self.kind!r}: expected 'sums' or 'counts'.")
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"bound={self.bound!r} of block {self.name!r}: expected a number > 0.")


def check_adjacency(adjacency: str) -> str:
    """Returns ``adjacency`` or raises a ValueError that lists the three relations."""
    if adjacency not in ADJACENCIES:
        raise ValueError(
            f"adjacency={adjacency!r}: expected one of {', '.join(map(repr, ADJACENCIES))}. "
            "It says which data sets must look alike: 'replace-one' (one image exchanged, N "
            "public), 'zero-out' (one image replaced by one that contributes nothing, N public), "
            "'add-remove' (one image more or less, N private)."
        )
    return adjacency


def sensitivity(adjacency: str, blocks: Sequence[Block]) -> float:
    """L2 sensitivity Delta of the concatenated blocks, in the unit of their bounds.

    Args:
        adjacency: ``"replace-one"``, ``"zero-out"`` or ``"add-remove"``.
        blocks: the blocks of one release; at most one of kind ``"counts"``.

    Returns:
        Delta, the proof is in this module's docstring: the least double that is not below it.

    Raises:
        ValueError: unknown adjacency, no block, or two blocks of counts.
    """
    check_adjacency(adjacency)
    if not blocks:
        raise ValueError("blocks=[]: expected at least one block.")
    sums = [b for b in blocks if b.kind == "sums"]
    counts = [b for b in blocks if b.kind == "counts"]
    if len(counts) > 1:
        raise ValueError(f"blocks: {len(counts)} of kind 'counts', expected at most one.")
    if adjacency in ("add-remove", "zero-out"):
        square = _sum_of_squares(b.bound for b in blocks)
    else:
        same_label = sum(
            ((2 if b.nonnegative else 4) * Fraction(b.bound) ** 2 for b in sums), Fraction(0)
        )
        new_label = 2 * _sum_of_squares(b.bound for b in blocks)
        if any(b.spread for b in blocks):
            square = same_label + 2 * _sum_of_squares(b.bound for b in counts)
        else:
            square = max(same_label, new_label)
    root = math.sqrt(square) * (1 - 1e-15)
    while Fraction(root) ** 2 < square:
        root = math.nextafter(root, math.inf)
    return root


def _sum_of_squares(values: Iterable[float]) -> Fraction:
    """Exactly: a double is a fraction."""
    return sum((Fraction(v) ** 2 for v in values), Fraction(0))


def optimal_weights(
    adjacency: str, blocks: Mapping[str, tuple[int, bool]], *, importance: Mapping[str, float]
) -> dict[str, float]:
    """Weights that make the importance-weighted noise energy of blocks of sums least.

    A block of size D_b (numbers) and weight w_b gets noise of energy proportional to
    D_b Delta^2 / w_b^2, where Delta^2 = sum_b s_b^2 w_b^2 (s_b as in this module's table). By
    Cauchy-Schwarz the sum of lambda_b D_b Delta^2 / w_b^2 is least at
    w_b^2 proportional to sqrt(lambda_b D_b) / s_b. Minor for blocks that are alike; it matters
    where a small block (a selection embedding) stands beside a large one.

    Args:
        adjacency: as in `sensitivity`.
        blocks: name -> (size, non-negative).
        importance: name -> lambda_b > 0, how much its noise matters per unit of energy.

    Returns:
        name -> weight in (0, 1], the largest 1; for ``dpmmd.release(weights=...)``.

    Raises:
        ValueError: unknown adjacency, no block, a name without importance, or one that is not > 0.
    """
    check_adjacency(adjacency)
    if not blocks or set(blocks) != set(importance):
        raise ValueError(
            f"importance: has {sorted(importance)}, expected a number for each of {sorted(blocks)}."
        )
    squares = {}
    for name, (size, nonnegative) in blocks.items():
        if not (size > 0 and importance[name] > 0):
            raise ValueError(f"{name!r}: size and importance must be > 0.")
        factor = (2.0 if nonnegative else 4.0) if adjacency == "replace-one" else 1.0
        squares[name] = math.sqrt(importance[name] * size / factor)
    largest = max(squares.values())
    return {name: math.sqrt(square / largest) for name, square in squares.items()}
