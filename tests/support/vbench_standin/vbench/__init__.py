"""A stand-in for VBench 0.1.5 in tests: its command line and the form of its results. The scores mean nothing.

The score of a clip is the first byte of its hash over 255, so that a test can compute it from the file.
"""

import hashlib
import json
import os
import sys
from pathlib import Path


def score(path):
    return hashlib.sha256(Path(path).read_bytes()).digest()[0] / 255


class VBench:
    """Of the real class: the call, the files that it writes, the scales of its scores."""

    def __init__(self, device, full_info_dir, output_path):
        self.device, self.full_info_dir, self.output_path = device, full_info_dir, output_path
        os.makedirs(output_path, exist_ok=True)

    def videos(self, folder, prompts, mode, dimension):
        names = sorted(name for name in os.listdir(folder) if name.endswith(".mp4"))
        if mode == "custom_input":
            assert not prompts or set(names) <= set(prompts), "prompts of some videos are missing"
            return {os.path.join(folder, name): prompts.get(name) for name in names}
        known = json.loads(Path(self.full_info_dir).read_text())
        wanted = [entry["prompt_en"] for entry in known if dimension in entry["dimension"]]
        found = {f"{prompt}-{i}.mp4": prompt for prompt in wanted for i in range(5)}
        return {os.path.join(folder, name): found[name] for name in names if name in found}

    def evaluate(self, videos_path, name, prompt_list=(), dimension_list=None, local=False, mode="vbench_standard"):
        print("python", sys.prefix, "key", os.environ.get("OPENAI_API_KEY"), "path", os.environ.get("PYTHONPATH"))
        print("weights", os.environ.get("VBENCH_CACHE_DIR"), "local", local)
        results = {}
        for dimension in dimension_list:
            if dimension == os.environ.get("STANDIN_FAILS"):
                raise RuntimeError(f"CUDA error in {dimension}")
            clips = []
            for path, prompt in self.videos(videos_path, dict(prompt_list), mode, dimension).items():
                value = score(path)
                if dimension == "overall_consistency":
                    value = len(prompt) / 1000
                if dimension == "dynamic_degree":
                    value = value > 0.5
                clips.append(
                    {"video_path": path, "video_results": 100 * value if dimension == "imaging_quality" else value}
                )
            mean = sum(clip["video_results"] for clip in clips) / max(len(clips), 1)
            results[dimension] = [mean / 100 if dimension == "imaging_quality" else mean, clips]
        Path(self.output_path, f"{name}_full_info.json").write_text("[]")
        Path(self.output_path, f"{name}_eval_results.json").write_text(json.dumps(results))
