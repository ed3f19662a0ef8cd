"""Query-key pairs and bytes of attention in the reward model: the dense mask, and two partial attentions.

    python -m benchmarks.shared_prefix             # prints the table of docs/rewards.md

Counted, not measured: a Qwen2-VL 2B (28 layers, 12 heads of 128, bfloat16), one clip of 1,152 tokens, a prompt of 96,
two video scores, and blocks of 12 tokens a patch.
"""

from halo_fast.rewards.backbones.shared_prefix import Blocks, num_scores

FRAMES, PROMPT, VIDEO_SCORES, BLOCK = 1152, 96, 2, 12
LAYERS, HEADS, HEAD_SIZE, ITEM_BYTES = 28, 12, 128, 2
PATCHES = (8, 36, 168)


def layout(patches: int) -> Blocks:
    """The sequence of one clip."""
    prefix = FRAMES + PROMPT
    return Blocks(prefix, (prefix,), (1,) * VIDEO_SCORES + (BLOCK,) * patches)


def figures(patches: int) -> dict[str, float]:
    """Counts of one clip: tokens, pairs a head and layer, operations of all layers, bytes beyond the output."""
    blocks = layout(patches)
    dense, shared = num_scores(blocks)
    rest = blocks.num_tokens - blocks.prefix
    operations = 4 * HEAD_SIZE * HEADS * LAYERS  # of one pair: a product for its score and one for its value
    return {
        "tokens": blocks.num_tokens,
        "dense pairs": dense,
        "shared pairs": shared,
        "dense GFLOP": operations * dense / 1e9,
        "shared GFLOP": operations * shared / 1e9,
        # torch keeps the mask as bytes and SDPA's kernels read it in the query's dtype
        "mask bytes": dense * (1 + ITEM_BYTES),
        # two partial outputs and their float32 log-sums, one layer at a time
        "partial bytes": 2 * rest * HEADS * (HEAD_SIZE * ITEM_BYTES + 4),
    }


def markdown() -> str:
    """The table."""
    lines = [
        "| P | tokens | pairs, dense | pairs, shared prefix | of dense | GFLOP, dense | GFLOP, shared prefix "
        "| MiB of masks | MiB of partial outputs |",
        "|---|" + "---:|" * 8,
    ]
    for patches in PATCHES:
        one = figures(patches)
        lines.append(
            f"| {patches} | {one['tokens']:,} | {one['dense pairs'] / 1e6:.2f} M | {one['shared pairs'] / 1e6:.2f} M "
            f"| {one['shared pairs'] / one['dense pairs']:.2f} | {one['dense GFLOP']:.0f} | {one['shared GFLOP']:.0f} "
            f"| {one['mask bytes'] / 2**20:.1f} | {one['partial bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
