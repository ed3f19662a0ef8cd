"""A stand-in for VBench-2.0 0.1.1 in tests: its class and the form of its results. The scores mean nothing."""

import json
import os
from pathlib import Path

from vbench import score


class VBench2:
    def __init__(self, device, full_info_dir, output_path):
        assert Path(full_info_dir).name == "VBench2_full_info.json"
        assert Path("vbench2").is_dir(), "its configs are found relative to the folder of the package"
        self.output_path = output_path
        os.makedirs(output_path, exist_ok=True)

    def evaluate(
        self, videos_path, name, prompt_list=(), dimension_list=None, local=False, mode="vbench_standard", **kw
    ):
        results = {}
        for dimension in dimension_list:
            paths = [os.path.join(videos_path, clip) for clip in sorted(os.listdir(videos_path))]
            clips = [{"video_path": path, "video_results": score(path)} for path in paths]
            if dimension == "Human_Identity":
                clips[0]["video_results"] = -1  # no face
            known = [clip["video_results"] for clip in clips if clip["video_results"] != -1]
            results[dimension] = [sum(known) / len(known), clips]
        Path(self.output_path, f"{name}_eval_results.json").write_text(json.dumps(results))
