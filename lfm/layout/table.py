"""Which layouts go with which ZeRO stages, as a table.

`python -m lfm.layout.table docs/parallelism.md` writes that page's table.
"""

import sys
from pathlib import Path

from lfm.layout.config import ParallelConfig
from lfm.layout.rules import Request, first_broken

BEGIN, END = "<!-- layouts: python -m lfm.layout.table docs/parallelism.md -->", "<!-- /layouts -->"


def compatibility_table() -> str:
    """Which layouts go with which ZeRO stages, as Markdown: the rules, asked about a small model."""
    from lfm.layers.attention import AttentionConfig
    from lfm.layers.moe import MoEConfig
    from lfm.models.lfm import LFMConfig

    model = LFMConfig(
        hidden_size=32,
        num_layers=4,
        seq_length=64,
        attention=AttentionConfig(num_attention_heads=4, num_query_groups=2),
        ffn=MoEConfig(moe_ffn_hidden_size=32),
    )
    tensor, pipeline, expert = {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"expert": 2}
    interleaved = {**pipeline, "virtual_pipeline": 2}
    rows = {
        "one process": (1, {}),
        "DP": (2, {}),
        "TP+SP": (4, tensor),
        "PP": (4, pipeline),
        "PP interleaved": (4, interleaved),
        "EP": (4, expert),
        "TP+SP x PP": (8, tensor | pipeline),
        "TP+SP x PP interleaved": (8, tensor | interleaved),
        "TP+SP x EP": (8, tensor | expert),
        "PP x EP": (8, pipeline | expert),
        "PP interleaved x EP": (8, interleaved | expert),
        "TP+SP x PP x EP": (16, tensor | pipeline | expert),
    }
    columns = {f"ZeRO-{stage}": {"zero_stage": stage} for stage in range(4)}
    columns |= {f"{name} + offload": {**keys, "offload_optimizer": True} for name, keys in list(columns.items())[1:]}
    reasons: list[str] = []
    lines = ["| layout | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, (world, sizes) in rows.items():
        cells = []
        for zero in columns.values():
            rule = first_broken(Request(model, ParallelConfig(**{**sizes, **zero}), world, 16, 1))
            if rule is not None and rule.why not in reasons:
                reasons.append(rule.why)
            cells.append("yes" if rule is None else f"no ({reasons.index(rule.why) + 1})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def main() -> None:
    page = Path(sys.argv[1])
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{compatibility_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
