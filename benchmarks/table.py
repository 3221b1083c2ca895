"""Write the results table of README.md from benchmarks/results/*.json: `python benchmarks/table.py [--check]`."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: python benchmarks/table.py -->", "<!-- /results -->"


def load(name: str) -> dict:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())


def table() -> str:
    big, attention, demo = load("lfm_3b_h200"), load("attention"), load("demo")
    best = {}
    for row in attention["rows"]:
        known = best.get(row["documents"])
        if known is None or row["forward_backward_ms"] < known["forward_backward_ms"]:
            best[row["documents"]] = row
    slow, fast = big["tokens_per_second_range"]
    lines = [
        "| what | result | on |",
        "| --- | --- | --- |",
        f"| LFM-3B, {big['parameters']:,} parameters, 8192 context, packed real text, {big['steps']} steps of "
        f"{big['tokens_per_step']:,} tokens | loss {big['first_logged_loss']:.2f} (step 5) to {big['last_loss']:.2f}; "
        f"{big['tokens_per_second']:,.0f} tokens/s ({slow:,.0f} to {fast:,.0f}), MFU {big['mfu_attended']:.1%} of 989 "
        f"TFLOP/s counting attended pairs ({big['mfu_if_rows_were_one_document']:.1%} if rows were one document), "
        f"peak {big['peak_memory_gib']:.1f} GiB | {_where(big)} |",
        f"| the same, resumed from step 100 in a new process | loss after 110 steps "
        f"{big['resumed_in_a_new_process']['loss'][-1][1]:.4f}, uninterrupted "
        f"{big['resumed_in_a_new_process']['uninterrupted'][-1][1]:.4f} | {_where(big)} |",
        f"| `lfm_debug` (the demo), {demo['parameters']:,} parameters, {demo['steps']} steps of "
        f"{demo['tokens_per_step']:,} tokens | held out {demo['bits_per_byte']['LFM, held out']:.3f} bits per byte "
        f"(unigram {demo['bits_per_byte']['unigram entropy of the same tokens']:.3f}, gzip -9 "
        f"{demo['bits_per_byte']['gzip -9']:.3f}, xz -9e {demo['bits_per_byte']['xz -9e']:.3f}); "
        f"{demo['tokens_per_second']:,.0f} tokens/s | 2 CPU cores, {demo['date']}, {demo['runs']} run |",
    ]
    for row in best.values():
        lines.append(
            f"| attention, 8192 tokens, {row['documents']} | {row['forward_ms']:.2f} ms forward, "
            f"{row['forward_backward_ms']:.2f} ms with backward by `{row['backend']}` "
            f"({row['forward_backward_ms'] / row['floor_ms']:.1f} x the floor of {row['floor_ms']:.2f} ms); "
            f"error {row['relative_error']:.1e} | {_where(attention)} |"
        )
    lines += _layouts(load("layouts_2xh200"), load("certificate_2xh200"), load("certificate_cpu"))
    return "\n".join(lines)


def _layouts(speed: dict, gpus: dict, cpus: dict) -> list[str]:
    """What two GPUs make of LFM-3B under each layout, and what the certificates say."""
    one = next(row for row in speed["layouts"] if row["gpus"] == 1)
    where = _where(speed).replace("one NVIDIA", "two NVIDIA")
    lines = []
    for row in speed["layouts"]:
        slow, fast = row["range"]
        scaling = row["tokens_per_second_per_gpu"] / one["tokens_per_second_per_gpu"]
        worst = max(row["profile"], key=lambda part: part["collective"] + part["send_receive"])
        waits = f"communication that nothing hides {worst['collective'] + worst['send_receive']:.0%} of a step"
        if "PP" in row["layout"]:
            waits += f", the pipeline's bubble included (predicted {row['bubble_predicted']:.0%})"
        lines.append(
            f"| LFM-3B, {row['layout']}, {row['tokens_per_step']:,} tokens a step | "
            f"{row['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU ({slow:,.0f} to {fast:,.0f}; {scaling:.0%} of "
            f"one GPU's), MFU {row['mfu_attended']:.1%} attended ({row['mfu_if_rows_were_one_document']:.1%}), peak "
            f"{max(row['peak_memory_gib']):.1f} GiB; {waits} | {where} |"
        )
    moved = speed["checkpoint_moved"]
    saved, continued = (dict(map(tuple, rows)) for rows in moved.values())
    first = min(continued.keys() - range(6))
    lines.append(
        f"| LFM-3B, checkpoint of step 5 saved under EP2, continued under TP2+SP | loss of step {first}: "
        f"{continued[first]:.4f}, of the run under EP2 itself {saved[first]:.4f} (bf16) | {where} |"
    )
    for found, name in ((gpus, "NCCL, two NVIDIA H200"), (cpus, "gloo, 2 CPU cores")):
        worst = {key: max(row["deviations"][key] for row in found["layouts"]) for key in found["bounds"]}
        within = sum(not row["beyond"] for row in found["layouts"])
        lines.append(
            f"| certificate of `lfm_debug` against one process, fp32 | {within} of {len(found['layouts'])} layouts "
            f"within bounds; largest relative deviation: loss {worst['loss']:.0e}, gradient of a parameter "
            f"{worst['gradient']:.0e}, norm {worst['norm']:.0e}, auxiliary losses {worst['auxiliary']:.0e} | {name} |"
        )
    return lines


def _where(result: dict) -> str:
    torch = result["environment"]["versions"]["torch"]
    how_often = f"median of {result['calls']} calls" if "calls" in result else f"{result['runs']} run"
    return f"one {result['environment']['gpu']}, torch {torch}, {result['date']}, {how_often}"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit(0 if wanted == text else "README.md's table differs from benchmarks/results; run benchmarks/table.py")
    readme.write_text(wanted)


if __name__ == "__main__":
    main()
