"""Download the Linux kernel's documentation as Debian packages it, and write its English texts as records.

usage: python -m benchmarks.fetch_text --output runs/linux_text.jsonl

The text is 25 MB, under the GNU General Public License, version 2, unless a file says otherwise; the
package's `copyright` is written beside the records. It needs apt and dpkg, but no rights of an administrator.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import trainings
from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import UserError

ENDINGS = (".rst", ".txt", ".rst.gz", ".txt.gz")


def documents(folder: Path) -> list[tuple[str]]:
    """Return the English texts of the documentation, in the order of the hashes of their paths.

    Args:
        folder: `Documentation` of the package.
    """
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.name.endswith(ENDINGS)]
    english = [path for path in paths if "translations" not in path.parts]
    english.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    return [(_read(folder / path),) for path in english]


def _read(path: Path) -> str:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return content.decode("utf-8", "replace")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the records and the licence."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--package", default="linux-doc-6.1", help="Debian package (6.1: Debian 12)")
    parser.add_argument("--output", type=Path, required=True, help="jsonl file to write")
    options = parser.parse_args(arguments)
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise UserError(f"{program} is not on this machine: run this on Debian or Ubuntu.")
    with TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["apt-get", "download", options.package], cwd=folder, check=True)
        package = next(folder.glob("*.deb"))
        subprocess.run(["dpkg-deb", "--extract", str(package), str(folder / "files")], check=True)
        texts = folder / "files/usr/share/doc" / options.package
        found = documents(texts / "Documentation")
        if not found:
            raise UserError(f"--package {options.package} holds no documentation: name a linux-doc-VERSION.")
        trainings.write_records(options.output, found, ("text",))
        shutil.copy(texts / "copyright", options.output.with_suffix(".copyright"))
    digest = hashlib.sha256(options.output.read_bytes()).hexdigest()
    print(f"{package.name}: wrote {len(found)} documents to {options.output}, sha256 {digest}")


if __name__ == "__main__":
    run(main)
