"""Compile every op kernel for Ampere and Hopper without a GPU: it must need no spilled register.

Triton decides on import whether kernels are interpreted, so the compiling is done by this file
run as a script, in a process of its own without TRITON_INTERPRET.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest

from tuneline.kernels.ops import flash

ARCHITECTURES = (80, 90)

# Llama-3.1-8B's sizes unless the name says otherwise: (module, kernel, constants, dtypes of
# pointers that are not bf16, warps). What is no constant, pointer or *eps is an int32.
F32, U8, I32, I64 = "*fp32", "*u8", "*i32", "*i64"
NF4_POINTERS = dict(
    words_ptr=I32, absmax_ptr=U8, code_ptr=F32, nested_absmax_ptr=F32, nested_code_ptr=F32,
    offset_ptr=F32, side_ptr=F32,
)  # fmt: skip
ADAM_POINTERS = dict.fromkeys(
    ["p_ptr", "g_ptr", "m_absmax_ptr", "v_absmax_ptr", "m_code_ptr", "v_code_ptr",
     "m_middles_ptr", "v_middles_ptr", "partial_ptr", "grad_ptr"], F32,
)  # fmt: skip
NORM = dict(K=4096, BLOCK=4096, GEMMA=False)
ROPE = dict(HQ=32, HK=8, D=128, R=128, BLOCK_HQ=32, BLOCK_HK=8, HALF=64, REST=1)
STEP = dict(CLIP=True, PARTIALS=1024, ROWS=8, COLS=256)
GATED = dict(F=14336, BLOCK=1024)
NF4 = dict(K=4096, NESTED=True, BLOCK=1024, SIDE_ROWS=64, SIDE_COLS=64)
ACTIVATION = dict(
    F=14336, R_DOWN=16, R_GATE=16, R_UP=16, RANKS=16, ROWS=1024, BLOCK_ROWS=16, BLOCK_COLS=64,
)  # fmt: skip
FLASH = dict(D=256, WIDTH=256, SHARED=2, WINDOW=0, CAPPED=True)
PACKED = dict(D=128, WIDTH=128, SHARED=4, WINDOW=0, CAPPED=False)
FLASH_POINTERS = dict(lse_ptr=F32, delta_ptr=F32, cu_seqlens_ptr=I32)


def flash_tiles() -> dict[str, tuple[str, str, dict[str, int], dict[str, str], int, int]]:
    """Return the kernels of flash.py with the tiles that it chooses, and their pipeline stages."""
    functions = {
        "forward": ("_fwd_kernel", flash._forward_blocks),
        "dq": ("_dq_kernel", flash._dq_blocks),
        "dk, dv": ("_dkdv_kernel", flash._dkdv_blocks),
    }
    tiles = {}
    for name, (kernel, blocks_of) in functions.items():
        for kind, sizes, is_hopper in (
            ("", FLASH, True), (", not Hopper", FLASH, False), (", packed", PACKED, False),
        ):  # fmt: skip
            blocks = blocks_of(sizes["D"], is_hopper)
            pack = flash._pack(sizes["SHARED"], blocks)
            constants = sizes | dict(ROWS=blocks.rows, KEYS=blocks.keys, PACK=pack)
            tiles[f"flash {name}{kind}"] = (
                *("flash", kernel, constants, FLASH_POINTERS),
                *(blocks.num_warps, blocks.num_stages),
            )
    return tiles


FLASH_TILES = flash_tiles()
ROUTE_POINTERS = dict.fromkeys(
    ["counts_ptr", "starts_ptr", "tile_starts_ptr", "before_ptr", "slot_of_row_ptr",
     "row_of_slot_ptr", "expert_of_tile_ptr"], I32,
)  # fmt: skip
PRODUCT = dict(HAS_BIAS=True, GROUP=16, BM=128, BK=64)


def product_pointers(weight_block: list[int]) -> dict[str, str]:
    """Return the types of the grouped product's descriptors and pointers."""
    descriptors = dict(x_desc="tensordesc<bf16[128, 64]>", w_desc=f"tensordesc<bf16{weight_block}>")
    return ROUTE_POINTERS | descriptors


FP8 = dict(K=4096, NESTED=True)
E4M3 = "*fp8e4nv"
HOPPER_ONLY = {
    "fp8 rows", "fp8 long rows", "fp8 side", "fp8 weight", "fp8 weight transposed",
    "experts, product", "experts, gradient of the product", "flash forward", "flash dq",
    "flash dk, dv",
}  # fmt: skip
# Heads of 256 fill the registers with sums; smaller tiles spill nothing and were measured slower.
SPILLS = {"flash forward": 128, "flash dq": 512, "flash dk, dv": 1024, "flash dk, dv, packed": 256}
SPILLS["experts, outer"] = 64
KERNELS = {
    "nf4": ("nf4", "_fwd_kernel", NF4, NF4_POINTERS, 8),
    "rms_norm forward": (
        "rms_norm", "_fwd_kernel", NORM | dict(HAS_RESIDUAL=True, HAS_SUM=True),
        {"rstd_ptr": F32}, 8,
    ),
    "rms_norm backward": (
        "rms_norm", "_bwd_kernel",
        NORM | dict(ROWS=1, HAS_DRESIDUAL=True, NEED_DWEIGHT=False),
        {"rstd_ptr": F32, "partial_ptr": F32}, 8,
    ),
    "rms_norm backward, weight": (
        "rms_norm", "_bwd_kernel",
        NORM | dict(ROWS=16, HAS_DRESIDUAL=True, NEED_DWEIGHT=True),
        {"rstd_ptr": F32, "partial_ptr": F32}, 8,
    ),
    "rope": ("rope", "_rope_kernel", ROPE | dict(NORM=False, GEMMA=False, BACKWARD=False), {}, 4),
    "rope head norm": (
        "rope", "_rope_kernel", ROPE | dict(NORM=True, GEMMA=False, BACKWARD=False), {}, 4,
    ),
    "rope head norm backward": (
        "rope", "_rope_kernel", ROPE | dict(NORM=True, GEMMA=False, BACKWARD=True), {}, 4,
    ),
    "rope Phi-4, partial": (
        "rope", "_rope_kernel",
        ROPE | dict(HQ=24, R=96, REST=32, NORM=False, GEMMA=False, BACKWARD=False), {}, 4,
    ),
    "swiglu backward": (
        "gated_activation", "_bwd_kernel", GATED | dict(GELU=False, NEED_H=True), {}, 4,
    ),
    "geglu forward": ("gated_activation", "_fwd_kernel", GATED | dict(GELU=True), {}, 4),
    "geglu backward": (
        "gated_activation", "_bwd_kernel", GATED | dict(GELU=True, NEED_H=True), {}, 4,
    ),
    "swiglu backward with LoRA": (
        "activation_lora", "_bwd_kernel", ACTIVATION | dict(GELU=False), {"partial_ptr": F32}, 4,
    ),
    "geglu backward with LoRA": (
        "activation_lora", "_bwd_kernel", ACTIVATION | dict(GELU=True), {"partial_ptr": F32}, 4,
    ),
    **{name: tile[:5] for name, tile in FLASH_TILES.items()},
    "fp8 rows": (
        "fp8", "_rows_kernel", dict(K=4096, P=64, BLOCK=4096),
        dict(out_ptr=E4M3, scale_ptr=F32, peak_ptr=F32, largest_ptr=F32), 2,
    ),
    "fp8 long rows": (
        "fp8", "_rows_kernel", dict(K=28672, P=64, BLOCK=32768),
        dict(out_ptr=E4M3, scale_ptr=F32, peak_ptr=F32, largest_ptr=F32), 8,
    ),
    "fp8 side": (
        "fp8", "_side_kernel", dict(P=64, ROWS=64),
        dict(out_ptr=E4M3, peak_ptr=F32, largest_ptr=F32), 4,
    ),
    "fp8 weight": (
        "fp8", "_weight_kernel", FP8 | dict(BLOCK=512),
        NF4_POINTERS | dict(largest_ptr=F32, out_ptr=E4M3), 4,
    ),
    "fp8 weight transposed": (
        "fp8", "_transposed_kernel", FP8 | dict(ROWS=64, COLS=128),
        NF4_POINTERS | dict(largest_ptr=F32, out_ptr=E4M3), 4,
    ),
    "pack": (
        "lora", "_pack_kernel",
        dict(
            R0=16, R1=16, R2=16, HAS_BIAS0=True, HAS_BIAS1=True, HAS_BIAS2=True, HAS_PEAKS=True,
            P=64, BLOCK=64,
        ),
        dict.fromkeys(
            ["a0_ptr", "a1_ptr", "a2_ptr", "b0_ptr", "b1_ptr", "b2_ptr", "peaks_ptr"], F32
        ), 4,
    ),
    "flatten": (
        "flatten", "_flatten_kernel", dict(BLOCK=2048),
        dict(table_ptr=I64, factor_ptr=F32, tile_ptr=I32, out_ptr=F32), 4,
    ),
    "copy rows": ("copy_rows", "_copy_kernel", dict(K=4096, BLOCK=4096), {}, 8),
    "gather rows": (
        "host_tables", "_gather_kernel", dict(C=4096, BLOCK=4096), {"ids_ptr": I64}, 8,
    ),
    "experts, dequantise": (
        "experts.stack", "_dequantize_kernel", dict(K=2048, NESTED=True, BLOCK=512),
        NF4_POINTERS | dict(starts_ptr=I32), 4,
    ),
    "experts, count": (
        "experts.route", "_count_kernel", dict(E=128, LANES=128, BLOCK=512),
        ROUTE_POINTERS | dict(index_ptr=I64), 4,
    ),
    "experts, scan": (
        "experts.route", "_scan_kernel", dict(E=128, LANES=128, PARTS=128, TILE=128),
        ROUTE_POINTERS, 16,
    ),
    "experts, place": (
        "experts.route", "_place_kernel", dict(E=128, LANES=128, BLOCK=512, STEP=64),
        ROUTE_POINTERS | dict(index_ptr=I64), 4,
    ),
    "experts, product": (
        "experts.gemm", "_mm_kernel", PRODUCT | dict(INS=2064, OUTS=1536, STORED_OI=True, BN=256),
        product_pointers([1, 256, 64]), 8,
    ),
    "experts, product, narrow": (
        "experts.gemm", "_mm_kernel", PRODUCT | dict(INS=2064, OUTS=1536, STORED_OI=True, BN=128),
        product_pointers([1, 128, 64]), 8,
    ),
    "experts, gradient of the product": (
        "experts.gemm", "_mm_kernel", PRODUCT | dict(INS=1552, OUTS=2048, STORED_OI=False, BN=256),
        product_pointers([1, 64, 256]), 8,
    ),
    "experts, gradient of the product, narrow": (
        "experts.gemm", "_mm_kernel", PRODUCT | dict(INS=1552, OUTS=2048, STORED_OI=False, BN=128),
        product_pointers([1, 64, 128]), 8,
    ),
    "experts, project": (
        "experts.skinny", "_project_kernel", dict(INS=2048, R=16, GATHER=True, BM=128, BK=64),
        ROUTE_POINTERS, 4,
    ),
    "experts, outer": (
        "experts.skinny", "_outer_kernel",
        dict(C=2048, R=16, RANK=16, GATHER=True, WEIGHTED=True, BK=64, BC=128),
        ROUTE_POINTERS | dict(out_ptr=F32), 4,
    ),
    "experts, activation": (
        "experts.activation", "_fwd_kernel", dict(F=768, KIND=0, BLOCK=1024),
        dict(end_ptr=I32), 4,
    ),
    "experts, activation backward": (
        "experts.activation", "_bwd_kernel", dict(F=2880, KIND=2, BLOCK=1024),
        ROUTE_POINTERS | dict(end_ptr=I32, dw_ptr=F32), 4,
    ),
    "experts, combine": (
        "experts.combine", "_combine_kernel",
        dict(C=2048, TOP_K=8, WEIGHTED=True, RESIDUAL=True, BLOCK=1024), ROUTE_POINTERS, 4,
    ),
    "cross entropy": (
        "cross_entropy", "_log_probs_kernel",
        dict(CAPPED=False, NEED_FIRST=False, NEED_GRAD=True, BLOCK=8192),
        {"labels_ptr": I64, "logp_ptr": F32, "first_ptr": F32}, 16,
    ),
    "log probability of labels": (
        "cross_entropy", "_log_probs_kernel",
        dict(CAPPED=False, NEED_FIRST=True, NEED_GRAD=False, BLOCK=8192),
        {"labels_ptr": I64, "logp_ptr": F32, "first_ptr": "*i1"}, 16,
    ),
    "cross entropy softcap": (
        "cross_entropy", "_log_probs_kernel",
        dict(CAPPED=True, NEED_FIRST=False, NEED_GRAD=True, BLOCK=8192),
        {"labels_ptr": I64, "logp_ptr": F32, "first_ptr": F32}, 16,
    ),
    "adamw": (
        "adamw", "_step_kernel", STEP | dict(EIGHT_BIT=False),
        ADAM_POINTERS | dict(m_ptr=F32, v_ptr=F32), 8,
    ),
    "adamw 8-bit": (
        "adamw", "_step_kernel", STEP | dict(EIGHT_BIT=True),
        ADAM_POINTERS | dict(m_ptr=U8, v_ptr=U8), 8,
    ),
    "gradient norm": ("adamw", "_norm_kernel", dict(BLOCK=2048), ADAM_POINTERS, 4),
    "gradient scale": ("adamw", "_scale_kernel", dict(PARTIALS=1024, BLOCK=2048), ADAM_POINTERS, 4),
}  # fmt: skip
CASES = [(name, a) for name in KERNELS for a in ARCHITECTURES if a >= 90 or name not in HOPPER_ONLY]
FLOATS = {
    "eps", "side_scale", "softcap", "max_norm", "decay", "beta1", "beta2", "rest1", "rest2",
    "step_size", "root_correction2", "scale", "cap", "s0", "s1", "s2", "alpha",
    "limit",
}  # fmt: skip
UNALIGNED = {
    "T", "ignore_index", "side_src_rows", "side_src_cols", "side_shift", "first", "last", "top_k",
    "num_programs", "num_parts", "num_slots", "num_tiles", "num_nested", "blocks",
}  # fmt: skip


def _resources(name: str, architecture: int) -> dict[str, int]:
    """Compile one kernel and return its registers, spilled bytes, stack and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel, constants, pointers, num_warps = KERNELS[name]
    function = getattr(
        import_module(
            f"tuneline.kernels.{module}" if "." in module else f"tuneline.kernels.ops.{module}"
        ),
        kernel,
    )
    signature, attributes = {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith(("_ptr", "_desc")):
            signature[argument] = pointers.get(argument, "*bf16")
        else:
            signature[argument] = "fp32" if argument in FLOATS else "i32"
        if signature[argument][0] in "*i" and argument not in UNALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps}
    if name in FLASH_TILES:
        options["num_stages"] = FLASH_TILES[name][5]
    compiled = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        target = re.search(r"^\.target (\S+?),?$", ptx.replace(", ", ",\n"), re.M).group(1)
        report = subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", path, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "stack_bytes": int(re.search(r"(\d+) bytes stack frame", report).group(1)),
        "shared_bytes": compiled.metadata.shared,
        "wide_stores": len(re.findall(r"st\.global\.v4\.b32", ptx)),
    }


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, int]]:
    """Return what each kernel needs on each architecture."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_no_spills(name, architecture, resources, record_property):
    need = resources[f"{name} sm_{architecture}"]
    record_property("registers", need["registers"])
    assert need["spill_bytes"] <= SPILLS.get(name, 0)
    assert need["stack_bytes"] <= SPILLS.get(name, 0)
    assert 0 < need["registers"] <= 255


@pytest.mark.parametrize("name", FLASH_TILES)
def test_tiles_fit_the_shared_memory_of_the_smallest_gpu_that_gets_them(name, resources):
    # 227 KiB on Hopper; 99 KiB on GPUs such as L4, A10 and L40S (capabilities 8.6 and 8.9), for
    # which Triton lays out shared memory as for 8.0.
    architecture, kib = (90, 227) if name in HOPPER_ONLY else (80, 99)
    assert 0 < resources[f"{name} sm_{architecture}"]["shared_bytes"] <= kib * 1024


@pytest.mark.parametrize(
    "name", ["nf4", "rms_norm forward", "swiglu backward", "rope", "copy rows", "gather rows"]
)
def test_stores_are_16_bytes_wide(name, resources):
    assert resources[f"{name} sm_90"]["wide_stores"] > 0


if __name__ == "__main__":
    table = {f"{name} sm_{a}": _resources(name, a) for name, a in CASES}
    print(json.dumps(table, indent=1))
