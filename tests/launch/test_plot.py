"""`lfm plot`: a picture and a page of one run or several."""

import json
import re
from pathlib import Path

import pytest


def run_folder(folder: Path, steps: int = 30, **more) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "tokens": 1000 * step,
                "lr": 1e-3,
                "cross_entropy": 9 - step / 10,
                "grad_norm": 1.0,
                "tokens_per_second": 1000.0 + step,
                "expert_load": [[0.5, 0.25, 0.125, 0.125], [0.25] * 4],
                "reservoir_saturation": {"0": 0.1, "4": 0.2},
                **more,
            }
        )
        if step % 10 == 0:
            lines.append({"step": step, "tokens": 1000 * step, "validation_loss": 8.5, "validation_bits_per_byte": 2.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "to')
    (folder / "config.yaml").write_text(f"name: {folder.name}\noptimizer: {{lr: 0.001}}\n")
    return folder


@pytest.fixture
def plot(lfm, tmp_path):
    return lambda *arguments: lfm("plot", *arguments, cwd=tmp_path)


def test_runs_become_one_picture_and_one_page_without_outside_resources(tmp_path, plot):
    one = run_folder(tmp_path / "a<b>" / "small")
    other = run_folder(tmp_path / "c" / "small", loss_scale=65536.0, skipped_updates=3)
    done = plot(one, other)
    assert (done.returncode, done.stdout) == (0, "plots/plot.png\nplots/plot.html\n"), done.stderr
    assert (tmp_path / "plots/plot.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "plots/plot.html").read_text()
    assert "a&lt;b&gt;/small" in page and "c/small" in page and "<b>" not in page  # names are told apart, and quoted
    assert "<td>best held-out bits per byte</td><td>2.5000</td><td>2.5000</td>" in page
    assert "<td>updates skipped</td><td></td><td>3</td>" in page
    titles = re.findall(r"<figure>", page)
    assert len(titles) == 8 and "loss scale of float16" in page and "MFU" not in page  # panels that any run has
    assert not re.search(r"(src|href)=[\"'](?!#)|@import|url\((?!#)", page.replace('xlink:href="#', ""))
    # One run alone: into its own folder, with its configuration.
    assert plot(one).returncode == 0
    assert "<td>optimizer.lr</td><td>0.001</td>" in (one / "plots/plot.html").read_text()


@pytest.mark.slow
def test_names_and_records_of_any_kind(tmp_path, plot):
    one = run_folder(tmp_path / "_a$\\frac$b")
    bad = (
        '{"step": 40, "tokens": "x", "cross_entropy": "bad"}',
        '{"step": 41, "tokens": 41000, "cross_entropy": null, "expert_load": [1, 2], "router_entropy": {"0": null}}',
        '{"step": 41, "tokens": 41500, "reservoir_saturation": {"0": 0.5, "4": NaN}}',
        '{"step": 42, "cross_entropy": 3.0, "expert_load": [[]], "grad_norm": 1' + "0" * 400 + "}",
        '{"step": 43, "tokens": 43000, "validation_loss": NaN}',
    )
    with (one / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(bad) + "\n")
    for config in ("x: 2020-01-01", "x: !!binary aGVsbG8=", "x: &a {b: *a}", "x: " + "[" * 3000, 'x: "\\ud800"', "- 1"):
        (one / "config.yaml").write_text(config + "\n")
        done = plot(one)
        assert done.returncode == 0, (config, done.stderr)
    page = (one / "plots/plot.html").read_text()
    assert page.count("_a$\\frac$b") > 8  # the title, the table, and a legend a panel
    assert "<td>best held-out loss (nats)</td><td>8.5000</td>" in page


def test_what_cannot_be_plotted_is_a_sentence(tmp_path, plot):
    run = run_folder(tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    (early := tmp_path / "early").mkdir()
    (early / "metrics.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    for arguments, sentence in (
        ([empty], "has no metrics.jsonl; name a run folder"),
        ([early], "has no record of a step yet"),
        ([run, run], "is named twice"),
        ([run, "--out", tmp_path / "file" / "x"], "give another folder with --out DIR"),
    ):
        done = plot(*arguments)
        assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "plots").exists()
