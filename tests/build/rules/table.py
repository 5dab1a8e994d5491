"""The machine-checked rules of the source tree."""

from . import layers, names, readability
from .source import CODE, PYTHON, Rule, Source, pattern

CSRC = ("csrc/",)
RULES = [
    Rule(
        "assembly and CUDA builtins stand in csrc/cuda/ptx",
        pattern(
            r"\b(__)?asm(__)?\b|\b__CUDA_ARCH__\b|\b__shfl\w*|\b__sync(threads|warp)\w*|\bextern\s+__shared__"
            r"|\b(threadIdx|blockIdx|blockDim|gridDim)\b"
        ),
        bad=Source("csrc/cuda/tile/gemm.h", "void wait() { __syncthreads(); }\n"),
        within=CSRC,
        outside=("csrc/cuda/ptx/",),
    ),
    Rule(
        "kernels are launched in csrc/cuda/launch.h",
        pattern(r"<<<|\bcudaLaunchKernel\w*"),
        bad=Source("csrc/ops/cuda.cu", "kernel<<<grid, block>>>(params);\n"),
        within=CSRC,
        outside=("csrc/cuda/launch.h",),
    ),
    Rule(
        "torch is known to csrc/ops only",
        pattern(r'#\s*include\s*[<"](torch|ATen|c10|caffe2|pybind11|Python\.h)|\b(torch|at|c10|pybind11)::'),
        bad=Source("csrc/policy/mask.h", "#include <ATen/core/Tensor.h>\n"),
        within=CSRC,
        outside=("csrc/ops/",),
    ),
    Rule(
        "torch/extension.h, a minute of compilation per file, is included nowhere",
        pattern(r'#\s*include\s*[<"]torch/(extension|all|torch)\.h'),
        bad=Source("csrc/ops/schema.cpp", "#include <torch/extension.h>\n"),
    ),
    Rule(
        "CUDA headers stay out of what the CPU shares with the GPU",
        pattern(r'#\s*include\s*[<"](cuda|cooperative_groups|mma\.h|nv/)'),
        bad=Source("csrc/policy/dropout.h", "#include <cuda_runtime.h>\n"),
        within=("csrc/problem.h", "csrc/policy/", "csrc/cpu/"),
    ),
    Rule(
        "instruction sets of processors are known to csrc/cpu only",
        pattern(r"#\s*include\s*<\w*(intrin|arm_\w+)\.h>|\b_mm\d*_\w+|\b__builtin_(ia32\w*|cpu_supports)\b"),
        bad=Source("csrc/policy/score.h", "#include <immintrin.h>\n"),
        within=CSRC,
        outside=("csrc/cpu/",),
    ),
    Rule(
        "a file includes its own layer and those to its left",
        layers.includes_to_the_right,
        bad=Source("csrc/cpu/fwd.h", '#include "cuda/tile/acc_tile.h"\n'),
        within=CSRC,
    ),
    Rule(
        "includes are written from the root of csrc",
        layers.includes_not_from_the_root,
        bad=Source("csrc/policy/seqlen.h", '#include "mask.h"\n'),
        within=CSRC,
    ),
    Rule(
        "a module imports the layers to its left",
        layers.python_imports_to_the_right,
        bad=Source("flash_attn/autograd.py", "from flash_attn.modules.mha import MHA\n"),
        suffixes=PYTHON,
        within=("flash_attn/",),
    ),
    Rule(
        "no macro that a function could be",
        pattern(r"#\s*define\s+\w+\("),
        bad=Source("csrc/cuda/sm80/fwd.h", "#define MIN(a, b) ((a) < (b) ? (a) : (b))\n"),
        within=CSRC,
        outside=("csrc/cuda/ptx/",),
    ),
    Rule(
        "no commented-out C++",
        readability.commented_out_code,
        bad=Source("csrc/cpu/bwd.h", "int f() {\n    // x = g(3);\n    return 2;\n}\n"),
    ),
    Rule(
        "no commented-out Python",
        readability.commented_out_code,
        bad=Source("flash_attn/autograd.py", "def f():\n    # x.backward(y)\n    return 2\n"),
        suffixes=PYTHON,
    ),
    Rule(
        "nothing is left unfinished",
        readability.unfinished,
        bad=Source("README.md", "Later, FIX" + "ME\n"),
        suffixes=(*CODE, ".md", ".toml", ".yaml"),
    ),
    Rule(
        f"lines end by column {readability.MAX_COLUMNS}",
        readability.long_lines,
        bad=Source("csrc/problem.h", "// " + "x" * readability.MAX_COLUMNS + "\n"),
        suffixes=CODE,
    ),
    Rule(
        f"files have at most {readability.MAX_FILE_LINES} lines",
        readability.long_file,
        bad=Source("csrc/ops/cpu.cpp", "int x;\n" * (readability.MAX_FILE_LINES + 1)),
        suffixes=CODE,
    ),
    Rule(
        f"functions have at most {readability.MAX_FUNCTION_LINES} lines",
        readability.long_functions,
        bad=Source("setup.py", "def f():\n" + "    x = 1\n" * readability.MAX_FUNCTION_LINES),
        suffixes=PYTHON,
    ),
    Rule(
        "the package does not check its users with assert",
        readability.assert_statements,
        bad=Source("flash_attn/modules/mha.py", "def f(x):\n    assert x > 0\n"),
        suffixes=PYTHON,
        within=("flash_attn/",),
    ),
    Rule(
        "everything is implemented",
        readability.not_implemented,
        bad=Source("flash_attn/flash_attention.py", "def f():\n    raise NotImplementedError\n"),
        suffixes=PYTHON,
        within=("flash_attn/",),
    ),
    Rule(
        "one word per concept in C++",
        names.synonyms_in_cpp,
        bad=Source("csrc/problem.h", "struct P { int nheads; };\n"),
    ),
    Rule(
        "one word per concept in Python",
        names.synonyms_in_python,
        bad=Source("flash_attn/autograd.py", "def f(q, seqlen_kv):\n    return q\n"),
        suffixes=PYTHON,
    ),
]
