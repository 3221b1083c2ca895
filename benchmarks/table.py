"""Write the tables of README.md and of docs/, and the plots of docs/, from benchmarks/results/*.json:
`python benchmarks/table.py [--check]`.
"""

import functools
import json
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import ladder, medical, serving, trainings
from benchmarks.model import page
from benchmarks.ops.case import rate
from lfm.experiments import results as ablation

ROOT = Path(__file__).resolve().parents[1]
RESULTS, WATERFALL = ROOT / "benchmarks/results", ROOT / "docs/waterfall.png"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table() -> str:
    big, attention, demo, fused = load("lfm_3b_h200"), load("attention"), load("demo"), load("lfm_3b_fused")
    best = {}
    for row in attention["rows"]:
        known = best.get(row["documents"])
        if "not reproducible" in row["backend"] or "forward_backward_ms" not in row:
            continue
        if known is None or row["forward_backward_ms"] < known["forward_backward_ms"]:
            best[row["documents"]] = row
    slow, fast = big["tokens_per_second_range"]
    recipe = load("recipe")
    published, unit = (dict(map(tuple, arm["validation"])) for arm in recipe["full"][:2])
    fused_slow, fused_fast = fused["tokens_per_second_range"]
    lines = [
        "| what | result | on |",
        "| --- | --- | --- |",
        f"| LFM-3B tied, {fused['parameters']:,} parameters, 8192 context, packed real text, {fused['steps']} steps of "
        f"{fused['tokens_per_step']:,} tokens, with the kernels of [kernels](docs/kernels.md) | "
        f"{fused['tokens_per_second']:,.0f} tokens/s ({fused_slow:,.0f} to {fused_fast:,.0f}), MFU "
        f"{fused['mfu_attended']:.1%} of 989 TFLOP/s counting attended pairs, peak {fused['peak_memory_gib']:.1f} GiB "
        f"| {_where(fused)} |",
        f"| the same model before those kernels, {big['steps']} steps of "
        f"{big['tokens_per_step']:,} tokens | loss {big['first_logged_loss']:.2f} (step 5) to {big['last_loss']:.2f}; "
        f"{big['tokens_per_second']:,.0f} tokens/s ({slow:,.0f} to {fast:,.0f}), MFU {big['mfu_attended']:.1%} of 989 "
        f"TFLOP/s counting attended pairs ({big['mfu_if_rows_were_one_document']:.1%} if rows were one document), "
        f"peak {big['peak_memory_gib']:.1f} GiB | {_where(big)} |",
        f"| that run, resumed from step 100 in a new process | loss after 110 steps "
        f"{big['resumed_in_a_new_process']['loss'][-1][1]:.4f}, uninterrupted "
        f"{big['resumed_in_a_new_process']['uninterrupted'][-1][1]:.4f} | {_where(big)} |",
        f"| LFM-3B, from its first step, by the [recipe](docs/recipe.md); steps of "
        f"{recipe['tokens_per_step']['full']:,} tokens | held out {unit[40]:.2f} nats after 40 steps, {unit[80]:.2f} "
        f"after 80, {unit[300]:.2f} after 300; with the published initialization {published[40]:.2f} and "
        f"{published[80]:.2f} | {_where(recipe)} each |",
        _float16(load("float16_h200")),
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
    lines += _data(load("prepare"), load("reader"))
    lines.append(_medical(load("medical")))
    lines += _scaling(load("scale_out_4xh200"), load("certificate_cpu"))
    return "\n".join(lines)


def runs_table() -> str:
    """The recorded runs of LFM-3B on one GPU."""
    lines = ["| run | tokens/s (slowest to fastest window) | MFU attended | peak GiB | on |", "| --- " * 5 + "|"]
    for what, name in (("LFM-3B tied, with the kernels", "lfm_3b_fused"), ("before the kernels", "lfm_3b_h200")):
        run = load(name)
        slow, fast = run["tokens_per_second_range"]
        lines.append(
            f"| {what}, {run['steps']} steps of {run['tokens_per_step']:,} tokens | {run['tokens_per_second']:,.0f} "
            f"({slow:,.0f} to {fast:,.0f}) | {run['mfu_attended']:.1%} | {run['peak_memory_gib']:.1f} | {_where(run)} |"
        )
    return "\n".join(lines)


def _float16(result: dict) -> str:
    """float16 with its loss scale beside bfloat16, which differs from itself by the order of sums on a GPU."""
    runs, steps = result["runs"], len(result["runs"]["fp16"]["loss"])

    def apart(one: str, other: str) -> float:
        pairs = zip(runs[one]["loss"], runs[other]["loss"], strict=True)
        return statistics.mean((a - b) ** 2 for a, b in pairs) ** 0.5

    held_out = {name: dict(map(tuple, run["validation"]))[steps] for name, run in runs.items() if name != "fp32"}
    env, skipped = result["environment"], runs["fp16_overflow"]["skipped_updates"]
    return (
        f"| `lfm_350m` in float16, loss scale 65,536, {steps} steps of 32,768 tokens | held out "
        f"{held_out['fp16']:.4f}, in bfloat16 {held_out['bf16']:.4f} and {held_out['bf16_again']:.4f}; losses of a "
        f"step differ by {apart('fp16', 'bf16'):.4f} (RMS), of the two in bfloat16 by "
        f"{apart('bf16', 'bf16_again'):.4f}; from a scale of 2^40, {skipped} updates are skipped and training goes on "
        f"from there | one {env['gpu']}, torch {env['versions']['torch']}, {result['date']}, 1 run each |"
    )


def _medical(result: dict) -> str:
    of, option = (result["measures"][name] for name in ("head", "option probability"))
    accuracy = ", ".join(
        f"{name} {one['accuracy']['mean']:.3f} (naive Bayes {one['naive_bayes']['naive Bayes']['accuracy']:.3f})"
        for name, one in result["competence"].items()
    )
    splits = [seed["violations"] for seed in result["of_seed"].values()]
    return (
        f"| [medical mode](docs/medical.md): 80 M active parameters, {result['test_questions']:,} test questions | "
        f"accuracy {accuracy}; whether an answer is right: AUROC {of['auroc']['mean']:.3f}, the option's own "
        f"probability {option['auroc']['mean']:.3f}; ECE {of['ece']['mean']:.3f}; a certified risk of 5 % is exceeded "
        f"in {sum(one['violated'] for one in splits)} of {sum(one['splits'] for one in splits):,} splits | one "
        f"{result['environment']['gpu']}, torch {result['environment']['versions']['torch']}, {result['date']}, "
        f"{result['seeds']} seeds |"
    )


def _data(preparing: dict, reading: dict) -> list[str]:
    """Text to shards, and rows of shards, each beside a library's way."""
    speed = {case: rate / 1e6 for case, rate in preparing["median_tokens_per_second"].items()}
    of_ids = [row for row in reading["rows"] if "order" in row]  # the others are of a training run
    shuffled = [row for row in of_ids if row["order"] == "shuffled" and row["dtype"] == "uint16"]
    ours, theirs = (
        max((row for row in shuffled if row["reader"] == reader), key=lambda row: row["tokens_per_second"])
        for reader in ("lfm", "StreamingDataset")
    )
    return [
        "| text to shards: JSON lines, GPT-2's ids, exact duplicates dropped ([data](docs/data.md)) | "
        f"{speed['ours']:.2f} M tokens/s; `datasets.map` with MDSWriter {speed['datasets.map and MDSWriter']:.2f} | "
        f"2 CPU cores, {preparing['date']}, median of {len(preparing['runs']['ours'])} runs |",
        f"| rows of {reading['seq_length']} ids from shards, shuffled, one process | "
        f"{ours['tokens_per_second'] / 1e6:,.0f} M tokens/s with {ours['threads']} threads; mosaicml-streaming's own "
        f"reader {theirs['tokens_per_second'] / 1e6:,.0f} M with {theirs['workers']} workers | 2 CPU cores, busy, "
        f"{reading['date']} |",
    ]


def _scaling(four: dict, cpus: dict) -> list[str]:
    """The best layout of four GPUs, a moved checkpoint, and what the certificates say; docs/scaling.md has the rest."""
    one, *layouts = four["layouts"]
    best = max(layouts, key=lambda row: row["tokens_per_second_per_gpu"])
    slow, fast = best["range"]
    where = _where(four).replace("one NVIDIA", "four NVIDIA")
    newer_one, newer = load("model_four_gpus")["layouts"]
    rate, of_one = newer["tokens_per_second_per_gpu"], newer_one["tokens_per_second_per_gpu"]
    lines = [
        f"| LFM-3B on four GPUs ([scaling](docs/scaling.md)): {newer['layout']}, {newer['tokens_per_step']:,} tokens a "
        f"step | {rate:,.0f} tokens/s per GPU ({newer['range'][0]:,.0f} to {newer['range'][1]:,.0f}), "
        f"{rate / of_one:.1%} of one GPU's {of_one:,.0f} | "
        f"{_where(load('model_four_gpus')).replace('one NVIDIA', 'four NVIDIA')} |",
        f"| the same before the kernels, best of {len(layouts)} layouts: {best['layout']}, "
        f"{best['tokens_per_step']:,} tokens a step | {best['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU "
        f"({slow:,.0f} to {fast:,.0f}), {best['tokens_per_second_per_gpu'] / one['tokens_per_second_per_gpu']:.0%} of "
        f"one GPU's {one['tokens_per_second_per_gpu']:,.0f}; MFU {best['mfu_attended']:.1%} attended, peak "
        f"{max(best['peak_memory_gib']):.1f} GiB | {where} |",
    ]
    moved = four["checkpoint_moved"]["losses"]
    saved, *continued = moved
    for other in continued:
        step = min(moved[other], key=int)
        lines.append(
            f"| LFM-3B, checkpoint saved under {saved}, continued under {other} | loss of step {step}: "
            f"{moved[other][step]:.4f}, of the run that saved it {moved[saved][step]:.4f} (bf16) | {where} |"
        )
    certificates = [
        ("NCCL, two NVIDIA H200; fp32", load("certificate_2xh200")["layouts"]),
        ("NCCL, four NVIDIA H200; fp32", four["certificates"]),
        *(
            (f"NCCL, {number} NVIDIA H200; {words}, ZeRO-1 by buckets", _certified(name, dtype))
            for number, name in (("two", "model_two_gpus"), ("four", "model_four_gpus"))
            for words, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
        ),
        ("gloo, 2 CPU cores; fp32", cpus["layouts"]),
        ("gloo, 2 CPU cores; bf16", cpus["layouts_bfloat16"]),
    ]
    for name, layouts in certificates:
        worst = {key: max(row["deviations"][key] for row in layouts) for key in layouts[0]["deviations"]}
        within = sum(not row["beyond"] for row in layouts)
        lines.append(
            f"| certificate of `lfm_debug` against one process | {within} of {len(layouts)} layouts "
            f"within bounds; largest relative deviation: loss {worst['loss']:.0e}, gradient of a parameter "
            f"{worst['gradient']:.0e}, norm {worst['norm']:.0e}, auxiliary losses {worst['auxiliary']:.0e} | {name} |"
        )
    return lines


def _certified(name: str, dtype: str) -> list[dict]:
    return [row for row in load(name)["certificates"] if row["dtype"] == dtype]


def scaling_table() -> str:
    """Every layout of four and of two GPUs, next to one GPU in the same session."""
    lines = [
        "| GPUs | layout | tokens/s per GPU (slowest to fastest step) | of one GPU | MFU attended | peak GiB | "
        "communication alone | neither | waiting for other stages: predicted, measured by stage | kernels a step |",
        "| --- " * 10 + "|",
    ]
    for result in (load("scale_out_4xh200"), load("layouts_2xh200")):
        one = next(row for row in result["layouts"] if row["gpus"] == 1)
        for row in result["layouts"]:
            slow, fast = row["range"]
            shares = {key: statistics.mean(part[key] for part in row["profile"]) for key in row["profile"][0]}
            waiting = ""
            if "waiting" in row:
                size = row["gpus"] // (_stages(row).count("/") + 1)
                stages = [row["waiting"][rank : rank + size] for rank in range(0, row["gpus"], size)]
                measured = ", ".join(f"{statistics.mean(ranks):.0%}" for ranks in stages)
                waiting = f"{row['waiting_predicted']:.0%}; {measured}"
            lines.append(
                f"| {row['gpus']} | {row['layout']}{_stages(row)} | {row['tokens_per_second_per_gpu']:,.0f} "
                f"({slow:,.0f} to {fast:,.0f}) | "
                f"{row['tokens_per_second_per_gpu'] / one['tokens_per_second_per_gpu']:.1%} | "
                f"{row['mfu_attended']:.1%} | {max(row['peak_memory_gib']):.1f} | "
                f"{shares['collective'] + shares['send_receive']:.0%} | {shares['idle']:.0%} | {waiting} | "
                f"{shares['kernels']:,.0f} |"
            )
    return "\n".join(lines)


def moved_table() -> str:
    """A checkpoint saved under one layout and continued under others."""
    whole, small = load("scale_out_4xh200"), load("checkpoint_moved_cpu")
    on_gpus = f"LFM-3B, bf16, four {whole['environment']['gpu']}"
    moves = [(on_gpus, 4, whole["checkpoint_moved"])]
    moves += [(f"`lfm_debug`, fp32, {move['processes']} processes", 6, move) for move in small["moves"]]
    lines = ["| model, on | saved and continued under | step 5 | step 6 | step 7 |", "| --- " * 5 + "|"]
    for where, digits, move in moves:
        for name, losses in move["losses"].items():
            first = next(iter(move["losses"])) == name
            layout = f"{name}, not interrupted" if first else name
            shown = " | ".join(f"{losses[str(step)]:.{digits}f}" for step in (5, 6, 7))
            lines.append(f"| {where if first else ''} | {layout} | {shown} |")
    return "\n".join([*lines, "", f"Four GPUs {whole['date']}, processes on CPUs {small['date']}, 1 run each."])


def two_gpus_table() -> str:
    """Layouts of two GPUs by two commits, each next to one GPU of the same host, in one session."""
    result = load("model_two_gpus")
    lines = [
        "| commit | layout | routing | tokens/s per GPU (slowest to fastest step) | of one GPU | MFU attended | "
        "peak GiB | communication alone | neither | kernels a step |",
        "| --- " * 10 + "|",
    ]
    for session in (result["before"], result):
        commit = session["environment"]["commit"]
        one = next(row for row in session["layouts"] if row["gpus"] == 1)
        for row in session["layouts"]:
            routings = {"real": row} | ({"balanced": row["balanced"]} if row["gpus"] > 1 and "balanced" in row else {})
            for routing, found in routings.items():
                slow, fast = found["range"]
                shares = {key: statistics.mean(part[key] for part in found["profile"]) for key in found["profile"][0]}
                communication = shares["collective"] + shares["send_receive"]
                lines.append(
                    f"| {commit} | {row['layout']}{_stages(row)} | {routing} | "
                    f"{found['tokens_per_second_per_gpu']:,.0f} ({slow:,.0f} to {fast:,.0f}) | "
                    f"{found['tokens_per_second_per_gpu'] / one['tokens_per_second_per_gpu']:.1%} | "
                    f"{found['mfu_attended']:.1%} | {max(found['peak_memory_gib']):.1f} | "
                    f"{communication:.0%} | {shares['idle']:.0%} | {shares['kernels']:,.0f} |"
                )
    return "\n".join([*lines, "", f"NVIDIA H200 of one host, torch 2.11.0, {result['date']}, 1 run each."])


def _stages(row: dict) -> str:
    found = re.search(r"stages (.*), balance", row["describe"])
    return f" ({found[1].replace(' | ', '/').replace(' ', '')})" if found else ""


OPS = ("reservoir", "diagonal_scan", "moe", "head", "rotary", "rms_norm", "accumulation", "adamw", "liquid_cell")


def kernels_table() -> str:
    """Every case of launch/bench.py on a GPU, next to its floor and its best peer."""
    head = "| op | case | ms | reached | floor, ms | times the floor | best peer, ms | largest error |"
    lines = [head, "| --- " * 8 + "|"]
    missing = [op for op in OPS if not (RESULTS / f"op_{op}.json").exists()]
    for op in OPS:
        for case in load(f"op_{op}")["cases"] if op not in missing else ():
            milliseconds, floor = 1e3 * case["seconds"], 1e3 * case["floor_seconds"]
            peers = {name: seconds for name, seconds in case["peers"].items() if seconds is not None}
            best = min(peers, key=lambda name: peers[name], default=None)
            beside = "" if best is None else f"{1e3 * peers[best]:.3f} ({best})"
            reached = rate(case["floor_kind"], case["flops"], case["bytes"], case["seconds"])
            lines.append(
                f"| {op} | {case['name']} | {milliseconds:.3f} | {reached} | {floor:.4f} ({case['floor_kind']}) | "
                f"{milliseconds / floor:,.1f} | {beside} | {max(case['errors'].values()):.1e} |"
            )
    note = f"On {_where(load('op_diagonal_scan') | {'runs': 1})}."
    days = {op: load(f"op_{op}")["date"] for op in OPS if op not in missing}
    later = [f"{op} {day}" for op, day in days.items() if day != days["diagonal_scan"]]
    note += f" Other days: {', '.join(later)}." if later else ""
    note += f" Nothing is recorded of {', '.join(missing)}." if missing else ""
    return "\n".join([*lines, "", note])


def attention_table() -> str:
    """Every back end on every pattern of documents, next to the floor."""
    result = load("attention")
    lines = [
        "| documents in a row of 8192 | back end | forward, ms | with backward, ms | floor, ms | largest error |",
        "| --- " * 6 + "|",
    ]
    for row in result["rows"]:
        times = [f"{row[key]:.2f}" if key in row else "off" for key in ("forward_ms", "forward_backward_ms")]
        lines.append(
            f"| {row['documents']} | {row['backend']} | {' | '.join(times)} | {row['floor_ms']:.2f} | "
            f"{row['relative_error']:.1e} |"
        )
    versions = "".join(f", {name} {version}" for name, version in result.get("packages", {}).items())
    return "\n".join([*lines, "", f"On {_where(result)}{versions}."])


def families_table() -> str:
    """Training speed of the smaller families' presets beside the original code's."""
    result = load("families")
    lines = [
        "| preset | parameters | tokens a step | steps | tokens/s (slowest to fastest window) | original | loss | "
        "peak GiB |",
        "| --- " * 8 + "|",
    ]
    for row in result["presets"]:
        slow, fast = row["range"]
        speed = f"{row['tokens_per_second']:,.0f} ({slow:,.0f} to {fast:,.0f})"
        original = row["original_tokens_per_second"]
        if "plasticity_off" in row:
            phases = ("off", "on")
            speed = ", ".join(f"{row[f'plasticity_{phase}']:,.0f} with plasticity {phase}" for phase in phases)
            original = original and " and ".join(f"{original[phase]:,}" for phase in phases)
        elif original is not None:
            original = f"{original:,}"
        lines.append(
            f"| `{row['name']}` | {row['parameters']:,} | {row['tokens_per_step']:,} | {row['steps']:,} | {speed} | "
            f"{original or ''} | {row['first_loss']:.2f} to {row['last_loss']:.2f} | {row['memory_gib']:.1f} |"
        )
    later = {row["name"]: row["date"] for row in result["presets"] if row["date"] != result["date"]}
    note = f"On {_where(result)} each."
    for day in sorted(set(later.values())):
        note += f" On {day}: {', '.join(f'`{name}`' for name in later if later[name] == day)}."
    return "\n".join([*lines, "", note])


def trainings_table() -> str:
    """Presets that were trained to their ends, and what they write."""
    lines = [
        "| run | text | tokens (readings) | learning rate, dtype | tokens/s | held-out loss | perplexity | "
        "bits per byte |",
        "| --- " * 8 + "|",
    ]
    runs = trainings.recorded()
    for run in runs:
        _, loss, bits = run["held_out"][-1]
        readings = f" ({run['tokens'] / run['ids']:.1f})" if run["ids"] else ""
        lines.append(
            f"| `{run['name']}`, {run['parameters']:,} | {run['text']} | {run['tokens']:,}{readings} | {run['lr']:g}, "
            f"{run['dtype']} | {run['tokens_per_second']:,.0f} | {loss:.3f} | {math.exp(loss):.2f} | "
            f"{'' if bits is None else f'{bits:.3f}'} |"
        )
    where = {f"{run['environment']['gpu']}, commit {run['environment']['commit'][:7]}, {run['date']}" for run in runs}
    lines += ["", f"On one {'; '.join(sorted(where))}. 1 run each. The perplexity is the exponential of the loss."]
    for run in runs:
        first, *_ = run["sample"].split("\n--------\n")
        quoted = [f"    {line}".rstrip() for line in first.strip().splitlines()[:6]]
        lines += ["", f"`{run['name']}` writes, from its first prompt:", "", *quoted]
    return "\n".join(lines)


def streaming_table() -> str:
    """Milliseconds of a generated token by family and prefix, and the state's size."""
    rows = load("streaming")["rows"]
    prefixes = sorted({row["prefix"] for row in rows})
    lines = [
        f"| preset | {' | '.join(f'{prefix:,} tokens before' for prefix in prefixes)} | bytes of state |",
        "| --- " * (len(prefixes) + 2) + "|",
    ]
    for config in dict.fromkeys(row["config"] for row in rows):
        own = {row["prefix"]: row for row in rows if row["config"] == config}
        times = [f"{own[prefix]['milliseconds_per_token']:.1f} ms" if prefix in own else "" for prefix in prefixes]
        sizes = sorted({row["state_bytes"] for row in own.values()})
        size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        lines.append(f"| `{config}` | {' | '.join(times)} | {size} |")
    return "\n".join(lines)


def prepare_table() -> str:
    """Speed of data preparation, case by case, with what other work the machine had."""
    result = load("prepare")
    lines = [
        "| case | input | ids kept | million ids/s | million ids per CPU second | load before |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    runs: list[dict] = []
    for name, runs in result["runs"].items():
        loads = [run["load_before"] for run in runs]
        lines.append(
            f"| {name} | {runs[0]['input_bytes'] / 1e6:.0f} MB | {runs[0]['tokens'] / 1e6:.1f} M | "
            f"{result['median_tokens_per_second'][name] / 1e6:.2f} | "
            f"{result['median_tokens_per_cpu_second'][name] / 1e6:.2f} | {min(loads):.1f} to {max(loads):.1f} |"
        )
    note = (
        f"On {result['environment']['cores']} cores with {result['workers']} processes and GPT-2's vocabulary, "
        f"{result['date']}, median of {len(runs)} runs. A load above the cores is other work that took turns."
    )
    return "\n".join([*lines, "", note])


def recipe_table() -> str:
    """LFM-3B, published and unit, step by step."""
    result = load("recipe")
    arms = {"published": result["full"][0], "unit": result["full"][1]}
    steps = (1, 4, 10, 25, 40, 60, 80, 120, 200, 300)
    lines = [
        "| step | published: loss | norm | load: mean, worst | validation "
        "| unit: loss | norm | load: mean, worst | validation |",
        "| --- " * 9 + "|",
    ]
    for step in steps:
        cells = []
        for arm in arms.values():
            validation = dict(map(tuple, arm["validation"])).get(step)
            if step > len(arm["loss"]):
                cells += [""] * 4
                continue
            mean, worst = arm["load"][step - 1]
            cells += [f"{arm['loss'][step - 1]:.2f}", f"{arm['norm'][step - 1]:.1f}", f"{mean:.2f}, {worst:.2f}"]
            cells.append("" if validation is None else f"{validation:.3f}")
        lines.append(f"| {step} | {' | '.join(cells)} |")
    data, env = result["data"]["full"]["train"], result["environment"]
    late = arms["unit"]["load"][49:]
    over_mean, over_worst = (sum(load[i] > bound for load in late) for i, bound in ((0, 1.5), (1, 2.0)))
    rates = {name: f"{statistics.median(arm['tokens_per_second']):,.0f}" for name, arm in arms.items()}
    norm = max(arms["unit"]["norm"][3:])
    note = (
        f"On one {env['gpu']}, one arm after the other, torch {env['versions']['torch']}, {result['date']}, one run an "
        f"arm; {result['tokens_per_step']['full']:,} tokens a step of {data['num_tokens']:,} ids of Python source "
        f"(300 steps are {300 * result['tokens_per_step']['full'] / data['num_tokens']:.1f} passes), data set "
        f"{data['checksum'][:16]}. Of the unit arm's steps from 50 on, {over_mean} of {len(late)} have a mean load "
        f"above 1.5 (largest {max(load[0] for load in late):.2f}) and {over_worst} a worst layer above 2 (largest "
        f"{max(load[1] for load in late):.2f}); the largest norm after step 3 is {norm:.1f}. With flash-attn 4 "
        f"and quack-kernels, logging every step, {rates['unit']} tokens/s (published, of wider experts: "
        f"{rates['published']})."
    )
    return "\n".join([*lines, "", note])


def recipe_speed_table() -> str:
    """What the bias and the telemetry of the routers cost, by windows of one process."""
    speed = load("recipe")["speed"]
    lines = ["| windows of a run | tokens/s, median | range |", "| --- | --- | --- |"]
    for name, rates in speed["tokens_per_second"].items():
        lines.append(
            f"| {len(rates)} of {speed['window_steps']} steps, {name} | {statistics.median(rates):,.0f} | "
            f"{min(rates):,} to {max(rates):,} |"
        )
    return "\n".join(lines)


def ladder_table() -> str:
    """Four widths at four learning rates each."""
    return ladder.report(ladder.recorded(), None)


def recipe_study_table() -> str:
    """Every variant of the study, at width 1024 and at full size."""
    result = load("recipe")
    lines = [
        "| variant | first loss | largest loss after it | largest norm after step 3, at step | "
        "load at step 50: mean, worst | validation by step |",
        "| --- " * 6 + "|",
    ]
    for title, rows in (("width 1024", result["study"]), ("full size", [*result["full"][:1], *result["full"][2:]])):
        lines.append(f"| **{title}** | | | | | |")
        for row in rows:
            norm = max(row["norm"][3:])
            mean, worst = row["load"][min(49, len(row["load"]) - 1)]
            at = "" if len(row["load"]) >= 50 else f" (step {len(row['load'])})"
            validation = ", ".join(f"{step}: {loss:.3f}" for step, loss in row["validation"])
            lines.append(
                f"| {row['run']} | {row['loss'][0]:.2f} | {max(row['loss'][1:]):.2f} | {norm:.1f}, "
                f"{row['norm'].index(norm) + 1} | {mean:.2f}, {worst:.2f}{at} | {validation} |"
            )
    return "\n".join(lines)


def plot_recipe(path: Path) -> None:
    """Loss, gradient norm and load of LFM-3B, published and unit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    published, unit = load("recipe")["full"][:2]
    figure, (loss, norm, balance) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for arm, colour in ((published, "#c0504d"), (unit, "#2f6db5")):
        steps = range(1, len(arm["loss"]) + 1)
        loss.plot(steps, arm["loss"], color=colour, alpha=0.35, linewidth=1)
        held_out = f"{arm['run']}, held out"
        loss.plot(*zip(*arm["validation"], strict=True), "o-", color=colour, markersize=3, label=held_out)
        norm.plot(steps, arm["norm"], color=colour, label=arm["run"])
        for index, style in ((0, "-"), (1, ":")):
            values = [each[index] for each in arm["load"]]
            name = f"{arm['run']}, {('mean of layers', 'worst layer')[index]}"
            balance.plot(steps, values, style, color=colour, linewidth=1, label=name)
    loss.set(xlabel="step of 65,536 tokens", ylabel="cross entropy (nats)")
    norm.set(xlabel="step", ylabel="gradient norm", yscale="log")
    balance.set(xlabel="step", ylabel="load of the fullest expert / mean", ylim=(1, 4.1))
    for axes in (loss, norm, balance):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def plot_scaling(path: Path) -> None:
    """How a step of each layout on four GPUs is spent, scaled to its share of one GPU's speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = load("scale_out_4xh200")
    rows = sorted(result["layouts"], key=lambda row: row["tokens_per_second_per_gpu"])
    one = next(row for row in rows if row["gpus"] == 1)
    figure, axes = plt.subplots(figsize=(10, 0.42 * len(rows) + 1.4))
    parts = {"compute": "#2f6db5", "collective": "#e0803c", "send_receive": "#c9a227", "idle": "#c8c8c8"}
    labels = {
        "compute": "computing",
        "collective": "collectives alone",
        "send_receive": "send, receive, all-to-all alone",
        "idle": "neither",
    }
    for index, row in enumerate(rows):
        time = one["tokens_per_second_per_gpu"] / row["tokens_per_second_per_gpu"]
        left = 0.0
        for part, colour in parts.items():
            width = time * statistics.mean(profile[part] for profile in row["profile"])
            axes.barh(index, width, left=left, color=colour, label=labels[part] if index == 0 else None)
            left += width
        axes.text(left + 0.02, index, f"{1 / time:.0%}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["layout"] + _stages(row) for row in rows], fontsize=9)
    axes.set_xlabel("time per token and GPU, one GPU = 1 (number: share of one GPU's speed)")
    axes.legend(loc="upper right", fontsize=9)
    axes.set_title(f"LFM-3B on four GPUs of one host, {result['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def tokenizers_table() -> str:
    result = load("real_tokenizers")
    lines = [
        "| file | package | ids | end | documents that differ | streams that differ | a million characters |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        known = f"| {row['name']} | `{row['package']}` |"
        if "refused" in row:
            lines.append(f"{known} refused: {row['refused'].partition('; ')[2]} | | | | |")
            continue
        lines.append(
            f"{known} {row['vocab_size']:,} | {row['eod_id']:,} | {row['documents_that_differ']} of "
            f"{row['documents']} | {row['streams_that_differ']} of {row['streams']} | "
            f"{row['million_characters_seconds']:.1f} s |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    where = f"2 busy CPU cores, {versions}, {result['date']}, measured in several runs; the slowest of 8 characters."
    return "\n".join([*lines, "", where])


def ablation_table(name: str) -> str:
    """The table and the picture of a set of `lfm ablate`, from its RESULT.json."""
    if not (RESULTS / f"ablation_{name}.json").exists():
        return "Nothing is recorded."
    picture = f"\n\n![Held-out loss over tokens, FLOPs and seconds; bits per byte](ablation_{name}.png)"
    return ablation.markdown(load(f"ablation_{name}")) + (picture if _ablation_picture(name).exists() else "")


def _ablation_picture(name: str) -> Path:
    return ROOT / f"docs/ablation_{name}.png"


def plot_ablations() -> None:
    """The picture of every recorded set."""
    from lfm.experiments.figures import picture

    for name in ABLATIONS:
        if (RESULTS / f"ablation_{name}.json").exists():
            image = picture(load(f"ablation_{name}"))
            if image is not None:
                _ablation_picture(name).write_bytes(image)


def serving_table() -> str:
    """Tokens a second by sequences at once, time to the first token of many clients, bytes of states."""
    result = load("serving")
    of = {section: [row for row in result["rows"] if row["section"] == section] for section in serving.SECTIONS}
    lines = [
        "| preset | sequences | recorded steps, tokens/s | plain steps | transformers' `generate` |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in of["speed"]:
        speeds = [row.get(f"tokens_per_second_{kind}") for kind in ("graph_auto", "graph_off", "transformers")]
        shown = [f"{speed:,.0f}" if speed is not None else "" for speed in speeds]
        lines.append(f"| `{row['config']}` | {row['batch']} | {' | '.join(shown)} |")
    lines += [
        "",
        "| preset | clients at once | prompts, in pieces of | first token, s: median, 95th percentile | tokens/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in of["first_token"]:
        shortest, longest = row["prompts"]
        prompts = f"{shortest} to {longest:,}, {row['prefill_tokens']:,}"
        first = ", ".join(f"{row[f'first_token_p{share}_seconds']:.2f}" for share in (50, 95))
        who = f"`{row['config']}`, {row['over']} | {row['clients']}"
        lines.append(f"| {who} | {prompts} | {first} | {row['tokens_per_second']:,.0f} |")
    lines += ["", "| preset | bytes of a conversation's state | of all slots | grows |", "| --- | --- | --- | --- |"]
    for row in sorted(of["memory"], key=lambda row: row["bytes_of_one_state"]):
        grows = "with the conversation" if row["grows"] else "no"
        sizes = f"{row['bytes_of_one_state']:,} | {row['bytes_of_slots_later']:,}"
        lines.append(f"| `{row['config']}` | {sizes} | {grows} |")
    row = of["memory"][0]
    memory = f"Memory: {row['conversations']} conversations of {row['tokens']:,} tokens."
    later = f"First tokens: {_where(result['first_token'])}." if "first_token" in result else ""
    return "\n".join([*lines, "", f"On {_where(result)}; random weights in bf16. {memory} {later}".rstrip()])


ABLATIONS = ("families", "lfm", "norms", "laerc_reservoir", "plasticity")
"""Sets of configs/ablation that docs/ablation.md shows."""


def _where(result: dict) -> str:
    torch = result["environment"]["versions"]["torch"]
    how_often = f"median of {result['calls']} calls" if "calls" in result else f"{result['runs']} run"
    return f"one {result['environment']['gpu']}, torch {torch}, {result['date']}, {how_often}"


PAGES = {
    "README.md": {"results": table},
    "docs/scaling.md": {"scaling": scaling_table, "two-gpus": two_gpus_table, "moved": moved_table},
    "docs/performance.md": {
        "runs": runs_table,
        "speeds": lambda: page.speeds(page.recorded(RESULTS, "model")),
        "waterfalls": lambda: page.waterfalls(page.recorded(RESULTS, "model"), WATERFALL),
        "collectives": lambda: page.collectives(page.recorded(RESULTS, "model")),
        "peers": lambda: page.peers(page.recorded(RESULTS, "peer")),
        "small": lambda: page.small(page.recorded(RESULTS, "small")),
    },
    "docs/kernels.md": {"kernels": kernels_table, "attention": attention_table},
    "docs/data.md": {"tokenizers": tokenizers_table, "prepare": prepare_table},
    "docs/recipe.md": {
        "recipe": recipe_table,
        "speed": recipe_speed_table,
        "study": recipe_study_table,
        "ladder": ladder_table,
    },
    "docs/ablation.md": {name: functools.partial(ablation_table, name) for name in ABLATIONS},
    "docs/medical.md": {"measured": lambda: medical.table(load("medical"))},
    "docs/serving.md": {"serving": serving_table},
    "docs/families/README.md": {
        "families": families_table,
        "trainings": trainings_table,
        "streaming": streaming_table,
    },
}
"""Page -> name of the mark around a table -> what writes it."""


def main() -> None:
    if "--check" not in sys.argv:
        page.plot(page.recorded(RESULTS, "model"), WATERFALL)  # a page shows it where it is there
        plot_ablations()
    for name, tables in PAGES.items():
        path = ROOT / name
        text = wanted = path.read_text(encoding="utf-8")
        for mark, write in tables.items():
            begin, end = f"<!-- {mark}: python benchmarks/table.py -->", f"<!-- /{mark} -->"
            before, _, rest = wanted.partition(begin)
            _, _, after = rest.partition(end)
            wanted = f"{before}{begin}\n{write()}\n{end}{after}"
        if "--check" in sys.argv and wanted != text:
            sys.exit(f"the tables of {name} differ from benchmarks/results; run benchmarks/table.py")
        path.write_text(wanted, encoding="utf-8")
    if "--check" not in sys.argv:
        plot_scaling(ROOT / "docs/scaling.png")
        plot_recipe(ROOT / "docs/recipe.png")
        medical.picture(load("medical"), ROOT / "docs/medical.png")
        trainings.picture(trainings.recorded(), trainings.IMAGE)
        ladder.report(ladder.recorded(), ROOT / "docs/ladder.png")


if __name__ == "__main__":
    main()
