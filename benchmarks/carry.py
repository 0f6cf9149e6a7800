"""Carries what the benchmarks need to a machine without network: wheels, images, a teacher, in parts below a size.

    python benchmarks/carry.py pack OUT [--wheels base dali tests] [--images NAME=FOLDER ...] [--teacher FILE]
    python benchmarks/carry.py unpack STORE PART ... [--manifest FILE] [--target FOLDER]

`pack` needs pip, its package index and this package's own environment, which builds DeepSpeed's wheel. It writes
`carry-00.part` and so on, and `manifest.json` with the SHA-256 of each part and of what is in it. torch and torchvision
are never carried: they must be there, with CPython 3.12 on x86_64.

`unpack` needs nothing but Python and pip there. It takes the parts in any order and number, one a call if need be,
moves them into STORE, and installs or lays out what is whole; a part that is damaged or not there yet is named.
Repeating it does no harm. Exit code 0 when everything is there, 1 while something is not.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from importlib import util
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CHUNK = 2**20
WHEELS = {
    "base": (
        *(
            "pydantic",
            "pydantic-core",
            "annotated-types",
            "typing-inspection",
            "typing-extensions",
            "psutil",
            "pyyaml",
        ),
        *(
            "tqdm",
            "safetensors",
            "simplejpeg",
            "rich",
            "markdown-it-py",
            "mdurl",
            "pygments",
            "hjson",
            "py-cpuinfo",
        ),
        *("msgpack", "einops", "ninja", "packaging"),
    ),
    "dali": (
        *("astunparse", "gast", "six", "optree", "nvtx", "makefun", "libcst", "nvidia-nvimgcodec-cu13"),
        *("nvidia-nvjpeg", "nvidia-nvjpeg2k-cu13", "nvidia-nvtiff-cu13", "nvidia-libnvcomp-cu13"),
        "nvidia-dali-cuda130",
    ),
    "tests": (
        *("pytest", "pluggy", "iniconfig", "pytest-timeout", "hypothesis", "sortedcontainers", "filelock"),
        *(
            "scikit-learn",
            "scipy",
            "joblib",
            "narwhals",
            "threadpoolctl",
            "tensorboard",
            "protobuf",
            "absl-py",
        ),
        *("matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pyparsing", "python-dateutil"),
    ),
}
"""What torch, torchvision and timm do not bring along, by what it is for: steps and loaders, DALI's, whole runs and the
tests. Versions are those of constraints.txt."""
BUILT = "deepspeed"
"""Comes as source only, and its wheel suits any Python: part of "base"."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 26, 27, 28)]
PLATFORMS += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]


class CarryError(Exception):
    """What the user can mend, in one line."""


def pinned() -> dict[str, str]:
    """Package to `package==version`."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0].lower(): line.split(" ")[0] for line in lines if "==" in line}


def fetch_wheels(groups: list[str], folder: Path) -> list[Path]:
    """Downloaded for CPython 3.12, the small ones first; DeepSpeed's is built here."""
    versions, found = pinned(), []
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for group in groups:
        place = folder / group
        place.mkdir()
        wanted = [versions.get(name, name) for name in WHEELS[group]]
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        binary = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
        call([*pip, "download", "--no-deps", *binary, *platforms, f"--dest={place}", *wanted])
        if group == "base":
            build = ["--no-deps", "--no-build-isolation", f"--wheel-dir={place}", versions.get(BUILT, BUILT)]
            call([*pip, "wheel", *build])
        found += sorted(place.glob("*.whl"), key=lambda wheel: wheel.stat().st_size)
    return found


def call(command: list[str]) -> None:
    if subprocess.run(command).returncode:
        raise CarryError(f"failed, see above: {' '.join(command)}")


def pack_images(name: str, folder: Path, archive: Path) -> None:
    """An uncompressed archive, the same for the same files: photographs are compressed already."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w", dereference=True) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            tar.add(path, f"{name}/{path.relative_to(folder).as_posix()}", filter=plain)


def chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def digest(path: Path) -> str:
    found = hashlib.sha256()
    for chunk in chunks(path):
        found.update(chunk)
    return found.hexdigest()


def cut(files: Iterable[Path], folder: Path, size: int) -> list[dict[str, object]]:
    """Write the files, one behind the other, as parts of `size` bytes and a last one."""
    parts: list[dict[str, object]] = []
    room, out = 0, None
    for file in files:
        for chunk in chunks(file):
            view = memoryview(chunk)
            while view:
                if room == 0:
                    if out is not None:
                        out.close()
                    parts.append({"name": f"carry-{len(parts):02d}.part"})
                    out, room = (folder / str(parts[-1]["name"])).open("wb"), size
                out.write(view[:room])
                written = min(room, len(view))
                view, room = view[written:], room - written
    if out is not None:
        out.close()
    for part in parts:
        path = folder / str(part["name"])
        part |= {"size": path.stat().st_size, "sha256": digest(path)}
    return parts


def pack(out: Path, files: dict[Path, str], size: int) -> dict[str, object]:
    """Write parts and manifest of files, each with what it is: wheel, images or teacher."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("carry-*.part"):
        old.unlink()
    listed = [
        {"name": file.name, "kind": kind, "size": file.stat().st_size, "sha256": digest(file)}
        for file, kind in files.items()
    ]
    manifest = {"files": listed, "parts": cut(files, out, size)}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


class Store:
    """The folder on the other machine where parts come together.

    Args:
        folder: outside what is carried.
        target: where wheels are installed, for PYTHONPATH.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder, self.target = folder, target
        self.images = folder / "images"
        self._done = folder / "done"
        for place in (folder, target, self.images, self._done):
            place.mkdir(parents=True, exist_ok=True)
        self.manifest: dict[str, list[dict]] = {"files": [], "parts": []}

    def take_manifest(self, given: Path | None) -> None:
        """The one that is given, or the one from before."""
        kept = self.folder / "manifest.json"
        source = given if given is not None and given.exists() else kept
        try:
            text = source.read_text(encoding="utf-8")
            self.manifest = json.loads(text)
            self.manifest["parts"][0]["sha256"], self.manifest["files"][0]["sha256"]
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            raise CarryError(f"{source} is no manifest; give --manifest FILE, as `pack` wrote it") from None
        if kept.exists() and kept.read_text(encoding="utf-8") != text:
            raise CarryError(
                f"{self.folder} holds parts of another manifest; give an empty folder, or empty it"
            )
        write_whole(kept, text)

    def take(self, part: Path) -> str:
        """Move a part here; what is wrong with it, or nothing. Of one that is here already, the other copy goes."""
        known = {one["name"]: one for one in self.manifest["parts"]}
        if part.name not in known:
            return f"{part.name} is not in the manifest"
        if not part.is_file():
            return f"{part} does not exist"
        if part.stat().st_size != known[part.name]["size"] or digest(part) != known[part.name]["sha256"]:
            return f"{part.name} is damaged: carry it again"
        place = self.folder / part.name
        if part.resolve() != place.resolve():
            shutil.move(part, place)
        return ""

    def missing(self) -> list[str]:
        """Names of the parts that are not here whole."""
        return [
            one["name"]
            for one in self.manifest["parts"]
            if not (path := self.folder / one["name"]).is_file() or path.stat().st_size != one["size"]
        ]

    def restore(self) -> list[str]:
        """Install or lay out every file whose parts are all here; what is wrong, a line each."""
        wrong, wheels, start = [], {}, 0
        for file in self.manifest["files"]:
            begin, start = start, start + file["size"]
            marker = self._done / f"{file['name']}.{file['sha256'][:16]}"
            if marker.exists():
                continue
            pieces = self._pieces(begin, start)
            if pieces is None:
                continue
            whole = self.folder / file["name"]
            self._join(pieces, whole)
            if digest(whole) != file["sha256"]:
                wrong.append(
                    f"{file['name']} does not come out whole of {', '.join(p.name for p, *_ in pieces)}"
                )
            elif file["kind"] == "wheel":
                wheels[whole] = marker
            else:
                if file["kind"] == "images":
                    with tarfile.open(whole) as tar:
                        tar.extractall(self.images, filter="data")
                    whole.unlink()
                marker.touch()
        self._install(wheels)
        return wrong

    def _install(self, wheels: dict[Path, Path]) -> None:
        """All in one call: pip takes longer to start than to unpack most of them."""
        if not wheels:
            return
        how = ["--no-index", "--no-deps", "--upgrade", f"--target={self.target}"]
        quiet = ["--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]
        call([sys.executable, "-m", "pip", "install", *quiet, *how, *map(str, wheels)])
        for wheel, marker in wheels.items():
            marker.touch()
            wheel.unlink()

    def _pieces(self, begin: int, end: int) -> list[tuple[Path, int, int]] | None:
        """Part, first byte and length of each piece; None if a part is not here."""
        missing, pieces, start = set(self.missing()), [], 0
        for part in self.manifest["parts"]:
            low, high = max(begin, start), min(end, start + part["size"])
            if low < high:
                if part["name"] in missing:
                    return None
                pieces.append((self.folder / part["name"], low - start, high - low))
            start += part["size"]
        return pieces

    def _join(self, pieces: list[tuple[Path, int, int]], whole: Path) -> None:
        with whole.open("wb") as out:
            for part, first, length in pieces:
                with part.open("rb") as file:
                    file.seek(first)
                    while length:
                        chunk = file.read(min(CHUNK, length))
                        out.write(chunk)
                        length -= len(chunk)


def write_whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def link_kernels(repository: Path = REPOSITORY) -> None:
    """`kdav_fast.kernels` lies at the top of the repository: a link stands in for installing the package."""
    link = repository / "kdav_fast" / "kernels"
    if not link.exists():
        link.symlink_to(os.path.join("..", "kernels"))  # noqa: PTH118  a link's text, not a path


def check_pack(options: argparse.Namespace) -> None:
    """Raise `CarryError` for what cannot be packed, before hundreds of megabytes are fetched."""
    if not options.part_mib >= 1:
        raise CarryError(f"--part-mib is {options.part_mib:g}; give at least 1")
    if options.teacher and not options.teacher.is_file():
        raise CarryError(f"--teacher {options.teacher} is no file; give a file of weights")
    for given in options.images:
        label, _, root = given.partition("=")
        if not label or "/" in label or not root or not Path(root).is_dir():
            raise CarryError(
                f"--images has '{given}'; give NAME=FOLDER, a name without / and a folder that exists"
            )


def run_pack(options: argparse.Namespace) -> None:
    check_pack(options)
    with tempfile.TemporaryDirectory(prefix="carry_") as name:
        folder = Path(name)
        files = dict.fromkeys(fetch_wheels(options.wheels, folder), "wheel")
        if options.teacher:
            files[options.teacher] = "teacher"
        for given in options.images:
            label, _, root = given.partition("=")
            pack_images(label, Path(root), folder / f"{label}.tar")
            files[folder / f"{label}.tar"] = "images"
        # Small wheels come first, so that the first parts serve alone; the hundreds of megabytes of DALI come last.
        files = dict(sorted(files.items(), key=lambda item: item[0].parent.name == "dali"))
        manifest = pack(options.out, files, int(options.part_mib * 2**20))
    for file in manifest["files"]:
        print(f"{file['size'] / 2**20:9.1f} MiB  {file['name']}")
    for part in manifest["parts"]:
        print(f"{part['size'] / 2**20:9.1f} MiB  {part['name']}  {part['sha256']}")


def run_unpack(options: argparse.Namespace) -> bool:
    """Whether everything is there."""
    store = Store(options.store, options.target or options.store / "packages")
    beside = [part.parent / "manifest.json" for part in options.parts]
    store.take_manifest(options.manifest or next((path for path in beside if path.exists()), None))
    wrong = [said for part in options.parts if (said := store.take(part))]
    wrong += store.restore()
    if util.find_spec("kdav_fast") is None or util.find_spec("kdav_fast.kernels") is None:
        link_kernels()
    for line in wrong:
        print(f"carry.py: {line}", file=sys.stderr)
    missing = store.missing()
    print(
        f"not here yet: {', '.join(missing)}"
        if missing
        else f"all {len(store.manifest['parts'])} parts are here"
    )
    print(f"images: {store.images}")
    print(f"export PYTHONPATH={store.target.resolve()}:{REPOSITORY}")
    return not wrong and not missing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack")
    packing.set_defaults(run=run_pack)
    packing.add_argument("out", type=Path, help="folder of the parts")
    packing.add_argument("--wheels", nargs="*", choices=tuple(WHEELS), default=["base", "dali"])
    packing.add_argument("--images", nargs="*", default=[], metavar="NAME=FOLDER")
    packing.add_argument("--teacher", type=Path, help="a file of weights")
    packing.add_argument("--part-mib", type=float, default=55.0, help="size of a part (%(default)s MiB)")
    unpacking = commands.add_parser("unpack")
    unpacking.set_defaults(run=run_unpack)
    unpacking.add_argument("store", type=Path, help="folder outside the repository")
    unpacking.add_argument("parts", type=Path, nargs="*")
    unpacking.add_argument(
        "--manifest", type=Path, help="(manifest.json beside the parts, or the one from before)"
    )
    unpacking.add_argument("--target", type=Path, help="where wheels are installed (STORE/packages)")
    options = parser.parse_args()
    try:
        sys.exit(0 if options.run(options) in (None, True) else 1)
    except CarryError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
