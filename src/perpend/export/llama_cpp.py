"""llama.cpp's own converter and quantiser, where the user has them: found, and called as a person would type it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from perpend.errors import RunFailed, UsageError
from perpend.progress import meter, note

CONVERTER, QUANTISER = "convert_hf_to_gguf.py", "llama-quantize"
TYPES = ("bf16", "f16", "q8_0", "q4_0")
"""The last is made by the quantiser, from bf16."""
PROGRAM = (
    "import ctypes, sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); "
    "p.ftype = getattr(l, 'LLAMA_FTYPE_MOSTLY_' + sys.argv[3].upper()); "
    "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))"
)
"""What `llama-quantize` does, by the library of the package llama-cpp-python."""
_TAIL = 3
_STANDING = re.compile(r"(?P<percent>\d+)%\||^\[ *(?P<done>\d+)/ *(?P<total>\d+)\]")
"""How far it is: the bar of the converter, the count of tensors of the quantiser."""


@dataclass(frozen=True)
class Tools:
    """What of llama.cpp is on this machine.

    Attributes:
        convert: Command line of the converter up to its arguments; empty without one.
        quantise: The same of the quantiser.
    """

    convert: tuple[str, ...]
    quantise: tuple[str, ...]

    @classmethod
    def find(cls, folder: Path | None = None) -> Tools:
        """Look into a folder, then on the PATH; the library of llama-cpp-python also quantises.

        Args:
            folder: A checkout of llama.cpp, built or not.

        Raises:
            UsageError: a folder that holds no converter.
        """
        places = [folder, folder / "build" / "bin", folder / "bin"] if folder else []
        path = os.pathsep.join([*map(str, places), os.environ.get("PATH", "")])
        script = next((p for p in (Path(x) / CONVERTER for x in path.split(os.pathsep) if x) if p.is_file()), None)
        if folder is not None and (script is None or folder not in script.parents):
            raise UsageError(f"no {CONVERTER} in it", where=str(folder), valid="a checkout of llama.cpp")
        binary = shutil.which(QUANTISER, path=path)
        quantise: tuple[str, ...] = (binary,) if binary else ()
        if not binary and importlib.util.find_spec("llama_cpp") is not None:
            quantise = (sys.executable, "-c", PROGRAM)
        return cls((sys.executable, str(script)) if script else (), quantise)

    def commands(self, source: Path, target: Path, kind: str) -> list[list[str]]:
        """Return what makes a GGUF file of a safetensors folder, in order.

        Args:
            source: The folder.
            target: File to make.
            kind: bf16, f16, q8_0 or q4_0.
        """
        convert = [*(self.convert or ("python", CONVERTER)), str(source), "--outfile"]
        if kind in TYPES[:3]:
            return [[*convert, str(target), "--outtype", kind]]
        between = str(target.with_name(f"{target.name}.bf16"))
        quantise = [*(self.quantise or (QUANTISER,)), between, str(target), kind]
        return [[*convert, between, "--outtype", "bf16"], quantise]

    def require(self, source: Path, target: Path, kind: str) -> None:
        """Refuse what cannot be made here.

        Raises:
            UsageError: a tool is not here; says how it is called where it is.
        """
        if self.convert and (self.quantise or kind in TYPES[:3]):
            return
        raise UsageError(
            f"{QUANTISER if self.convert else CONVERTER} is not here",
            where="llama.cpp",
            valid="--llama-cpp DIR with a checkout of it, or --base BASE.gguf",
            hint=" && ".join(map(shown, self.commands(source, target, kind))),
        )


def call(steps: Sequence[Sequence[str]]) -> None:
    """Run commands one after the other, each said before it begins, and tell how far each says that it is.

    Raises:
        RunFailed: one fails; says its last lines.
    """
    for step in steps:
        note(shown(step))
        label = "convert" if CONVERTER in " ".join(step) else "quantise"
        environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
        process = subprocess.Popen(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        with process, ExitStack() as ends:
            ends.callback(process.kill)  # after an interruption it would write on
            last = _followed(process, label)
            process.wait()
        if process.returncode:
            raise RunFailed(f"exit code {process.returncode}: {' / '.join(last)}", where=shown(step))


def _followed(process: subprocess.Popen[bytes], label: str) -> list[str]:
    """Tell what a process says of its progress until it says no more; returns its last lines."""
    last, of, reach = deque[str](maxlen=_TAIL), 0, None
    with ExitStack() as stack:
        stack.enter_context(meter(label, None))
        inner = stack.enter_context(ExitStack())
        for line in _lines(process):
            found = _STANDING.search(line)
            if not found:
                last.append(line)
                continue
            done, total = int(found["percent"] or found["done"]), int(found["total"] or 100)
            if total != of or reach is None:
                inner.close()
                of, reach = total, inner.enter_context(meter(label, total))
            reach(done)
    return list(last)


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield what a process says, a bar that is drawn over again as a line each time."""
    rest, output = b"", process.stdout
    while output and (part := output.read1(1 << 16)):  # type: ignore[attr-defined]
        *whole, rest = re.split(rb"[\r\n]+", rest + part)
        yield from (line.decode(errors="replace").strip() for line in whole if line.strip())
    if rest.strip():
        yield rest.decode(errors="replace").strip()


def shown(step: Sequence[str]) -> str:
    """Return a command as it is typed."""
    return shlex.join(step)
