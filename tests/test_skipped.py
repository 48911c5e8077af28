from __future__ import annotations

from uvit.data.skipped import describe_skipped, report_skipped


def test_each_image_is_listed_and_printed_once(tmp_path, capsys):
    assert describe_skipped(tmp_path) == ""
    report_skipped(tmp_path, [])
    assert not list(tmp_path.iterdir())
    report_skipped(tmp_path, ["image 1", "image 2"])
    report_skipped(tmp_path, ["image 2", "image 3", "image 3"])
    assert (tmp_path / "skipped.txt").read_text() == "image 1\nimage 2\nimage 3\n"
    assert capsys.readouterr().err == "skipped: image 1\nskipped: image 2\nskipped: image 3\n"
    assert describe_skipped(tmp_path) == f"; 3 could not be read, listed in {tmp_path / 'skipped.txt'}"
