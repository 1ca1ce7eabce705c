"""Build the C++ library once for all tests, and talk to its test programs: one JSON object per line in each direction."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm2slm_export.bundle.manifest_file import stamped
from tests.support.paths import REPOSITORY

CPP = REPOSITORY / "cpp"
# As `llm2slm::ErrorCode` and `llm2slm_status`.
USAGE, BUNDLE, PROMPT, ENCODING, RUNTIME, OUT_OF_MEMORY, INTERNAL = range(1, 8)


def ort_headers() -> Path | None:
    """The directory of onnxruntime_c_api.h: of LLM2SLM_ORT_INCLUDE_DIR, of get_ort_headers.sh, or the system's."""
    given = os.environ.get("LLM2SLM_ORT_INCLUDE_DIR")
    places = [Path(given)] if given else [CPP / "build" / "ort" / "include", Path("/usr/include/onnxruntime")]
    for place in places:
        found = next(place.glob("**/onnxruntime_c_api.h"), None)
        if found is not None:
            return found.parent
    return None


def ort_library() -> Path:
    """The shared library in the onnxruntime wheel: the very code that Python's sessions run."""
    import onnxruntime

    return next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))


def build(directory: Path, *options: str, targets: tuple[str, ...] = ()) -> Path:
    """Configure and build the library, reusing an earlier build; skip the test if this machine cannot build it."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    missing = [name for name in ("cmake",) if shutil.which(name) is None]
    missing += [] if compiler else ["a C++ compiler"]
    headers = ort_headers()
    missing += [] if headers else ["ONNX Runtime's headers (run cpp/get_ort_headers.sh)"]
    if missing:
        pytest.skip(f"the C++ library cannot be built: no {', no '.join(missing)}")
    directory.mkdir(parents=True, exist_ok=True)
    # Processes of pytest-xdist share the build.
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(CPP), "-B", str(directory), *generator, f"-DLLM2SLM_ORT_INCLUDE_DIR={headers}"]
        flags = ["-DLLM2SLM_BUILD_TESTS=ON", "-DLLM2SLM_WARNINGS_AS_ERRORS=ON", *options]
        if not (directory / "CMakeCache.txt").is_file():  # what a preset configured stays as it is
            run([*configure, *flags])
        run(
            [
                "cmake",
                "--build",
                str(directory),
                "--parallel",
                "2",
                *(part for t in targets for part in ("--target", t)),
            ]
        )
    return directory


def sanitizers(directory: Path) -> str:
    """The sanitizers that a build directory was configured with; empty if none."""
    lines = (directory / "CMakeCache.txt").read_text(encoding="utf-8").splitlines()
    return next((line.partition("=")[2] for line in lines if line.startswith("LLM2SLM_SANITIZE:")), "")


def sha256_digests(directory: Path, file: Path, piece: int, **environment: str) -> list[tuple[str, str]]:
    """Provider and digest: first of the library's SHA-256, then of its own code.

    Args:
        directory: the build directory.
        file: the hashed file.
        piece: bytes per update.
        environment: variables besides those of this process.
    """
    program = str(directory / "tests" / "llm2slm_sha256")
    lines = run([program, str(file), str(piece)], env=os.environ | environment).splitlines()
    return [(provider, digest) for provider, digest, _ in map(str.split, lines)]


def sha256_provider(directory: Path) -> str:
    """Whose SHA-256 a build uses: `openssl` or `own`."""
    return sha256_digests(directory, Path(os.devnull), 1)[0][0]


def run(command: list[str], **options: Any) -> str:
    """The standard output of a command. If the command fails, the test fails with its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Failure(Exception):
    """An `llm2slm::Error`."""

    def __init__(self, code: int, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


class Program:
    """A running test program. A context manager; it must end well.

    Args:
        path: of the program.
        environment: variables besides those of this process. ONNX Runtime is that of the wheel.
    """

    def __init__(self, path: Path, **environment: str) -> None:
        names = {"LLM2SLM_ORT_LIBRARY": str(ort_library())} | environment
        self._process = subprocess.Popen(
            [path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=os.environ | names
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(self, request: Any) -> Any:
        """Send a request and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the program has ended, with {self._process.wait()}"
        return json.loads(line)

    def __call__(self, do: str, **request: Any) -> Any:
        """Send a request to the driver and return its result.

        Raises:
            Failure: the library's error.
        """
        answer = self.ask({"do": do, **request})
        if "error" in answer:
            raise Failure(answer["code"], answer["error"])
        return answer["result"]

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        code = self._process.wait()
        assert code == 0 or kind is not None, f"the program ended with {code}"


def check_same(expected: Any, got: Any) -> None:
    """Compare responses in everything but times; log-probabilities and scores within float32 rounding."""
    assert [g.text for g in expected] == [g["text"] for g in got]
    assert [list(g.token_ids) for g in expected] == [g["token_ids"] for g in got]
    for name in ("finish_reason", "prompt_tokens", "dropped_tokens", "batch", "sequence"):
        assert [getattr(g, name) for g in expected] == [g[name] for g in got], name
    for ours, theirs in zip(expected, got, strict=True):
        assert (ours.score is None) == (theirs["score"] is None)
        if ours.score is not None:
            assert theirs["score"] == pytest.approx(ours.score, rel=1e-5, abs=1e-5)
        assert theirs["token_logprobs"] == pytest.approx(list(ours.token_logprobs or ()), rel=1e-4, abs=1e-4)


def refusal(driver: Program, do: str, **request: Any) -> Failure:
    """The error of a request, which the driver must refuse."""
    with pytest.raises(Failure) as caught:
        driver(do, **request)
    return caught.value


def evidence_of(failure: Failure) -> list[str]:
    """The lines of evidence of an error."""
    return [line[4:] for line in failure.message.splitlines() if line.startswith("  - ")]


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a bundle's manifest, and its digest with it."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_bytes(stamped(json.dumps(manifest).encode()))
