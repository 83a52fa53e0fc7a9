"""Let PyPI's CUDA build of torch run on a CPU without CUDA's large libraries, several GB: stand-ins for them.

A stand-in has the name, the versions and the functions that torch's own libraries ask for. CUDA's runtime, which is
small, is the real one: it says that there is no GPU, so that a tensor on the CPU calls none of the others' functions.
"""

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from sysconfig import get_path
from tempfile import TemporaryDirectory

CUDA = re.compile(r"(lib)?(cu(?!da\.so)|nccl|nvrtc|nvshmem)")  # libcuda.so is the driver's, and not asked for at once
ERROR = 35  # cudaErrorInsufficientDriver


def main() -> None:
    packages = Path(get_path("platlib"))
    versions: defaultdict[str, set[str]] = defaultdict(set)  # of each library
    functions: defaultdict[str, set[str]] = defaultdict(set)  # of each version; "" for those without
    for library in packages.glob("torch/lib/*.so"):
        for line in lines_of("readelf", "--dynamic", "--version-info", library):
            if found := re.search(r"\(NEEDED\).*\[(.+)\]|File: (\S+)", line):
                name = found[1] or found[2]
                versions[name].add("")
            elif found := re.search(r"Name: (\S+)", line):
                versions[name].add(found[1])
        for line in lines_of("nm", "--dynamic", "--undefined-only", "--with-symbol-versions", library):
            function, _, version = line.split()[-1].partition("@")
            if CUDA.match(function):
                functions[version].add(function)
    real = {library.name for library in packages.glob("nvidia/*/lib/*")}
    for name in versions.keys() - real:
        if CUDA.match(name):
            build(packages / "torch/lib" / name, {version: functions[version] for version in versions[name]})


def lines_of(*command: str | Path) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def build(library: Path, functions: dict[str, Iterable[str]]) -> None:
    """Compile a shared library with these functions of each version."""
    code = "".join(f"int {name}(void) {{ return {ERROR}; }}\n" for names in functions.values() for name in names)
    named = {version: ";".join([*names, ""]) for version, names in functions.items() if version}
    script = "".join(f"{version} {{ {names} }};\n" for version, names in named.items())
    with TemporaryDirectory() as folder:
        Path(folder, "code.c").write_text(code)
        Path(folder, "versions").write_text(script)
        command = ["cc", "-shared", "-fPIC", "-w", "code.c", f"-Wl,-soname,{library.name}", "-o", str(library)]
        subprocess.run(command + ["-Wl,--version-script=versions"] * bool(script), check=True, cwd=folder)


if __name__ == "__main__":
    main()
