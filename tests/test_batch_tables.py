"""Prompt tables as programs write them, and what is said of those that cannot be understood."""

import io
import json

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bonsai_image.loaders import ModelFileError
from bonsai_image.standalone.batch import rows


def twice() -> bytes:
    """Parquet with two columns of one name."""
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"]), stream)
    return stream.getvalue()


PLAIN = "prompt,seed,width,lora_strength\n\"a, b\",42,128,0.8\nc,7,,\n"
MADE = [rows.Row("a, b", 42, 128, lora_strength=0.8), rows.Row("c", 7)]
FRAME = pandas.DataFrame({"prompt": ["a, b", "c"], "seed": [42, 7], "width": [128, None], "lora_strength": [0.8, None]})


def exported(separator: str, comma: str = ".") -> str:
    return PLAIN.replace(",", separator).replace(f"a{separator} b", "a, b").replace("0.8", f"0{comma}8")


#: Name and content of files that all say MADE.
SAME = {
    "pandas": ("a.csv", FRAME.to_csv(index=False)), "pandas with its index": ("a.csv", FRAME.to_csv()),
    "pandas with NaN": ("a.csv", FRAME.to_csv(na_rep="NaN")),
    "pandas in Europe": ("a.csv", FRAME.to_csv(sep=";", decimal=",")),
    "pandas, many digits": ("a.csv", FRAME.to_csv(float_format="%.2f")),
    "pandas, tabs": ("a.tsv", FRAME.to_csv(sep="\t")),
    "pandas, records": ("a.json", FRAME.to_json(orient="records", indent=1)),
    "pandas, lines": ("a.jsonl", FRAME.to_json(orient="records", lines=True)),
    "lines called json": ("a.json", FRAME.to_json(orient="records", lines=True)),
    "json's NaN": ("a.json", json.dumps(FRAME.to_dict("records"))),
    "semicolons": ("a.csv", exported(";", ",")), "tabs": ("a.csv", exported("\t", ",")),
    "bars": ("a.csv", exported("|")),
    "sep=": ("a.csv", "sep=;\r\n" + exported(";", ",")),
    "sep= of a tab": ("a.csv", '"sep=\t"\n' + exported("\t")),
    "byte order mark": ("a.csv", PLAIN.encode("utf-8-sig")), "UTF-16": ("a.csv", PLAIN.encode("utf-16")),
    "UTF-16 LE, sep=": ("a.csv", b"\xff\xfe" + ("sep=;\r\n" + exported(";")).encode("utf-16-le")),
    "UTF-16 BE": ("a.csv", b"\xfe\xff" + exported("\t").encode("utf-16-be")),
    "Windows": ("a.csv", PLAIN.replace("\n", "\r\n")), "old Macintosh": ("a.csv", PLAIN.replace("\n", "\r")),
    "header": ("a.csv", PLAIN.replace("prompt,seed", " Prompt , SEED").replace("lora_strength", "LoRA Strength")),
    "blank lines": ("a.csv", "\n\r\n" + PLAIN.replace("\n", "\n\n") + ",,,\n \n"),
    "trailing separators": ("a.csv", PLAIN.replace("\n", ",,\n")),
    "spaces": ("a.csv", PLAIN.replace(",", ", ").replace("a,  b", "a, b")),
    "a column of numbers without a name, read and written again": ("a.csv", "Unnamed: 0," + PLAIN.replace(
        "\n", "\n0,", 2)), "line breaks in the header": ("a.csv", PLAIN.replace("prompt", '"Prompt\n"')),
    "Parquet": ("a.parquet", FRAME.to_parquet(index=False)),
    "Parquet of some rows": ("a.parquet", FRAME.set_index(pandas.Index([7, 3])).to_parquet()),
    "exponents": ("a.csv", PLAIN.replace("42", "4.2e1").replace("128", "1.28E+2")),
    "json with a mark": ("a.jsonl", "\ufeff" + FRAME.to_json(orient="records", lines=True).replace("\n", "\r\n")),
}


def written(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("kind", SAME)
def test_every_export_says_the_same(kind, tmp_path):
    assert list(rows.read(written(tmp_path, *SAME[kind]), rows.Row(""))) == MADE


@pytest.mark.parametrize("name, content, prompts", [
    ("a.csv", 'prompt\n"a\nb"\n', ["a\nb"]), ("a.csv", 'prompt\r\n"a\r\n""b"""\r\n', ['a\r\n"b"']),
    ("a.csv", "prompt\na, b; c\td\n\"e, f\"\n", ["a, b; c\td", "e, f"]), ("a.csv", "prompt;\na, b;\n", ["a, b"]),
    ("a.txt", "a;b,c\r\r\nd\u2028e\n\n", ["a;b,c", "d\u2028e"]), ("a.txt", "a\nb".encode("utf-16"), ["a", "b"]),
    ("a.txt", "{a|b} // c /* d */ (e:1.2) __f__ \\{", ["{a|b} // c /* d */ (e:1.2) __f__ \\{"])], ids=str)
def test_a_prompt_is_read_literally(name, content, prompts, tmp_path):
    assert [row.prompt for row in rows.read(written(tmp_path, name, content), rows.Row(""))] == prompts


@pytest.mark.parametrize("name, content, words", [
    ("a.csv", "prompt;seed\na;1\nä;2".encode("cp1252"), "a byte that is not UTF-8 in line 3, character 1"),
    ("a.txt", "a\rbc\xfc".encode("latin-1"), "in line 2, character 3"),
    ("a.csv", b"\xff\xfe" + "prompt\na".encode("utf-16-le")[:-1], "not UTF-16"),
    ("a.csv", PLAIN.encode("utf-16-le"), "NUL characters"), ("a.csv", PLAIN.encode("utf-32"), "NUL characters"),
    ("a.csv", 'prompt,seed\na,1\n"b,2\n', "unexpected end of data in row 3"),
    ("a.csv", 'prompt,seed\n"a" b,1\n', "in row 2"), ("a.csv", "prompt,seed,Seed \na,1,2", "column seed twice"),
    ("a.csv", "a cat\na dog", "column a_cat"), ("a.csv", "prompt:seed\na:1", "column prompt:seed"),
    ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": b}', "line 3, character 12"),
    ("a.json", '[\n {"prompt": "a"},\n {"prompt": b}]', "line 3 column 13"),
    ("a.jsonl", '["prompt", "a"]', "something"), ("a.jsonl", '{"seed": 1, "seed": 2}', "column seed twice"),
    ("a.parquet", twice(), "column prompt twice"),
    ("a.json", "[" * 100_000, "readable prompt file"), ("a.xlsx", b"PK\3\4", "save it as CSV")], ids=str)
def test_a_file_that_cannot_be_understood_is_named_with_the_place(name, content, words, tmp_path):
    with pytest.raises(ModelFileError) as caught:
        list(rows.read(written(tmp_path, name, content), rows.Row("")))
    assert words in str(caught.value) and str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("header, cells, words", [
    ("seed", "1.5", "seed cannot be '1.5'"), ("seed", "1.000 ", "seed cannot be '1.000 '"),
    ("seed", '"1,024"', "seed cannot be '1,024'"), ("width", "1e999999999", "width cannot be"),
    ("seed", "inf", "seed cannot be"),
    ("reference", "x" * 5000, "does not exist"), ("seed", "9" * 5000, "seed cannot be '999999999999...999"),
    ("seed", "1e30", "seed cannot be"), ("seed", "1e20", "a seed must be between"),
    ("width", "x", "width cannot be 'x'"),
    ("lora_strength", "inf", "lora_strength cannot be"), ("lora_strength", "1.000.5", "lora_strength cannot be"),
    ("seed", "1,extra", "'extra' stands in no column"), ("seed,", "1,extra", "'extra' stands in no column"),
    ("reference", "nothing.png", "does not exist"), ("seed", "1,", None), ("seed", "-0.0", None),
    ("seed", "9223372036854775807.0", None)], ids=lambda value: str(value)[:40])
def test_a_cell_that_cannot_be_understood_fails_its_row_alone(header, cells, words, tmp_path):
    """Rows count as in a spreadsheet: the header and a blank one as well."""
    path = written(tmp_path, "a.csv", f"prompt,{header}\na\n\nb,{cells}\nc\n")
    first, second, third = rows.read(path, rows.Row(""))
    assert (first.prompt, third.prompt) == ("a", "c")
    assert str(second).startswith("row 4 of a.csv: ") and words in str(second) if words else second.prompt == "b"


@pytest.mark.parametrize("record", [{"prompt": ["a"]}, {"prompt": {"0": "a"}}, {"prompt": True},
                                    {"seed": [1]}], ids=str)
def test_json_values_of_another_kind_fail_their_row_alone(record, tmp_path):
    path = written(tmp_path, "a.json", json.dumps([{"prompt": "a"} | record, {"prompt": "b"}]))
    error, row = rows.read(path, rows.Row(""))
    assert str(error).startswith(f"row 1 of a.json: {next(iter(record))} cannot be") and row.prompt == "b"


def test_an_embedding_of_comfyui_is_refused_by_name(tmp_path):
    path = written(tmp_path, "a.txt", "a pot, embedding:style\nan embedding: no\nembedding:x y\nmy_embedding:x")
    first, second, third, fourth = rows.read(path, rows.Row(""))
    assert "row 1 of a.txt: embedding:style is a file" in str(first) and "embedding:x is" in str(third)
    assert fourth.prompt == "my_embedding:x" and "embedding: is" in str(second)
