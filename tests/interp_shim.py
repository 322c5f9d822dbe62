"""Make Triton's interpreter honest about bf16.

It keeps bf16 as raw 16-bit integers: a cast from fp32 truncates where a GPU rounds to nearest even, and arithmetic on
bf16 values is silently integer arithmetic. Here the cast rounds, and the arithmetic is an error, as the kernels
have to go to fp32 first.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ARITHMETIC = ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_maxnumf", "create_minnumf")


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """fp32 -> the 16 bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def fp32_values(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    stock_cast = InterpreterBuilder.cast_impl

    def cast(self, source, to):
        if (source.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(bf16_bits(source.data), tl.bfloat16)
        if (source.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle(fp32_values(source.data), tl.float32)
        return stock_cast(self, source, to)

    InterpreterBuilder.cast_impl = cast
    for name in ARITHMETIC:
        if hasattr(InterpreterBuilder, name):
            setattr(InterpreterBuilder, name, _refuse_bf16(name, getattr(InterpreterBuilder, name)))


def _refuse_bf16(name, stock):
    def checked(self, left, *rest, **options):
        if left.dtype.scalar == tl.bfloat16:
            raise TypeError(f"{name} on bf16: cast to fp32 first, the interpreter would add up raw bits")
        return stock(self, left, *rest, **options)

    return checked
