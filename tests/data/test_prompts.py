"""Lists of prompts in the formats people keep them in; what is no prompt is refused at its row."""

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from halo_fast.data.prompts import prompt_source, read_prompts, shared_prompts
from halo_fast.errors import UserError

WANTED = ["a red ball, rolling", "zwei W\u00fcrfel", 'a "blue" cube; still']


def rows(column="prompt"):
    return [{column: prompt, "category": "things"} for prompt in WANTED]


def json_lines(values):
    return "\n".join(json.dumps(value) for value in values) + "\n"


def csv_text(delimiter, column="prompt"):
    cells = [[column, "category"], *([f'"{prompt.replace(chr(34), chr(34) * 2)}"', "things"] for prompt in WANTED)]
    return "\r\n".join(delimiter.join(row) for row in cells)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "\n".join(WANTED)),
        ("p.prompts", "\r\n".join(WANTED) + "\r\n"),
        ("p.txt", "prompt\n" + "\n".join(WANTED)),
        ("p.txt", json.dumps(WANTED)),
        ("p.txt", csv_text("\t", "Prompt")),
        ("p.csv", csv_text(",")),
        ("p.CSV", csv_text(";", "caption")),
        ("p.tsv", csv_text("\t", " Prompt ")),
        ("p.json", json.dumps(WANTED)),
        ("p.json", json.dumps(rows("prompt_en"))),
        ("p.json", json.dumps({"prompts": WANTED})),
        ("p.json", json_lines(rows())),
        ("p.jsonl", json_lines(rows("text"))),
        ("p.jsonl", json_lines(WANTED)),
    ],
)
def test_prompts_of_every_format(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig", newline="")
    assert read_prompts(str(tmp_path / name), None) == WANTED
    assert read_prompts(str(tmp_path / name), 2) == WANTED[:2]


def test_prompts_of_a_parquet_table(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows("Caption")), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet"), 9) == WANTED


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.jsonl", '"a cat"\n'), ("p.jsonl", '{"prompt": "a cat"}'), ("p.json", '["a cat"]'), ("p.txt", "a cat"),
     ("p.csv", "prompt\na cat\n")],
)  # fmt: skip
def test_a_list_of_one_prompt(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_prompts(str(tmp_path / name), None) == ["a cat"]


def test_a_prompt_may_begin_with_a_bracket_or_hold_a_line_separator(tmp_path):
    lines = ["[cinematic] a cat", "{dog} runs", "a\u2028b"]
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.txt"), None) == lines
    (tmp_path / "p.jsonl").write_text(json_lines(lines[:2]) + '"a\u2028b"\n', encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.jsonl"), None) == [*lines[:2], "a b"]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("p.csv", "prompt,id\na cat,1\n,2\n", "row 2: expected a prompt, got ''"),
        ("p.jsonl", json_lines([{"prompt": "a"}, {"prompt": None}]), "row 2: expected a prompt, got None"),
        ("p.jsonl", json_lines([{"prompt": "a"}, {"Prompt": "b"}]), "row 2: expected a prompt, got None"),
        ("p.json", "[7]", "row 1: expected a prompt, got 7"),
        ("p.csv", "a cat\na dog\n", "expected a column 'prompt' or .*, got 'a cat'; name the column"),
        ("p.csv", "a cat, asleep\n", "holds no prompts"),
        ("p.csv", "", "holds no prompts"),
        ("p.json", "[]", "holds no prompts"),
        ("p.json", "{", "expected a text file with one prompt a line"),
        ("p.json", "3", "expected a list of prompts"),
    ],
)
def test_what_is_no_prompt_is_refused_at_its_row(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"evaluation_prompts: .*{complaint}"):
        read_prompts(str(tmp_path / name), None, setting="evaluation_prompts")


def test_the_share_that_is_taken_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {k}" for k in range(500)))
    assert len(read_prompts(str(tmp_path / "p.txt"), 192)) == 192
    assert "prompts: the first 192 of 500 prompts" in caplog.text and "(num_prompts)" in caplog.text
    caplog.clear()
    assert len(read_prompts(str(tmp_path / "p.txt"), None)) == 500
    assert not caplog.text


def own_prompts(count, seed):
    if count is not None and count > 3:
        raise ValueError("count: this list has 3 prompts")
    return [f"number {seed + k}" for k in range(count or 3)]


def test_registered_and_dotted_lists(tmp_path):
    name = f"{__name__}:own_prompts"
    assert prompt_source(name) == name and prompt_source(str(tmp_path)) == tmp_path
    assert read_prompts(name, 2, seed=5) == ["number 5", "number 6"] and len(read_prompts(name, None)) == 3
    with pytest.raises(UserError, match="prompts: count: this list has 3 prompts; lower num_prompts"):
        read_prompts(name, 4)
    assert len(read_prompts("demo:train", 5)) == 5
    for wrong in ("demo:test", "no.such.module:prompts"):
        with pytest.raises(UserError, match="prompts: expected one of .*'demo:heldout'.* cannot be imported"):
            read_prompts(wrong, 1)


def test_shared_prompts_are_found_whatever_their_case_and_blanks():
    assert shared_prompts(["A  cat", "a dog"], ["a Cat ", "a bird"]) == ["a Cat "]
    assert shared_prompts(["a"], ["b"]) == []
