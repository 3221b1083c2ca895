"""Small sets of questions in their published formats; the words are made up."""

import json
import random
from pathlib import Path

LABELS = ("blood", "bone", "brain", "heart")
WORDS = {
    "blood": ["clot", "plasma", "anemia", "platelet"],
    "bone": ["marrow", "fracture", "spine", "joint"],
    "brain": ["cortex", "seizure", "stroke", "nerve"],
    "heart": ["valve", "beat", "artery", "pulse"],
}


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def labelled(folder: Path, *, kind: str = "icd10", per_part: dict[str, int] | None = None, unsure: float = 0.3) -> Path:
    """As data_pipeline.labelled makes them: words of a label, or, of the share `unsure`, of two labels alike."""
    draws = random.Random(kind)
    number = 0
    for part, count in (per_part or {"train": 1200, "validation": 800, "test": 400}).items():
        rows = []
        for _ in range(count // 2):
            label = draws.choice(LABELS)
            for copy in range(2):
                words = draws.choices(WORDS[label], k=2)
                if draws.random() < unsure:
                    words = [draws.choice(WORDS[label]), draws.choice(WORDS[draws.choice(LABELS)])]
                draws.shuffle(words)
                end = ", unspecified" if copy else ""
                rows.append({"text": f"{' '.join(words)}{end}", "label": label, "group": f"g{number}"})
            number += 1
        lines(folder / f"{part}.jsonl", rows)
    (folder / "labels.json").write_text(json.dumps(LABELS), encoding="utf-8")
    report = {"config": {"source": {"kind": kind}}, "baselines": {}}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def medmcqa(folder: Path) -> Path:
    row = {"opa": "A one", "opb": "B two", "opc": "C three", "opd": "D four", "choice_type": "single", "exp": None}
    row |= {"subject_name": "Anatomy", "topic_name": None}
    train = [{**row, "id": str(i), "question": f"Which bone is number {i}?", "cop": 1 + i % 4} for i in range(40)]
    same = {**row, "id": "x", "question": "which bone is NUMBER 3", "cop": 4}
    dev = [{**row, "id": "y", "question": "Which nerve?", "cop": 2, "choice_type": "multi"}]
    lines(folder / "train.json", train)
    lines(folder / "dev.json", [*dev, same])
    return folder


def medqa(folder: Path) -> Path:
    row = {"options": {"A": "Rest", "B": "Ice", "C": "Heat", "D": "None", "E": "Both"}, "meta_info": "step1"}

    def rows(part: str, count: int) -> list[dict]:
        return [
            {**row, "question": f"A {part} patient of {i} years?", "answer_idx": idx, "answer": row["options"][idx]}
            for i in range(count)
            for idx in "BC"[i % 2]
        ]

    lines(folder / "phrases_no_exclude_train.jsonl", rows("young", 40))
    lines(folder / "phrases_no_exclude_dev.jsonl", rows("grown", 10))
    lines(folder / "phrases_no_exclude_test.jsonl", rows("old", 5))
    return folder


def pubmedqa(folder: Path) -> Path:
    entries = {
        str(1000 + i): {
            "QUESTION": f"Does treatment {i} help?",
            "CONTEXTS": ["Some were treated.", "Others were not."],
            "LABELS": ["METHODS", "RESULTS"],
            "MESHES": [],
            "YEAR": "2010",
            "final_decision": ("yes", "no", "maybe")[i % 3],
            "LONG_ANSWER": "It may.",
        }
        for i in range(40)
    }
    folder.mkdir(parents=True)
    (folder / "ori_pqal.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder
