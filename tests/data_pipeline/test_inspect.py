import os
from html.parser import HTMLParser

import pytest

from data_pipeline.inspect import main
from data_pipeline.prepare import prepare
from tests.data.corpus import config, texts, write_texts


def test_statistics_are_those_of_the_report_and_the_page_stands_alone(tmp_path, capsys):
    source = write_texts(tmp_path / "text", [*texts(60), texts(1)[0], "<b>"])
    sources = [{"kind": "text", "name": "a < b", "paths": [str(source)], "clean": {"min_chars": 4}}]
    report = prepare(config(source, tmp_path / "data", sources=sources))
    capsys.readouterr()
    main([str(tmp_path / "data"), "--html", str(tmp_path / "page.html")])
    shown = capsys.readouterr().out
    for count in (report["stages"]["limit"]["bytes"], report["stages"]["encode"]["tokens"]):
        assert f"{count:,}" in shown
    assert sum(report["document_lengths"].values()) == report["stages"]["encode"]["documents"]
    page = (tmp_path / "page.html").read_text()
    assert "<pre>&lt;b&gt;</pre>" in page and "a &lt; b" in page and "min_chars" in page

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "img") and not {"src", "href"} & {name for name, _ in attrs}

    Links().feed(page)

    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "data"), "--html", str(tmp_path / "fifo")])
    assert "fifo cannot be written: No such device or address; choose another file" in capsys.readouterr().err


def test_a_source_of_which_nothing_was_taken_counts_as_nothing(tmp_path, capsys):
    first, second = (write_texts(tmp_path / name, texts(60)) for name in ("a", "b"))
    sources = [{"kind": "text", "name": path.name, "paths": [str(path)]} for path in (first, second)]
    report = prepare(config(first, tmp_path / "data", sources=sources, max_documents=20))
    assert report["sources"][1] == dict.fromkeys(report["sources"][0], 0) | {"name": "b"}
    main([str(tmp_path / "data")])
    assert "Bytes of text kept, by source\n  a" in capsys.readouterr().out


def test_a_folder_that_is_no_data_set_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "holds no report.json of data_pipeline.prepare; give the folder" in capsys.readouterr().err
