"""The layers of csrc/ and the style limits, checked by reading the sources.

Each rule is a function from (path, text) to a list of complaints. Every rule is also shown a snippet that breaks it.
Paths are relative to the repository root, such as "csrc/core/mask.h".
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".c", ".cpp", ".cuh", ".cu"})
PYTHON = sorted(p for top in ("hstu_ops", "python_tests", "bench") for p in (ROOT / top).rglob("*.py"))
BUILD = [ROOT / name for name in ("setup.py", "CMakeLists.txt")] + sorted((ROOT / "cmake").glob("*"))

MASK_WORDS = r"contextual|max_attn_len|num_targets"
CONVERTS_ARGUMENTS = ("csrc/torch/", "csrc/bindings/", "csrc/tests/")
HEADER_LINES, KERNEL_LINES, FUNCTION_LINES = 250, 500, 60


def strip_comments(text):
    """C++ without comments; string literals stay. Line numbers are kept."""
    pattern = r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/'
    return re.sub(pattern, lambda m: m[0] if m[0][0] == '"' else re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)


def matches(pattern, text, path, complaint):
    lines = strip_comments(text).splitlines()
    return [f"{path}:{n}: {complaint}: {line.strip()}" for n, line in enumerate(lines, 1) if re.search(pattern, line)]


def core_includes_itself_and_std(path, text):
    if not path.startswith("csrc/core/"):
        return []
    return matches(r'#\s*include\s+(?!"core/|<[a-z_]+>)', text, path, "core/ includes only core/ and std")


def assembly_only_in_ptx(path, text):
    if path.startswith("csrc/cuda/ptx/"):
        return []
    return matches(r"\basm\b|\b__asm", text, path, "assembly outside csrc/cuda/ptx/")


def torch_only_in_torch(path, text):
    if path.startswith("csrc/torch/"):
        return []
    pattern = r"#\s*include\s+[\"<](torch|ATen|c10)/|\b(at|c10|torch)::|\b(aoti_)?torch_[a-z]"
    return matches(pattern, text, path, "torch outside csrc/torch/")


def architectures_apart(path, text):
    for here, other in (("sm80", "sm90"), ("sm90", "sm80")):
        if f"/{here}/" in path:
            return matches(rf"#\s*include.*\b{other}/", text, path, f"{here}/ includes {other}/")
    return []


def kernels_know_a_mask_not_masks(path, text):
    if path.startswith(("csrc/core/", *CONVERTS_ARGUMENTS)):
        return []
    return matches(MASK_WORDS, text, path, "a mask option outside core/ and argument conversion")


def no_exit_no_print(path, text):
    if path.startswith("csrc/tests/"):
        return []
    return matches(r"\b(exit|_exit|abort|f?printf|puts)\s*\(|std::c(out|err)\b", text, path, "exit or print")


def no_code_in_comments(path, text):
    comments = re.finditer(r"^\s*//(.*)$", text, flags=re.MULTILINE)
    code = re.compile(r"^\s*(#\s*(include|define|if|endif)|(if|for|while)\s*\(.*[;{]\s*$|[\w>.\]-]+(\(.*\))?\s*;\s*$)")
    return [f"{path}: commented-out code: {m[0].strip()}" for m in comments if code.search(m[1])]


def size_limits(path, text):
    limit = HEADER_LINES if path.endswith(".h") else KERNEL_LINES
    lines = text.count("\n")
    return [f"{path}: {lines} lines, limit {limit}"] if lines > limit else []


def function_limits(path, text):
    """A function is a block in namespaces and classes only, whose head holds a parameter list."""
    found, blocks = [], []  # an open block: line of its head if it is a function, else None
    code = strip_comments(text)
    code = re.sub(r"^[ \t]*#(.*\\\n)*.*", lambda m: re.sub(r"[^\n]", " ", m[0]), code, flags=re.MULTILINE)
    code = re.sub(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', lambda m: "_" * len(m[0]), code)
    head_begin = 0
    for at, character in enumerate(code):
        if character == "{":
            head = code[head_begin:at]
            is_type = re.search(r"\b(struct|class|union|enum|namespace)\b(\s+alignas\([^()]*\))?[^()]*$", head)
            inside = any(line is not None for line in blocks)
            first = head_begin + len(head) - len(head.lstrip())
            blocks.append(code.count("\n", 0, first) if ")" in head and not is_type and not inside else None)
        elif character == "}" and blocks:
            begin = blocks.pop()
            lines = 0 if begin is None else code.count("\n", 0, at) - begin + 1
            if lines > FUNCTION_LINES:
                found.append(f"{path}:{begin + 1}: function of {lines} lines, limit {FUNCTION_LINES}")
        if character in "{};":
            head_begin = at + 1
    return found


def nothing_left_to_do(path, text):
    words = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"))  # in halves: this file is checked too
    found = enumerate(text.splitlines(), 1)
    return [f"{path}:{n}: {line.strip()}" for n, line in found if re.search(rf"\b({words})\b", line)]


CPP_RULES = {
    core_includes_itself_and_std: ("csrc/core/mask.h", "#include <cuda_runtime.h>\n#include <torch/library.h>\n"),
    assembly_only_in_ptx: ("csrc/cuda/sm90/fwd.cuh", 'asm volatile("nop;");\n'),
    torch_only_in_torch: ("csrc/cpu/attention.cpp", "#include <ATen/ATen.h>\n"),
    architectures_apart: ("csrc/cuda/sm90/fwd.cuh", '#include "cuda/sm80/config.h"\n'),
    kernels_know_a_mask_not_masks: ("csrc/cuda/sm80/fwd.cuh", "int contextual_seq_len = 0;\n"),
    no_exit_no_print: ("csrc/cpu/attention.cpp", 'printf("here");\n'),
    no_code_in_comments: ("csrc/cpu/attention.cpp", "  // launch(params);\n"),
    size_limits: ("csrc/core/mask.h", "\n" * (HEADER_LINES + 1)),
    function_limits: ("csrc/cpu/attention.cpp", "void f(int a) {\n" + "  g();\n" * FUNCTION_LINES + "}\n"),
    nothing_left_to_do: ("csrc/core/mask.h", "// TO" + "DO: check off-by-1\n"),
}


def complaints(rule, paths):
    return [c for p in paths for c in rule(str(p.relative_to(ROOT)), p.read_text())]


@pytest.mark.parametrize("rule", CPP_RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule):
    assert complaints(rule, SOURCES) == []


@pytest.mark.parametrize("rule", CPP_RULES, ids=lambda rule: rule.__name__)
def test_rule_can_fail(rule):
    path, text = CPP_RULES[rule]
    assert rule(path, text)


def test_rules_accept_what_is_allowed():
    assert not core_includes_itself_and_std("csrc/core/bias.h", '#include <cstdint>\n#include "core/mask.h"\n')
    assert not assembly_only_in_ptx("csrc/cuda/ptx/mma.cuh", 'asm volatile("nop;");\n')
    assert not torch_only_in_torch("csrc/core/launch.h", "// as torch_parallel_for does\n")
    assert not kernels_know_a_mask_not_masks("csrc/torch/attention.cpp", "int num_targets;\n")
    assert not no_code_in_comments("csrc/core/mask.h", "// the row's columns; see the table\n// if a (b) holds,\n")
    assert not function_limits("csrc/cpu/a.cpp", "struct A {\n" + "  void f() {\n  }\n" * 100 + "};\n")
    assert not function_limits("csrc/cpu/a.cpp", "namespace a {\n" + "int f(int b) { return b; }\n" * 100 + "}\n")


def test_nothing_left_to_do_in_python_and_build_files():
    assert complaints(nothing_left_to_do, [*PYTHON, *BUILD]) == []


def test_sources_are_found():
    names = {str(p.relative_to(ROOT)) for p in SOURCES}
    assert {"csrc/core/mask.h", "csrc/torch/library.cpp"} <= names
