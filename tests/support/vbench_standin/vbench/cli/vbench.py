"""The command `vbench evaluate`. As in the real one, another process does the work, and its failure is not told."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

WORK = (
    "import json, sys; from pathlib import Path; from vbench import VBench; a = json.loads(sys.argv[1]);"
    "p = json.loads(Path(a['prompt_file']).read_text()) if a['prompt_file'] else {};"
    "VBench('cuda', a['full_json_dir'], a['output_path']).evaluate(a['videos_path'], 'results_2025-01-01-00:00:00', p,"
    "[a['dimension']], bool(a['load_ckpt_from_local']), a['mode'])"
)


def main():
    parser = argparse.ArgumentParser(prog="vbench")
    evaluate = parser.add_subparsers(required=True).add_parser("evaluate")
    evaluate.add_argument("--ngpus", type=int, default=1)
    evaluate.add_argument("--output_path", default="./evaluation_results/")
    evaluate.add_argument("--full_json_dir", default=str(Path(__file__).parents[1] / "VBench_full_info.json"))
    evaluate.add_argument("--videos_path", required=True)
    evaluate.add_argument("--dimension", required=True)
    evaluate.add_argument("--load_ckpt_from_local", type=bool)
    evaluate.add_argument("--read_frame", type=bool)
    evaluate.add_argument(
        "--mode", choices=["custom_input", "vbench_standard", "vbench_category"], default="vbench_standard"
    )
    evaluate.add_argument("--prompt", default="None")
    evaluate.add_argument("--prompt_file")
    evaluate.add_argument("--category")
    evaluate.add_argument("--imaging_quality_preprocessing_mode", default="longer")
    subprocess.run([sys.executable, "-c", WORK, json.dumps(vars(parser.parse_args()))])
