"""Ahead-of-time compilation of the Triton kernels for cards that are not here, and what their machine code consists of.

triton.compile never touches a driver when it is given a target, and the triton wheel holds ptxas and cuobjdump. A
kernel that was decorated under TRITON_INTERPRET=1 stays interpreted for the life of its process, so cases are compiled
in another one:  python -m kernels.aot < cases.json
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

SHARED_BYTES = {80: 166912, 90: 232448}
"""Shared memory that one block may have, by compute capability. Source: CUDA C++ Programming Guide, table 30."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kernel at one tile, for one kind of card."""

    kernel: str
    """module:function."""
    types: Mapping[str, str]
    """Of every argument that is no constant: "*i8", "i32", "fp32", "tensordesc<i8[128,128]>"."""
    constants: Mapping[str, Any]
    """Of every constexpr argument: numbers, booleans, strings, None."""
    aligned: Sequence[str] = ()
    """Pointers and sizes divisible by 16, which the launcher finds out for itself at run time."""
    capability: int = 90
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the launch, such as enable_fp_fusion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCode:
    """What one case compiled to."""

    name: str
    registers: int
    """Of a thread; at most 255."""
    stack_bytes: int
    """Of a thread; above 0, registers spill."""
    shared_bytes: int
    instructions: Mapping[str, int]
    """Opcode, without its modifiers, to how often it stands in the code: IGMMA, HMMA, UTMALDG, LDGSTS, LDL, ..."""

    def faults(self, capability: int, *needed: str) -> list[str]:
        """Return what is wrong with this code: `needed` opcodes that are missing, spills, too much shared memory."""
        missing = [f"no {opcode}" for opcode in needed if not self.instructions.get(opcode)]
        spills = [opcode for opcode in ("LDL", "STL") if self.instructions.get(opcode)]
        spilled = [f"{self.stack_bytes} stack bytes, {spills}"] if spills or self.stack_bytes else []
        too_big = self.shared_bytes > SHARED_BYTES[capability]
        return missing + spilled + ([f"{self.shared_bytes} bytes shared"] if too_big else [])


def compile_cases(cases: Sequence[Case]) -> list[MachineCode]:
    """Return the machine code of each case, compiled in a process of its own. Raises: RuntimeError with its output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.aot"],
        input=json.dumps([asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [MachineCode(**code) for code in json.loads(done.stdout)]


def compile_case(case: Case) -> MachineCode:
    """Return the machine code of `case`, compiled in this process, which must not interpret kernels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(":")
    function = getattr(import_module(module), name)
    arguments: list[str] = function.arg_names
    source = ASTSource(
        function,
        {argument: "constexpr" if argument in case.constants else case.types[argument] for argument in arguments},
        constexprs={(arguments.index(key),): value for key, value in case.constants.items()},
        attrs={(arguments.index(argument),): [["tt.divisibility", 16]] for argument in case.aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.capability, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.MULTILINE))
    return MachineCode(
        name=name,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        instructions=dict(opcodes),
    )


if __name__ == "__main__":
    print(json.dumps([asdict(compile_case(Case(**raw))) for raw in json.load(sys.stdin)]))
