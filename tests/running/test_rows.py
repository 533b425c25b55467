import json
import zipfile

import pyarrow
import pytest
from pyarrow import parquet

from portllm.errors import DataError
from portllm.running.rows import first_row, read_lines, read_rows, row_texts

ROWS = [{"q": "who?", "n": 7, "is": True}, {"q": 'a "quote",\nand a line', "n": 8, "is": False}]


def read(path):
    return read_rows(path, dict, what="rows")


def as_jsonl(file):
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def as_array(file):
    file.write_text("\ufeff \n" + json.dumps(ROWS, indent=1))


def as_parquet(file):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


@pytest.mark.parametrize(
    ("name", "write"), [("a.jsonl", as_jsonl), ("a.json", as_array), ("a", as_array), ("a.parquet", as_parquet)]
)
def test_the_same_rows_are_read_whatever_they_are_written_as(tmp_path, name, write):
    write(tmp_path / name)
    assert read(tmp_path / name) == [{**row, "n": str(row["n"])} for row in ROWS]
    assert first_row(tmp_path / name)["q"] == "who?"


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_tables_are_read_by_the_names_in_their_first_line(tmp_path, name, separator):
    file = tmp_path / name
    file.write_text(f'\ufeffq{separator}n\r\nwho?{separator}7\r\n\r\n"a ""quote"",\nand a line"{separator}8\r\n')
    assert read(file) == [{"q": "who?", "n": "7"}, {"q": 'a "quote",\nand a line', "n": "8"}]


def test_tabs_between_the_columns_of_a_csv_file_are_seen(tmp_path):
    (tmp_path / "a.csv").write_text("q\tn\nwho, then?\t7\n")
    assert read(tmp_path / "a.csv") == [{"q": "who, then?", "n": "7"}]


def test_messages_in_a_parquet_file_are_objects(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            '{"q": "a"}\n'.encode("utf-16"),
            "is UTF-16; .* Run: iconv -f UTF-16 -t UTF-8 .*a.jsonl > .*a-utf8",
        ),
        ("a.jsonl", '{"q": "a"}\n'.encode("utf-16-le"), "iconv -f UTF-16LE"),
        ("a.jsonl", '{"q": "a"}\n'.encode("utf-16-be"), "iconv -f UTF-16BE"),
        ("a.jsonl", '{"q": "é"}\n'.encode("latin-1"), "byte 8 is not UTF-8(.|\n)*iconv -f ISO-8859-1"),
        ("a.csv", "q\né\n".encode("latin-1"), "is not UTF-8. .*iconv -f ISO-8859-1"),
        ("a.json", '[{"q": "é"}]'.encode("latin-1"), "byte 9 is not UTF-8. .*iconv -f ISO-8859-1"),
        ("a.json", b'[{"q": "a"}', "begins as a JSON array, but is none"),
        ("a.json", b"[1]", "row 1: is a text or a number; expected an object"),
        ("a.jsonl", b"{'q': 'a'}\n", "These are Python's dicts, not JSON: write each row with json.dumps"),
        ("a.jsonl", b'{"q": "a"},\n{"q": "b"},\n', "Rows are followed by commas: remove these"),
        ("a.jsonl", b"question\ttype\nwho?\tperson\n", "If this is TSV, give it the suffix .tsv"),
        ("a.jsonl", b"question,type\nwho?,person\n", "If this is CSV, give it the suffix .csv"),
        ("a.json", b'{\n"q": "a"\n}\n', "is one JSON object over several lines; .* Run: jq -c . "),
        ("a.json", b'{\n"rows": [\n{"q": "a"}\n]}\n', "Run: jq -c '.rows\\[\\]' "),
        ("a.json", b'{\n"rows": [\n', "is neither rows of JSON nor one JSON object"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "compressed with gzip. Run: gunzip"),
        ("a.xlsx", b"PK\x03\x04", "is an Excel workbook. Save the sheet as CSV"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1", "is an Excel workbook of the old kind. Save the sheet as CSV"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", "is a web page"),
        ("a.jsonl", b"%PDF-1.7", "is a PDF"),
        ("a.zip", b"PK\x03\x04", "is a ZIP archive. Run: unzip "),
        ("a.parquet", b"PAR1" + b"\0" * 64, "is not a valid Parquet file"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "Run: git lfs pull"),
        ("a.csv", b"q,q\na,b\n", "column 'q' stands twice"),
        ("a.csv", b"q,n\na,b,c\n", "line 2: has 3 columns, the first line names 2"),
        ("a.csv", b'q\n"a\n', "is not valid CSV"),
        ("a.csv", b"q\n", "has no rows"),
    ],
)
def test_what_is_not_understood_is_named_with_what_helps(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read(tmp_path / name)


def test_a_folder_names_the_files_in_it(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"is a folder, not a file. Pass a file of it: train.jsonl"):
        read(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").write_text("")
    with pytest.raises(DataError, match=r"Pass a file of it: data/train-0.parquet, train.jsonl"):
        read(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="load_from_disk"):
        read(tmp_path)


def test_problems_that_are_alike_are_told_once_with_the_field_that_was_meant(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"Question": "a"}\n' * 3 + '{"b": 1}\n')
    with pytest.raises(DataError, match=r"4 of 4 rows") as refused:
        read_rows(tmp_path / "a.jsonl", lambda row: row_texts(row, ["question"]), what="rows")
    assert str(refused.value).splitlines()[1:] == [
        "  line 1 and 2 more: no field 'question' (the row has 'Question'; did you mean 'Question'?)",
        "  line 4: no field 'question' (the row has 'b')",
    ]


def test_the_folder_of_a_model_is_no_data_and_a_mistyped_name_is_known(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="is the folder of a model or an adapter. Pass the file with your rows"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"Did you mean '.*/config.json'\?"):
        read(tmp_path / "confg.json")


def test_a_data_set_of_the_hub_is_named_with_its_address():
    with pytest.raises(DataError, match="has the address hf://datasets/stanfordnlp/imdb/SPLIT"):
        read("stanfordnlp/imdb")
    with pytest.raises(DataError, match="download what is there, and pass the file"):
        read("https://example.org/train.parquet")


def test_a_row_is_not_taken_for_another_encoding_by_what_its_fields_are_called(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"is not UTF-8": null, "is not JSON": 1, "comma": 2}\n')

    def needs_text(row):
        return row_texts(row, ["is not UTF-8", "is not JSON"])

    with pytest.raises(DataError, match="is null; expected text") as refused:
        read_rows(tmp_path / "a.jsonl", needs_text, what="rows")
    assert "iconv" not in str(refused.value)
    assert ".csv" not in str(refused.value)


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("xl/workbook.xml", "is an Excel workbook. Save the sheet as CSV"),
        ("content.xml", "is a workbook of LibreOffice"),
        ("archive/data.pkl", "is a file of PyTorch"),
        ("rows/{a}\x1b.jsonl", r"unzip .*a -d rows, and pass a file of it. It holds rows/\{a\}\?.jsonl"),
    ],
)
def test_an_archive_is_named_for_what_stands_in_it(tmp_path, inside, said):
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr(inside, "x")
    with pytest.raises(DataError, match=said):
        read(tmp_path / "a")


def test_plain_text_of_another_kind_is_named_as_rows_are(tmp_path):
    (tmp_path / "a.txt").write_bytes("who?\n".encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16"):
        read_lines(tmp_path / "a.txt")
