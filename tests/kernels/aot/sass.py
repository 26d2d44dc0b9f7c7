"""Counts the instructions of a GPU kernel's main loop in its disassembly."""

import re
from collections import Counter

# nvdisasm: '/*0a10*/ @!P0 LDG.E.128 R4, [R2] ;'; Mosaic prefixes 'wait:read:write:yield:stall'.
_INSTRUCTION = re.compile(
    r"^\s*(?:\S+:\S+:\S+:\S+:\d+\s+)?/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)"
)
_LABEL = re.compile(r"^\s*(\.L_x_\d+|\.L_\d+):")


def main_loop(text: str) -> Counter:
    """Instructions of the longest innermost loop, by opcode.

    A backward branch over an unconditional end of the kernel is no loop but the retry of a barrier
    wait, which the assembler places behind it.
    """
    code, labels, by_address = [], {}, {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            ends = found[3].startswith(("EXIT", "RET")) and not found[2]
            by_address[int(found[1], 16)] = len(code)
            code.append(("STOP" if ends else found[3], found[4]))
    spans = []
    for here, (opcode, operands) in enumerate(code):
        if not opcode.startswith("BRA"):
            continue
        label = re.search(r"`\((\.L_x?_?\d+)\)", operands)
        address = re.search(r"0x([0-9a-f]+)", operands)
        target = labels.get(label[1]) if label else by_address.get(int(address[1], 16))
        if target is not None and target < here:
            if all(op != "STOP" for op, _ in code[target:here]):
                spans.append((target, here))
    inner = [
        span
        for span in spans
        if not any(
            other != span
            and span[0] <= other[0]
            and other[1] <= span[1]
            and other[1] - other[0] >= 40
            for other in spans
        )
    ]
    first, last = max(inner, key=lambda span: span[1] - span[0])
    return Counter(opcode for opcode, _ in code[first : last + 1])
