"""What the kernels cost on this machine, and what compilers make of them for GPUs that are not here."""

import ast
import hashlib
from pathlib import Path

# Latents (C, F, H, W): 480p CogVideoX and Wan, 720p Wan and HunyuanVideo, LTX, VideoCrafter2.
LATENTS = {
    "cogvideox": (16, 13, 60, 90),
    "wan": (16, 21, 60, 104),
    "wan-720p": (16, 21, 90, 160),
    "hunyuanvideo": (16, 33, 90, 160),
    "ltx": (128, 13, 16, 24),
    "videocrafter2": (4, 16, 40, 64),
}


def code_hash(path: Path) -> str:
    """Of a Python file's code: without comments and docstrings, which no compiler reads."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
