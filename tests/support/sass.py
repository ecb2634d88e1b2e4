"""Compile Triton kernels for GPUs that are not there, and look at the machine code.

Triton brings its own `ptxas` and `cuobjdump`. Must run in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class MachineCode:
    """What the assembler made of a kernel: registers and bytes a thread, bytes of shared memory a program."""

    registers: int
    stack: int
    local: int
    shared: int
    instructions: tuple[Instruction, ...]

    def names(self) -> Counter[str]:
        """How often each instruction occurs."""
        return Counter(instruction.name for instruction in self.instructions)

    def product_loops(self) -> list[tuple[Instruction, ...]]:
        """Bodies of the innermost loops that multiply on tensor cores, in the order of the code.

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


def compile_kernel(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: int,
    num_warps: int,
    multiples_of_16: tuple[str, ...] = (),
) -> MachineCode:
    """Compile for `sm_<architecture>` with 16-byte aligned pointers; arguments that are neither are int32."""
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name in multiples_of_16
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
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
    return subprocess.run([TOOLS / "cuobjdump", option, file], capture_output=True, text=True, check=True).stdout


def _target(branch: Instruction) -> str | None:
    found = re.search(r"0x([0-9a-f]+)", branch.operands)
    return found[1] if found else None
