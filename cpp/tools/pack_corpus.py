"""Pack the corpus of a fuzz target. The same files give the same archive.

python tools/pack_corpus.py FOLDER fuzz/corpus/TARGET.tar.xz
"""

import sys
import tarfile
from pathlib import Path


def pack(folder: Path, archive: Path) -> None:
    """Write a folder's files to an archive: sorted by name, without owners and times."""
    with tarfile.open(archive, "w:xz", format=tarfile.USTAR_FORMAT, preset=9) as tar:
        for path in sorted(folder.iterdir()):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(member, file)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: pack_corpus.py FOLDER ARCHIVE")
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
