import pytest

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import DataError
from portllm.patch.adapter_folder import load_patch
from portllm.probing.domain import read_domain


def prompts(data):
    return [row.prompt for row in data.rows]


def write(file, *lines):
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return file


def test_lines_of_plain_text_are_prompts_as_they_are(tmp_path):
    file = write(tmp_path / "prompts.txt", "\ufeff who? ", "", "  ", "what?\r")
    assert read_domain(file, []) == [" who? ", "what?"]


def test_rows_are_asked_as_the_patch_was_trained_unless_told(tiny, tmp_path):
    recorded = []
    for number, prompt in enumerate(("{q} Kind:", "{q} Type:")):
        patch = load_patch(tiny("adapter"))
        base = open_checkpoint(tiny("base"))
        settings = {"prompt": prompt, "completion": "kind"}
        recorded.append(
            capture_adapter(patch, base=base, out=tmp_path / str(number), method="train", settings=settings)
        )
    file = write(tmp_path / "rows.jsonl", '{"q": "who?", "kind": "person"}')
    assert prompts(read_domain(file, recorded[:1])) == ["who? Kind:"]
    assert prompts(read_domain(file, recorded, template="Q: {q}")) == ["Q: who?"]
    with pytest.raises(DataError, match="2 different prompts.*Check them separately"):
        read_domain(file, recorded)
    with pytest.raises(DataError, match="has no recorded prompt template.*Pass --prompt"):
        read_domain(file, [load_patch(tiny("adapter"))])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ("[1]", "is a list"),
        ('{"q": null}', "field 'q' is null"),
        ('{"a": "b"}', "no field 'q'"),
        ('{"q": "  "}', "the prompt is blank"),
        ('{"q": "a", "q": "b"}', "duplicate key"),
        (b'{"q": "\xff"}', "is not UTF-8"),
        ('{"q": NaN}', "is not a valid row: NaN is not valid JSON"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_its_line(line, problem, tmp_path):
    file = write(tmp_path / "rows.jsonl", '{"q": "who?"}', line)
    with pytest.raises(DataError, match=f"line 2: .*{problem}"):
        read_domain(file, [], template="{q}")


@pytest.mark.parametrize(("line", "problem"), [(b"\xff", "byte 1 is not UTF-8"), (b"a\0b", "byte 2 is zero")])
def test_a_line_that_is_no_text_is_named(line, problem, tmp_path):
    with pytest.raises(DataError, match=f"line 2: {problem}"):
        read_domain(write(tmp_path / "prompts.txt", "who?", line), [])


def test_a_file_without_prompts_is_told(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        read_domain(write(tmp_path / "prompts.txt", "", " "), [])
    with pytest.raises(DataError, match="cannot be read"):
        read_domain(tmp_path / "nothing.txt", [])
    with pytest.raises(DataError, match="a template only applies to rows"):
        read_domain(write(tmp_path / "prompts.txt", "who?"), [], template="{q}")
