"""Build the compiled modules: one kernel source, once per instruction set.

Everything static stands in pyproject.toml; what stands here depends on the compiler and machine.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError


class Variant(NamedTuple):
    """An instruction set the kernels are built for, and how to ask a compiler for it."""

    isa: str
    machines: tuple[str, ...]  # empty: every machine
    gcc_flags: list[str]
    msvc_flags: list[str]
    probe: str  # C++ that compiles only where the compiler knows the instruction set


# "linux-x86_64", "macosx-11.0-arm64", "win-amd64": what is built for, not what it is built on.
MACHINE = sysconfig.get_platform().rsplit("-", 1)[-1]
X86_64 = ("x86_64", "amd64")

# "baseline" is what every CPU of the platform has: SSE2 on x86-64, NEON on aarch64.
VARIANTS = [
    Variant("baseline", (), [], [], "int main() { return 0; }"),
    Variant(
        "avx2",
        X86_64,
        ["-mavx2", "-mfma", "-mf16c"],
        ["/arch:AVX2"],
        "#include <immintrin.h>\n"
        "int main() { return _mm256_extract_epi32(_mm256_abs_epi32(_mm256_set1_epi32(0)), 0); }",
    ),
    Variant(
        "avx512",
        X86_64,
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
        ["/arch:AVX512"],
        "#include <immintrin.h>\n"
        "int main() { return (int)_mm512_reduce_add_pd(_mm512_setzero_pd()); }",
    ),
]

# No flag may let the compiler change a bit: no contraction into fused multiply-adds, no
# reassociation. What errno and the floating-point flags are after a call is nobody's business, and
# only the promise to keep them right stops square roots and conditionals from being vectorised.
GCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
]
MSVC_FLAGS = ["/std:c++17", "/O2", "/fp:precise"]

CPLUSPLUS_PROBE = """
#include <cstdint>
template <class T> constexpr int width() { if constexpr (sizeof(T) == 4) return 16; else return 8; }
int main() { return width<float>() - 16; }
"""

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "freethreading_compatible": True,
}


class BuildExt(build_ext):
    """Probe the compiler, then translate and compile each module in a directory of its own."""

    def run(self) -> None:
        super().run()
        # `python -m fastbn` in the checkout imports the package beside it, not the installed one.
        self.copy_extensions_to_source()

    def build_extensions(self) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        flags = MSVC_FLAGS if msvc else GCC_FLAGS
        if not self._compiles(CPLUSPLUS_PROBE, flags):
            raise PlatformError(
                "fastbn needs a C++17 compiler, and the one found here did not compile a "
                f"ten-line program with {' '.join(flags)}. Install g++ 7 or later "
                "(Debian: apt-get install g++), clang 5 or later (macOS: xcode-select --install), "
                "or Visual Studio 2019 or later, or point CXX at one."
            )
        built = []
        for extension in self.extensions:
            variant = next(v for v in VARIANTS if v.isa == extension.isa)
            own = variant.msvc_flags if msvc else variant.gcc_flags
            if not self._compiles(variant.probe, flags + own):
                print(
                    f"fastbn: the compiler does not know {variant.isa} ({' '.join(own)}); "
                    f"{extension.name} is left out and CPUs with it run a slower variant.",
                    file=sys.stderr,
                )
                continue
            extension.extra_compile_args = flags + own
            if not msvc:
                extension.extra_link_args = ["-pthread"]
            # The same source becomes several modules, so each needs its own generated file.
            directory = str(Path(self.build_temp) / "cython" / variant.isa)
            [translated] = cythonize(
                [extension], build_dir=directory, compiler_directives=DIRECTIVES
            )
            extension.sources = translated.sources
            built.append(extension)
        self.extensions[:] = built
        super().build_extensions()

    def _compiles(self, source: str, flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "probe.cpp"
            path.write_text(source)
            try:
                self.compiler.compile([str(path)], output_dir=directory, extra_postargs=flags)
            except CompileError:
                return False
        return True


def extension(module: str, source: str, variant: Variant = VARIANTS[0]) -> Extension:
    """One compiled module; `isa` tells BuildExt which variant's flags it gets."""
    built = Extension(
        f"fastbn.{module}",
        [f"fastbn/{source}.pyx"],
        language="c++",
        include_dirs=[numpy.get_include(), "fastbn"],
        depends=[
            str(path)
            for pattern in ("*.hpp", "*.pxd", "*.pxi")
            for path in Path("fastbn").glob(pattern)
        ],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
    )
    built.isa = variant.isa
    return built


setup(
    ext_modules=[
        extension("_cpu", "_cpu"),
        extension("_pool", "_pool"),
        extension("_updates", "_updates"),
        extension("functional", "functional"),
        *(
            extension(f"_kernels_{variant.isa}", "_kernels", variant)
            for variant in VARIANTS
            if not variant.machines or MACHINE in variant.machines
        ),
    ],
    cmdclass={"build_ext": BuildExt},
)
