"""Let PyPI's CUDA build of torch run on a CPU without CUDA's libraries, which are several GB: stand-ins for them.

A stand-in has the name, the versions and the functions that torch's own libraries ask for. Each function returns 35,
``cudaErrorInsufficientDriver``: torch finds no GPU, and a tensor on the CPU calls none of them.
"""

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from sysconfig import get_path
from tempfile import TemporaryDirectory

CUDA = re.compile(r"(lib)?(cu(?!da\.so)|nccl|nvrtc|nvshmem)")  # libcuda.so is the driver's, and not asked for at once


def lines_of(*command: str | Path) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> None:
    folder = Path(get_path("platlib"), "torch", "lib")
    versions: defaultdict[str, set[str]] = defaultdict(set)  # of each library
    functions: defaultdict[str, set[str]] = defaultdict(set)  # of each version; "" for those without
    for library in folder.glob("*.so"):
        for line in lines_of("readelf", "--dynamic", "--version-info", library):
            if found := re.search(r"\(NEEDED\).*\[(.+)\]|File: (\S+)", line):
                name = found[1] or found[2]
                versions[name].add("")
            elif found := re.search(r"Name: (\S+)", line):
                versions[name].add(found[1])
        for line in lines_of("nm", "--dynamic", "--undefined-only", "--with-symbol-versions", library):
            function, _, version = line.split()[-1].partition("@")
            functions[version].add(function)
    for name in filter(CUDA.match, versions):
        # Functions without a version may be in any of the libraries.
        build(folder / name, {version: functions[version] for version in versions[name] if version or "cudart" in name})


def build(library: Path, functions: dict[str, set[str]]) -> None:
    """Compile a shared library with these functions of each version."""
    code, script = "", ""
    for version, names in functions.items():
        of_cuda = sorted(filter(CUDA.match, names))
        code += "".join(f"int {name}(void) {{ return 35; }}\n" for name in of_cuda)
        if version:
            script += f"{version} {{ {''.join(f'{name};' for name in of_cuda)} }};\n"
    with TemporaryDirectory() as folder:
        source, versions = Path(folder, "functions.c"), Path(folder, "versions")
        source.write_text(code)
        versions.write_text(script)
        with_versions = [f"-Wl,--version-script={versions}"] if script else []
        command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", *with_versions]
        subprocess.run([*command, source, "-o", library], check=True)


if __name__ == "__main__":
    main()
