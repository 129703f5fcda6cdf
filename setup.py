"""Build the compiled modules: each .pyx is one, and kernels.pyx one for each instruction set.

Everything static stands in pyproject.toml; what stands here depends on the compiler and machine.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from threading import Lock
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

# Visual Studio 2019 fuses multiplications and additions, and no flag keeps it from that.
CPLUSPLUS_PROBE = """
#include <cstdint>
#if defined(_MSC_VER) && !defined(__clang__) && _MSC_VER < 1930
#error "too old"
#endif
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


class VariantExtension(Extension):
    """A compiled module, and the instruction set that it is compiled for."""

    variant: Variant


class BuildExt(build_ext):
    """Probe the compiler, then translate and compile each module, several at once."""

    translating = Lock()  # Cython is not made for several threads; compilers run beside it

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self) -> None:
        self.msvc = self.compiler.compiler_type == "msvc"
        self.flags = MSVC_FLAGS if self.msvc else GCC_FLAGS
        if not self.compiles(CPLUSPLUS_PROBE, self.flags):
            raise PlatformError(
                "fastbn needs a C++17 compiler, and the one found here did not compile a "
                f"ten-line program with {' '.join(self.flags)}. Install g++ 7 or later "
                "(Debian: apt-get install g++), clang 5 or later (macOS: xcode-select --install), "
                "or Visual Studio 2022 or later, or point CXX at one."
            )
        self.extensions[:] = [each for each in self.extensions if self.can_compile(each)]
        # The largest first, so that no thread has it alone at the end.
        self.extensions.sort(key=lambda each: each.variant.isa, reverse=True)
        super().build_extensions()

    def build_extension(self, extension: VariantExtension) -> None:
        extension.extra_compile_args = self.flags + self.own_flags(extension.variant)
        if not self.msvc:
            extension.extra_link_args = ["-pthread"]
        # The same source becomes several modules, so each needs its own generated file.
        directory = str(Path(self.build_temp, "cython", extension.name))
        with self.translating:
            [translated] = cythonize(
                [extension], build_dir=directory, compiler_directives=DIRECTIVES
            )
        extension.sources = translated.sources
        super().build_extension(extension)

    def own_flags(self, variant: Variant) -> list[str]:
        return variant.msvc_flags if self.msvc else variant.gcc_flags

    def can_compile(self, extension: VariantExtension) -> bool:
        variant = extension.variant
        flags = self.own_flags(variant)
        known = self.compiles(variant.probe, self.flags + flags)
        if not known:
            print(
                f"fastbn: the compiler does not know {variant.isa} ({' '.join(flags)}); "
                f"{extension.name} is left out and CPUs with it run a slower variant.",
                file=sys.stderr,
            )
        return known

    def compiles(self, source: str, flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "probe.cpp"
            path.write_text(source, encoding="utf-8")
            try:
                self.compiler.compile([str(path)], output_dir=directory, extra_postargs=flags)
            except CompileError:
                return False
        return True


KERNELS = Path("fastbn/kernels/kernels.pyx")
HEADERS = sorted(p for kind in ("hpp", "pxd", "pxi") for p in Path("fastbn").rglob(f"*.{kind}"))


def module(name: str, source: Path, variant: Variant = VARIANTS[0]) -> VariantExtension:
    """Describe one compiled module."""
    extension = VariantExtension(
        name,
        [source.as_posix()],
        language="c++",
        include_dirs=[numpy.get_include(), *sorted({str(path.parent) for path in HEADERS})],
        depends=[str(path) for path in HEADERS],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
    )
    extension.variant = variant
    return extension


options = {}
if "sdist" not in sys.argv:  # `pip install .` shall leave nothing in the source tree
    outside = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, outside, ignore_errors=True)
    options = {"build": {"build_base": outside}, "egg_info": {"egg_base": outside}}

setup(
    ext_modules=[
        *(
            module(".".join(source.with_suffix("").parts), source)
            for source in sorted(Path("fastbn").rglob("*.pyx"))
            if source != KERNELS
        ),
        *(
            module(f"fastbn.kernels.{variant.isa}", KERNELS, variant)
            for variant in VARIANTS
            if not variant.machines or MACHINE in variant.machines
        ),
    ],
    cmdclass={"build_ext": BuildExt},
    options=options,
)
