"""What `halo evaluate` prints of a finished run, put into docs/evaluation.md between its marks.

python -m tools.evaluation runs/demo
"""

import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.judging import judge_arms
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.evaluate import printed

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evaluation.md"
_MARKED = re.compile(r"(<!-- python -m tools\.evaluation runs/demo -->\n).*?(<!-- end -->)", re.S)


def main(run: Path) -> None:
    """Write the page anew."""
    config, said = load_config("demo", {"output_dir": str(run)}), StringIO()
    with redirect_stdout(said):
        print(f"{printed(run / 'evaluate')}\n")
        judge_arms(config, Run(config))
    text = f"```text\n{said.getvalue()}```\n"
    page, count = _MARKED.subn(lambda found: found[1] + text + found[2], PAGE.read_text())
    if count != 1:
        raise SystemExit(f"{PAGE}: expected one pair of marks, got {count}")
    PAGE.write_text(page)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
