"""What the library does on a GPU: checked against float64 first, then timed, in one run.

``make bench-gpu``, or ``python3 -m benches.gpu --help``. Needs a Python with a PyTorch for CUDA;
installs and downloads nothing. ``--device cpu --tiny`` runs all of it on a CPU, Triton's kernels
through their interpreter: a dry run, whose numbers mean nothing and are stamped so.

`ambient` makes the package importable, `device` is all that touches CUDA, `budget` schedules,
`checks` (of the conformance `suite`) and `sanitizer` look for errors, `measure` times,
`operations`, `steps` and `released` say what is timed, `sweep` searches launch parameters, `report`
makes tables of the results. `probe` is a run of its own, for what only a GPU can decide.
"""
