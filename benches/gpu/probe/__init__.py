"""Where a training step's time goes on a GPU, and what each change to it saves.

``python3 -m benches.gpu --probe`` is one run of less than eight minutes, for a GPU that is lent for
minutes. Each section answers questions that only a device can decide and says in its docstring
which decision it serves; what it found is written as soon as it ends. With ``--device cpu --tiny``
it is a dry run.

The decisions: 1 the precision of generators, 2 which core captured and launched steps take, 3 fused
kernels, the upsampled convolution and torch.compile, 4 Adam and the average of weights, 5 sums,
estimator and dots in one pass, 6 cuDNN's search and the flipped convolution, 7 the host's part of
the loss, 8 graphs in a user's own loop, 9 which operations of which core are kept.

`sizes` says on what it runs, `variants` in which ways a step can be done, `step` builds one.
`rungs` measures variants one at a time. The sections are in `parts`, `ladder`, `cores`, `one_pass`,
`recipe`, `convolutions`, `host`, `compiled` and `profiles`; `answers` makes tables of what they
found, and `program` runs them all.
"""

# In order, with the seconds that each may take: what decides the most comes first. The budget has
# 10 s more, and begins when PyTorch is imported.
SECTIONS = {
    "ceilings": 8.0, "ladder32": 60.0, "ladder128": 60.0, "ladder64": 20.0, "ladder256": 25.0,
    "parts": 35.0, "one_pass": 15.0, "cores": 35.0, "host": 25.0, "recipe": 30.0,
    "convolutions": 35.0, "profile": 25.0, "compiled": 75.0,
}  # fmt: skip
BUDGET = 460.0
