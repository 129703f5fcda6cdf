"""What can be run on the project: `nox --list` tells, `nox -s NAME` runs one of them."""

import os
import shlex
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["tests", "lint"]
nox.options.default_venv_backend = "venv"

PROJECT = nox.project.load_toml("pyproject.toml")
# Tests of what is compiled, and of the threads.
COMPILED = [
    f"tests/test_{name}.py"
    for name in (
        "functional", "kernels", "fused", "groups", "mask", "parts", "short_floats", "layer",
        "memory", "pool", "threads", "optim", "optim_refused", "fuzz", "large",
    )
]  # fmt: skip


def group(name):
    """Return what a dependency group of pyproject.toml lists."""
    return nox.project.dependency_groups(PROJECT, name)


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def tests(session):
    """Install the package and run its tests; arguments go to pytest."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
def oldest(session):
    """Run the tests with the oldest dependencies that pyproject.toml allows at run time."""
    session.install(".[test]")
    session.install("numpy==1.26.0", "scikit-learn==1.4.0", "matplotlib==3.8.0", "scipy==1.11.4")
    session.install("filelock==3.12.0", "safetensors==0.5.0")
    session.install("optuna==4.3.0", "cmaes==0.10.0", "rich==13.0.0", "psycopg[binary]==3.1.18")
    session.install("pyparsing==3.1.0")  # matplotlib 3.8 calls what later ones deprecate
    # Deprecations of old versions are their own affair.
    session.run("pytest", "-W", "default::DeprecationWarning", *session.posargs)


@nox.session
def peers(session):
    """Run the tests with PyTorch, JAX, ONNX and Keras, which the other sessions skip."""
    session.install(".[test]", "torch==2.13.0", "jax", "onnx", "keras")
    names = "torch or jax or onnx or keras"
    session.run("pytest", "-k", names, *session.posargs, env={"KERAS_BACKEND": "torch"})


@nox.session
def lint(session):
    """Check style and types."""
    session.install(".[test]", *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session):
    """Build the pages into docs/_build/html, the gallery's trainings included, and run examples.

    Arguments go to sphinx-build: `nox -s docs -- -D plot_gallery=0` leaves the trainings out.
    """
    session.install(".[io,tune]", *group("docs"))
    for builder in ("html", "doctest"):
        session.run(
            "sphinx-build", "-W", "--keep-going", "-b", builder, "-d", "docs/_build/doctrees",
            *session.posargs, "docs", f"docs/_build/{builder}",
        )  # fmt: skip


def run_sanitized(session, sanitizers, library, tests, **environment):
    """Build the modules with sanitizers (g++, clang++, or what CXX says), and run tests on them."""
    flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all"
    compiler = [*shlex.split(os.environ.get("CXX", "g++")), *flags.split()]
    # In a copy: a Python without the sanitizer cannot load modules built so.
    copy = Path(session.create_tmp(), "copy").resolve()
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".?*", "build", "*.so"))
    session.chdir(copy)
    session.install(".[test]", env={"CXX": shlex.join(compiler), "LDFLAGS": flags})
    # The sanitizer looks for functions of libstdc++ when it is loaded.
    found = [
        session.run(*compiler, f"-print-file-name={name}", external=True, silent=True).strip()
        for name in (library, "libstdc++.so.6")
    ]
    session.run("pytest", *tests, env={"LD_PRELOAD": " ".join(found), **environment})


@nox.session
def asan(session):
    """Run the tests of what is compiled under AddressSanitizer and UndefinedBehaviorSanitizer.

    Arguments go to pytest in the place of these tests.
    """
    run_sanitized(
        session, "address,undefined", "libasan.so", session.posargs or COMPILED,
        # Python frees little at its end. Its own allocator would hide where blocks end.
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1", PYTHONMALLOC="malloc",
        UBSAN_OPTIONS="print_stacktrace=1",
    )  # fmt: skip


@nox.session
def tsan(session):
    """Run the pool, and kernels on it, under ThreadSanitizer; arguments as for `asan`."""
    compiler = [*shlex.split(os.environ.get("CXX", "g++")), "-fsanitize=thread"]
    program = str(Path(session.create_tmp(), "pool_stress").resolve())
    session.run(
        *compiler, "-O1", "-g", "-std=c++17", "-pthread", "-Wall", "-Werror", "-Ifastbn/runtime",
        "tests/pool_stress.cpp", "-o", program,
        external=True,
    )  # fmt: skip
    # "unexpected memory mapping": the sanitizer wants fewer random addresses; `setarch -R nox ...`
    session.run(program, external=True)
    tests = session.posargs or COMPILED
    run_sanitized(session, "thread", "libtsan.so", tests, TSAN_OPTIONS="exitcode=66")


@nox.session
def wheel(session):
    """Build and check what would be published, from a tree without git; run it without compiler."""
    session.install(*group("release"))
    out = Path(session.create_tmp()).resolve()
    shutil.rmtree(out)
    copy = out / "copy"
    shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".?*", "build", "*.so"))
    dist = str(out / "dist")
    session.run("python", "-m", "build", "--outdir", dist, str(copy))  # the wheel from the sdist
    [plain] = (out / "dist").glob("*-linux_*.whl")
    session.run("auditwheel", "repair", "--wheel-dir", dist, str(plain))
    plain.unlink()
    session.run("twine", "check", "--strict", *map(str, (out / "dist").iterdir()))
    [repaired] = (out / "dist").glob("*manylinux*.whl")
    session.run("python", "-m", "venv", str(out / "bare"), external=True)
    bare = {"PATH": str(out / "bare" / "bin"), "CC": "false", "CXX": "false"}
    python = str(out / "bare" / "bin" / "python")
    requirements = [f"fastbn[io] @ {repaired.as_uri()}", "hypothesis>=6.100", "pytest>=8.0"]
    session.run(python, "-m", "pip", "install", "-q", *requirements, env=bare, external=True)
    session.chdir(copy)
    tests = session.posargs or ["tests/test_readme.py", "tests/test_variants.py"]
    session.run(str(out / "bare" / "bin" / "pytest"), *tests, env=bare, external=True)


@nox.session
def bench(session):
    """Run the benchmarks; arguments go to pytest."""
    session.install(".[bench]")
    session.run("pytest", "bench", *session.posargs)
