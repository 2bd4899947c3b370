"""The machine code of kernels for processors that this machine may not have."""

import llvmlite.binding as llvm
from llvmlite import ir


def machine_code(features, emit, num_args, cpu="x86-64-v4", triple="x86_64-unknown-linux-gnu"):
    """Return the machine code, as text, of ``emit(builder, args)`` with ``num_args`` numbers for a processor with these
    features."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module, i64 = ir.Module(), ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * num_args), "kernel")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(builder, list(function.args))
    builder.ret_void()
    target = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return target.emit_assembly(parsed)
