"""What products become on processors that this machine isn't: each by its own name, as LLVM schedules for it, so that
it is known to build there and to use the instruction. Whether it is fast there is for a benchmark to say."""

import re

import pytest

from machine_code import machine_code
from paged_kernels.cpu import dot_bf16, dot_int8, fma
from paged_kernels.cpu.passes import emit_pass

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
AMD = [("znver4", X86), ("znver5", X86)]
WITH_16_LANES = ("zmm", 8)
WITH_8_LANES = ("ymm", 4)
NEON = (r"v\d+\.4s", 2)


@pytest.mark.parametrize(
    "cpu, triple, step, instruction, register, rows",
    [
        *((*cpu, dot_bf16.STEP, "vdpbf16ps", *WITH_16_LANES) for cpu in AMD),
        *((*cpu, dot_int8.make_step(8, True, 16), "vpdpbusd", *WITH_16_LANES) for cpu in AMD),
        *((*cpu, dot_int8.make_step(4, True, 16), "vpdpbusd", *WITH_16_LANES) for cpu in AMD),
        ("sierraforest", X86, dot_int8.make_step(8, True, 8), "vpdpbusd", *WITH_8_LANES),
        ("haswell", X86, dot_int8.make_step(8, False, 8), "vpmaddwd", "ymm", 2),
        ("haswell", X86, dot_int8.make_step(4, False, 8), "vpmaddwd", "ymm", 2),
        ("neoverse-n1", ARM, dot_int8.make_step(8, False, 8), "smull2?", *NEON),
        ("apple-m1", ARM, dot_int8.make_step(4, False, 8), "smull2?", *NEON),
    ],
)
def test_the_instruction_is_used_on_whole_registers_once_for_each_sum(cpu, triple, step, instruction, register, rows):
    code = machine_code("", lambda b, args: emit_pass(step, rows, 1, b, args), 11, cpu, triple)
    lines = re.findall(rf"^\s+(?:{{vex}}\s+)?{instruction}\s.*", code, re.MULTILINE)
    parts = {"vpmaddwd": 2, "smull2?": 8}.get(instruction, 1)  # of a vector of bytes that become 16 bits
    assert len(lines) == parts * rows * step.vectors * step.words
    assert all(re.search(register, line) for line in lines)


@pytest.mark.parametrize(
    "cpu, triple, instruction",
    [("znver4", X86, "vfmadd231ps"), ("haswell", X86, "vfmadd231ps"), ("neoverse-n1", ARM, "fmla")],
)
def test_float32_is_multiplied_and_added_at_once(cpu, triple, instruction):
    code = machine_code("", lambda b, args: emit_pass(fma.STEP, 2, 1, b, args), 11, cpu, triple)
    bits = 128 if triple == ARM else 512 if cpu == "znver4" else 256
    registers = max(1, 32 * fma.STEP.lanes // bits)
    assert len(re.findall(rf"\s{instruction}\s", code)) == 2 * fma.STEP.vectors * registers
