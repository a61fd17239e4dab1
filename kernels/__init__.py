"""Triton kernels of dpmmd for NVIDIA GPUs: one file an operation, under the names of csrc/cpu/.

- `mean_embedding`: `forward` and `backward`, made of `row_statistics`, `class_sums`, `row_dots` and
  `gradient`;
- `estimator`: the estimators of target - means;
- `bounded_sums`: exact class sums of bounded integer vectors.

Importing a module here needs the package triton and touches no driver; nothing is compiled before
the first launch. Launches never wait for the device, and can be captured in a CUDA graph once a
call with the same shapes has run outside of one.
"""
