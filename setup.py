"""Builds the module dpmmd._native with CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds in build/<name>; the module lands where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        compilers = (
            [os.environ["CXX"].split()[0]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
        )
        if not any(map(shutil.which, compilers)):
            raise SystemExit(
                f"dpmmd: no C++ compiler (looked for {', '.join(compilers)}): install GCC or "
                "Clang, e.g. `apt install g++`, `dnf install gcc-c++` or `xcode-select --install`, "
                "and run the same command again."
            )
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        configure = [
            "cmake",
            "-S", str(ROOT),
            "-B", str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *(f"-D{name}={os.environ[name]}" for name in ("DPMMD_CUDA",) if name in os.environ),
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
        ]  # fmt: skip
        jobs = str(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1)
        for command in (configure, ["cmake", "--build", str(build), "--parallel", jobs]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                sys.stderr.write(done.stdout.decode(errors="replace"))
                raise SystemExit(
                    f"dpmmd: `{' '.join(command[:2])} ...` failed; its output is above."
                )


setup(
    ext_modules=[Extension("dpmmd._native", [])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[*find_packages(include=["dpmmd*"]), "dpmmd.kernels"],
    package_dir={"dpmmd.kernels": "kernels"},
)
