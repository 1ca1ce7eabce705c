"""Environments, models and what peers convert models to: made once in the work directory, kept while nothing changes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from spec import Peer

import llm2slm_export
from llm2slm_export.files.atomic import cached_file, replaced_directory
from llm2slm_export.files.output_target import Kind

HERE = Path(__file__).parent
_STAMP = "made-of.json"
_MADE = Kind(
    "a directory that the benchmark prepared",
    lambda path: () if (path / _STAMP).is_file() else (f"no {_STAMP} is in it",),
)


class PreparationError(Exception):
    """A peer or model that cannot be had; the message is the reason, one line."""


class Workshop:
    """The work directory: `env/PEER`, `models/MODEL`, `prepared/MODEL/PEER-PRECISION`, `log/`.

    Args:
        threads: of every operator, wherever a library looks for it.
    """

    def __init__(self, work: Path, threads: int, prompt_tokens: int) -> None:
        self.work, self.threads, self._prompt_tokens = work.absolute(), threads, prompt_tokens
        self.log = self.work / "log"
        self.log.mkdir(parents=True, exist_ok=True)

    def variables(self, peer: Peer | None = None) -> dict[str, str]:
        """The environment variables of a peer's worker; None: of what runs in the driver's environment."""
        own = peer is None or not peer.requirements
        kept = {name: value for name, value in os.environ.items() if own or name != "PYTHONPATH"}
        count = str(self.threads)
        pools = {f"{library}_NUM_THREADS": count for library in ("OMP", "MKL", "OPENBLAS")}
        return (
            kept
            | pools
            | {
                "HF_HUB_OFFLINE": "1",
                "ORT_DISABLE_TELEMETRY": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONNOUSERSITE": "1",
            }
        )

    def python(self, peer: Peer) -> Path:
        """The interpreter of a peer's environment, which is made where it is not there or held something else."""
        if not peer.requirements:
            return Path(sys.executable)
        home = self.work / "env" / peer.name
        python, stamp = home / "bin" / "python", home / _STAMP
        wanted = json.dumps([peer.requirements, peer.without])
        if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
            self._run([sys.executable, "-m", "venv", home], f"env-{peer.name}", peer)
            self._run(
                [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", *peer.requirements],
                f"env-{peer.name}",
                peer,
            )
            if peer.without:
                self._run([python, "-m", "pip", "uninstall", "-q", "-y", *peer.without], f"env-{peer.name}", peer)
            with cached_file(stamp) as partial:
                partial.write_text(wanted, encoding="utf-8")
        return python

    def model(self, name: str) -> Path:
        """A model's directory."""
        target = self.work / "models" / name
        script = HERE / "models.py"
        made_of = {"script": _digest([script]), "prompt": str(self._prompt_tokens)}
        if not _is_made_of(target, made_of):
            self._run([sys.executable, script, name, target, str(self._prompt_tokens)], f"model-{name}")
            _stamp(target, made_of)
        return target

    def prepared(self, peer: Peer, precision: str, model: Path) -> Path:
        """What a peer made of a model."""
        name = f"{'encoder-' if peer.encodes else ''}{peer.name}-{precision}"
        target = self.work / "prepared" / model.name / name
        sources = [HERE / "workers" / peer.worker, model / _STAMP]
        if not peer.requirements:
            sources += sorted(Path(llm2slm_export.__file__).parent.rglob("*.py"))
        made_of = {"sources": _digest(sources), "requirements": json.dumps(peer.requirements)}
        if not _is_made_of(target, made_of):
            with replaced_directory(target, _MADE, force=True) as directory:
                self._run(
                    self.command(peer, "prepare", model, directory, precision),
                    f"prepare-{model.name}-{name}",
                    peer,
                )
                _stamp(directory, made_of)
        return target

    def command(self, peer: Peer, what: str, model: Path, prepared: Path, precision: str) -> list[str]:
        """A worker's command line."""
        given = {"model": model, "prepared": prepared, "precision": precision, "threads": self.threads}
        options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
        return [str(self.python(peer)), str(HERE / "workers" / peer.worker), what, *options]

    def _run(self, command: Iterable[str | Path], name: str, peer: Peer | None = None) -> None:
        path = self.log / f"{name}.log"
        print(f"{name} …", file=sys.stderr, flush=True)
        with path.open("w", encoding="utf-8") as log:
            done = subprocess.run(
                [str(part) for part in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.variables(peer),
                check=False,
            )  # fmt: skip
        if done.returncode:
            raise PreparationError(reason(path))


def reason(log: Path) -> str:
    """The line that says why something failed: the last one, or pip's last error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1]


def _digest(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _is_made_of(directory: Path, wanted: Mapping[str, str]) -> bool:
    stamp = directory / _STAMP
    return stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted


def _stamp(directory: Path, made_of: Mapping[str, str]) -> None:
    (directory / _STAMP).write_text(json.dumps(made_of) + "\n", encoding="utf-8")
