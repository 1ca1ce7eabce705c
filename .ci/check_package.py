"""Whether a wheel and an sdist hold what they must; every reason on stderr and exit code 1 where they do not.

Usage: python .ci/check_package.py DIRECTORY (with one wheel and one sdist in it)
"""

import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = "llm2slm_export"
# What an sdist is used for: the README's commands, the tests, and the C++ library.
SDIST = (
    "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", f"{PACKAGE}/py.typed", "recipes/", "docs/", "tests/", "cpp/",
    "engines/demo/", "compositions/tatoeba-en-fr/",
)  # fmt: skip
LICENCE_CHARACTERS = 11_000  # of the Apache License 2.0 with its appendix; a header or a stub is far shorter
LICENCE_PHRASES = ("Apache License", "Version 2.0, January 2004", "END OF TERMS AND CONDITIONS", "APPENDIX")


def faults(directory: Path, recipes: set[str]) -> list[str]:
    """What is missing or empty in the one wheel and the one sdist of a directory.

    Args:
        recipes: the names of the recipe files that both must hold.
    """
    wheels, sdists = sorted(directory.glob("*.whl")), sorted(directory.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        return [f"{directory} holds {len(wheels)} wheels and {len(sdists)} sdists; expected one of each"]
    return [*_wheel_faults(wheels[0], recipes), *_sdist_faults(sdists[0], recipes)]


def _wheel_faults(wheel: Path, recipes: set[str]) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licences = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
        text = archive.read(licences[0]).decode() if licences else ""
    expected = [f"{PACKAGE}/py.typed", *(f"{PACKAGE}/recipes/{name}" for name in sorted(recipes))]
    missing = [f"{wheel.name}: {name} is missing" for name in expected if name not in names]
    return [*missing, *_licence_faults(wheel.name, text)]


def _sdist_faults(sdist: Path, recipes: set[str]) -> list[str]:
    root = sdist.name.removesuffix(".tar.gz") + "/"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(root) for name in archive.getnames()}
        licence = archive.extractfile(root + "LICENSE") if "LICENSE" in names else None
        text = licence.read().decode() if licence else ""
    expected = [*SDIST, *(f"recipes/{name}" for name in sorted(recipes))]
    missing = [
        f"{sdist.name}: {wanted} is missing"
        for wanted in expected
        if not any(name == wanted or (wanted.endswith("/") and name.startswith(wanted)) for name in names)
    ]
    return [*missing, *_licence_faults(sdist.name, text)]


def _licence_faults(archive: str, text: str) -> list[str]:
    absent = [phrase for phrase in LICENCE_PHRASES if phrase not in text]
    if len(text) < LICENCE_CHARACTERS or absent:
        return [
            f"{archive}: LICENSE is not the full Apache-2.0 text: {len(text)} characters, without {absent or 'none'}"
        ]
    return []


def main() -> int:
    """Check the directory given on the command line."""
    recipes = {path.name for path in (Path(__file__).parent.parent / "recipes").iterdir()}
    found = faults(Path(sys.argv[1]), recipes)
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
