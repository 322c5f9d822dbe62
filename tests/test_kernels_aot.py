"""The Triton kernels as machine code: compiled for sm_90a (H100, H200) and sm_80 (A100) without a GPU, and counted.

A row kernel must read at the speed of memory. At 1.755 GHz an H200 issues 13.8 instructions while it reads one bf16
logit (27.6 for a pair), so instructions an element, spills and registers decide, and all three are in the machine code.
What it does not tell is the speed itself.

`python tests/test_kernels_aot.py 90 bf16,fp32:bf16 0` prints a line of JSON per configuration (architecture, dtypes,
soft caps). The tests run that in a process of its own, as in theirs the kernels belong to the interpreter.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import pytest

import_error = None
try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:  # no triton: nothing to compile
    import_error = error

pytestmark = pytest.mark.skipif(import_error is not None, reason=f"{import_error}")
FORWARD_POINTERS = {"TARGETS": "*i64", "PARTS": "*fp32"}
BACKWARD_POINTERS = {"TARGETS": "*i64", "FACTORS": "*fp32"}
INTEGERS = dict.fromkeys("stride_x stride_y stride_dx num_rows V tiles".split(), "i32")


# ------------------------------------------------------------------------------------------- compile and count


def compile_kernel(kernel, pointers: dict[str, str], constants: dict, arch: int) -> dict:
    """Compile one configuration as the launcher would, with pointers, strides and sizes divisible by 16."""
    names = kernel.arg_names
    types = pointers | INTEGERS
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    divisible = [name for name in names if name not in constants and name != "tiles"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": 1, "num_stages": 1}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(LDL|STL)\b", code)),
        "fp64": len(re.findall(r"\b(DADD|DMUL|DFMA|DSETP)\b", code)),
        "atomics": len(re.findall(r"\b(ATOM|ATOMG|ATOMS|RED)\b", code)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128", code)),
        "loop": max(loop_lengths(code), default=0),
        "target": re.search(r"\.target (\S+)", binary.asm["ptx"]).group(1),
    }


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name  # they come with the wheel
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def loop_lengths(code: str) -> list[int]:
    """Instructions from the target of every backward branch to the branch: the bodies of the loops."""
    labels, lengths, count = {}, [], 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            count += 1
            jump = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction.group(1))
            if jump and jump.group(1) in labels and count - labels[jump.group(1)] > 2:  # the last one jumps to itself
                lengths.append(count - labels[jump.group(1)])
    return lengths


def measure(arch: int, dtypes: list[str], softcaps: list[float]) -> list[dict]:
    import kernels

    rows = []
    for dtype, softcap, ref in product(dtypes, softcaps, (False, True)):
        constants = {"temperature": 0.7, "softcap": softcap, "BLOCK": kernels.BLOCK}
        read, written = dtype.split(":")[0], dtype.split(":")[-1]  # the head reads fp32 and writes bf16: fp32:bf16
        logits = {"X": f"*{read}", "Y": f"*{read}", "DX": f"*{written}"}
        absent = {} if ref else {"Y": None}
        config = {"dtype": dtype, "softcap": softcap, "ref": ref}
        counts = compile_kernel(kernels._forward_kernel, logits | FORWARD_POINTERS, constants | absent, arch)
        rows.append({"kernel": "forward"} | config | counts)
        counts = compile_kernel(kernels._backward_kernel, logits | BACKWARD_POINTERS, constants | absent, arch)
        rows.append({"kernel": "backward"} | config | counts)
    for row in rows:
        row["per_element"] = round(row["loop"] / 32, 2)  # a lane of the one warp has BLOCK / 32 = 32 elements of a tile
    return rows


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    arch, dtypes, softcaps = sys.argv[1:]
    for row in measure(int(arch), dtypes.split(","), [float(x) for x in softcaps.split(",")]):
        print(json.dumps(row))
    sys.exit()


# ------------------------------------------------------------------------------------------------------- the gates


def counts_of(arch: int, dtypes: str, softcaps: str = "0") -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, __file__, str(arch), dtypes, softcaps]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_common(rows: list[dict], target: str) -> None:
    for row in rows:
        assert row["registers"] <= 168, row  # 12 warps on every multiprocessor
        assert row["spills"] == 0 and row["stack"] == 0, row
        assert row["fp64"] == 0, row  # a Python float taken for a double would cost a factor of 64
        assert row["atomics"] == 0, row  # the sums have one order
        assert row["target"] == target, row


@pytest.fixture(scope="module")
def sm90():
    return counts_of(90, "bf16,fp32:bf16")


def test_sm90_needs_no_spills_no_doubles_no_atomics(sm90):
    assert len(sm90) == 2 * 2 * 2
    check_common(sm90, "sm_90a")


def test_sm90_forward_is_bound_by_memory(sm90):
    for row in (row for row in sm90 if row["kernel"] == "forward"):
        registers, instructions = (128, 19.0) if row["ref"] else (64, 9.5)
        assert row["registers"] <= registers and 4 < row["per_element"] <= instructions, row
        assert row["wide_loads"] > 0, row


def test_sm90_backward_is_bound_by_memory(sm90):
    for row in (row for row in sm90 if row["kernel"] == "backward"):
        assert row["registers"] <= 144 and 4 < row["per_element"] <= (20.0 if row["ref"] else 13.0), row
        assert row["wide_loads"] > 0, row


@pytest.mark.slow
def test_sm80_compiles_within_its_registers():
    check_common(counts_of(80, "bf16"), "sm_80")


@pytest.mark.slow
@pytest.mark.parametrize("arch, target", [(90, "sm_90a"), (80, "sm_80")])
def test_every_dtype_and_softcap(arch, target):
    rows = counts_of(arch, "bf16,fp32,fp16,fp32:bf16", "0,30")
    assert len(rows) == 4 * 2 * 2 * 2
    check_common(rows, target)


def test_loops_are_found_in_machine_code():
    code = """
.L_x_1:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/                   FMUL R1, R1, R2 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/               @P1 BRA `(.L_x_3) ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/                   EXIT ;
.L_x_4:
        /*0070*/                   BRA `(.L_x_4) ;
"""
    assert loop_lengths(code) == [3, 6]
