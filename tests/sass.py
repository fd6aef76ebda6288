"""What machine code shows that the compiler does not say: registers of wgmma products and of loads that are under way.

A product (HGMMA) reads its A from registers, and sums into others, until the group that it belongs to has been waited
for (WARPGROUP.DEPBAR). The compiler takes registers of A for free as soon as the product is issued, unless the code
keeps them (keep_operands in csrc/common/hopper.cuh), and what it keeps may be a copy.

An arrival at an mbarrier (SYNCS.ARRIVE) waits for no load from shared memory before it: only an instruction that takes
what was loaded does. What TMA then writes in its place such a load would read (Walker::walk in csrc/common).
"""

import re
import subprocess
from pathlib import Path

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(\S+)\s*(.*?)\s*;")
WRITES_NOTHING = ("ST", "RED", "BRA", "SYNCS", "ISETP", "FSETP", "PLOP", "UTMA", "BAR", "NOP", "R2UR", "WARP", "VOTE")


def of_cubin(cuobjdump: Path, cubin: Path) -> str:
    return subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout


def registers(operand: str, count: int) -> set[int]:
    first = re.match(r"R(\d+)", operand)
    return set(range(int(first[1]), int(first[1]) + count)) if first else set()


def width(opcode: str) -> int:
    """Registers that an instruction writes, at least."""
    if ".128" in opcode or "M88.4" in opcode or "MT88.4" in opcode:
        return 4
    return 2 if ".64" in opcode or ".WIDE" in opcode or opcode == "CS2R" else 1


def products_disturbed(sass: str) -> list[tuple[str, str]]:
    """Each instruction that writes what a product under way reads, or touches what it sums into, and that product.

    In the order of the code: branches are not followed, which a loop around products and their wait does not need.
    """
    found = []
    groups: list[list[tuple[str, set[int], set[int]]]] = [[]]  # committed ones, then the one that is being made
    for line in sass.splitlines():
        instruction = INSTRUCTION.match(line)
        if "Function :" in line:
            groups = [[]]
        if not instruction:
            continue
        opcode, operands = instruction[1], [o.strip() for o in instruction[2].split(",")]
        if opcode.startswith("HGMMA"):
            columns = int(re.search(r"64x(\d+)x", opcode)[1])
            groups[-1].append((instruction[0].strip(), registers(operands[1], 4), registers(operands[0], columns // 2)))
            if "gsb0" in operands:
                groups.append([])
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            pending = int(operands[1], 16)
            groups = groups[max(0, len(groups) - 1 - pending) :]
        else:
            touched = {int(r) for r in re.findall(r"\bR(\d+)", instruction[2])}
            written = set() if opcode.startswith(WRITES_NOTHING) else registers(operands[0], width(opcode))
            found += [
                (instruction[0].strip(), product)
                for group in groups
                for product, read, summed in group
                if written & read or touched & summed
            ]
    return found


def loads_left_behind(sass: str) -> list[tuple[str, str]]:
    """Each arrival at an mbarrier before which nothing has taken what a load from shared memory brings, and that load.

    In the order of the code, from one end of a path through it (EXIT, RET, a branch that is always taken) to the next.
    """
    found = []
    coming: dict[int, tuple[str, set[int]]] = {}  # of the first register of a load: the load, all its registers
    for line in sass.splitlines():
        instruction = INSTRUCTION.match(line)
        if "Function :" in line:
            coming = {}
        if not instruction:
            continue
        text, opcode, operands = instruction[0].strip(), instruction[1], [o.strip() for o in instruction[2].split(",")]
        stores = opcode.startswith(("ST", "RED", "ATOM"))
        touched = {int(r) for r in re.findall(r"\bR(\d+)", instruction[2] if stores else ",".join(operands[1:]))}
        if stores:
            touched |= registers(operands[-1], width(opcode))
        if opcode.startswith("HGMMA"):
            touched |= registers(operands[1], 4)
        coming = {first: load for first, load in coming.items() if not load[1] & touched}
        if opcode.startswith("LDS"):
            brought = registers(operands[0], width(opcode))
            coming |= dict.fromkeys(sorted(brought)[:1], (text, brought))
        elif opcode.startswith("SYNCS.ARRIVE"):
            found += [(text, load) for load, _ in coming.values()]
        elif opcode in ("EXIT", "RET") or (opcode == "BRA" and "@" not in text):
            coming = {}
    return found
