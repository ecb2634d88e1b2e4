"""Kernels compiled for GPUs that are not there, and the machine code of compiled kernels.

Triton brings its own `ptxas` and `cuobjdump`. A process that compiles must not run Triton's interpreter.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    """One line of SASS.

    Attributes:
        address: place in the kernel, in bytes.
        name: name with its modifiers, such as `LDG.E.128`.
        operands: the rest of the line.
    """

    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class MachineCode:
    """What the assembler made of a kernel.

    Attributes:
        registers: registers of a thread.
        stack: stack of a thread, in bytes.
        local: local memory of a thread, in bytes.
        shared: shared memory of a program, in bytes.
        instructions: the code.
    """

    registers: int
    stack: int
    local: int
    shared: int
    instructions: tuple[Instruction, ...]

    def names(self) -> Counter[str]:
        """Return how often each instruction occurs."""
        return Counter(instruction.name for instruction in self.instructions)

    @property
    def spills(self) -> int:
        """Number of instructions that load from local memory or store to it."""
        return sum(count for name, count in self.names().items() if name.startswith(("LDL", "STL")))

    def product_loops(self) -> list[tuple[Instruction, ...]]:
        """Return the bodies of the innermost loops that multiply on tensor cores, in the order of the code.

        A loop is what lies between a branch backwards and its target, both counted; it is innermost if no other lies
        inside.
        """
        backward = [
            (int(target, 16), each.address)
            for each in self.instructions
            if each.name.startswith("BRA") and (target := _target(each)) and int(target, 16) < each.address
        ]
        inner = [
            (first, last)
            for first, last in backward
            if not any(first <= other[0] and other[1] <= last and other != (first, last) for other in backward)
        ]
        bodies = [tuple(i for i in self.instructions if first <= i.address <= last) for first, last in sorted(inner)]
        return [body for body in bodies if any("MMA" in each.name for each in body)]


class StandInDriver:
    """The part of Triton's driver that compiling needs, for a GPU that is not there.

    Args:
        architecture: compute capability of the GPU, 90 for 9.0.
    """

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        """Return a number that no two architectures share, by which Triton keeps what it compiled."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        """Return a stream, on which nothing is launched."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what Triton compiles for."""
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def compiling_for(architecture: int) -> Iterator[None]:
    """Let Triton compile for `sm_<architecture>`, whatever GPU there is, or none."""
    before = driver._active
    driver.set_active(StandInDriver(architecture))
    try:
        yield
    finally:
        driver._active = before


def disassemble(compiled: Any) -> MachineCode:
    """Return the machine code of what Triton compiled."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_dump(option, file.name) for option in ("--dump-resource-usage", "-sass"))
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = tuple(
        Instruction(int(found[1], 16), found[3], found[4].strip()) for found in INSTRUCTION.finditer(code)
    )
    return MachineCode(used["REG"], used["STACK"], used["LOCAL"], compiled.metadata.shared, instructions)


def _dump(option: str, file: str) -> str:
    own = TOOLS / "cuobjdump"
    tool = own if own.exists() else shutil.which("cuobjdump") or own
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def _target(branch: Instruction) -> str | None:
    found = re.search(r"0x([0-9a-f]+)", branch.operands)
    return found[1] if found else None
