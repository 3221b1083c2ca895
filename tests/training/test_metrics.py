import json

import pytest

from lfm.training.metrics import PEAK_FLOPS, LoggingConfig, Metrics, peak_flops


def logged(step, loss):
    return {"step": step, "mean_cross_entropy": loss, "next_lr": 0.1}


def test_records_that_are_cut_back_are_replaced_in_every_file(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = LoggingConfig(steps_per_epoch=4)
    with Metrics(config, tmp_path, name="a", resumed_step=0, run_config={}) as metrics:
        for step in range(1, 6):
            metrics.write(logged(step, 1.0))
        metrics.truncate(2)
        for step in range(3, 5):
            metrics.write(logged(step, 2.0))
    with Metrics(config, tmp_path, name="a", resumed_step=3, run_config={}) as metrics:
        metrics.write(logged(4, 3.0))
    want = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0)]
    lines = [json.loads(line) for line in metrics.file.read_text().splitlines()]
    assert [(line["step"], line["mean_cross_entropy"]) for line in lines] == want
    header, *rows = (tmp_path / "loss_log.csv").read_text().splitlines()
    assert header.startswith("global_step,")
    assert [(int(row.split(",")[0]), float(row.split(",")[3])) for row in rows] == want
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("mean_cross_entropy")] == want


def test_a_file_that_cannot_be_cut_back_is_dropped_with_one_message(tmp_path, capsys):
    with Metrics(LoggingConfig(tensorboard=False), tmp_path, name="a", resumed_step=0, run_config={}) as metrics:
        metrics.write(logged(1, 1.0))
        metrics.file.unlink()
        metrics.file.mkdir()
        metrics.truncate(0)
        metrics.write(logged(1, 1.0))
    assert capsys.readouterr().err.count("logging to metrics.jsonl is off from now on") == 1


def test_peaks_are_found_by_the_names_that_drivers_give():
    names = {
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA A100 80GB PCIe": "A100",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA H100 NVL": "H100 NVL",
        "NVIDIA H200": "H200",
        "NVIDIA H200 NVL": "H200 NVL",
        "NVIDIA GH200 480GB": "GH200",
        "NVIDIA H20": "H20",
        "NVIDIA B200": "B200",
        "NVIDIA L4": "L4",
        "NVIDIA L40S": "L40S",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA GeForce RTX 5090": "RTX 5090",
        "Tesla T4": "T4",
        "AMD Instinct MI300X": "MI300X",
    }
    assert set(names.values()) == PEAK_FLOPS.keys()
    assert {name: peak_flops(name) for name in names} == {name: PEAK_FLOPS[chip] for name, chip in names.items()}
    unknown = ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    assert not any(map(peak_flops, [*unknown, "NVIDIA GeForce RTX 3060", "NVIDIA L40", "", None]))
