"""The model card beside what people share: README.md with the hub's metadata, what it is, and how it is loaded.

A card has two parts. One is written anew by every command, between two marks. The other is the user's: the text around
the marks, and every field of the metadata that is not set here; it goes along as the patch is captured, ported, merged
and exported. No digest covers a card, so it can be edited. It says nothing of the time or the machine.

Source: https://huggingface.co/docs/hub/model-cards (metadata), and `modelcard.md` of PEFT, the template that says
nothing yet and is not kept.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.hub_names import HUB_ID
from portllm.checkpoint.model.side_files import require_copyable
from portllm.checkpoint.open import side_file
from portllm.errors import CheckpointError
from portllm.files.input_file import read_input
from portllm.files.own_files import is_own_file, write_text
from portllm.files.source import LocalFile
from portllm.patch.adapter_folder import CARD_FILE
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity, PatchRecord, PortStep, Tried
from portllm.serving.runtime import Form, runtimes

START = "<!-- portllm: from here to the next mark, this is written anew by every command; write around it -->"
END = "<!-- portllm: end -->"
MAX_CARD_BYTES = 1 << 20

RESULTS = "## Results"
"""Above what was measured after a folder was written, with the command that did."""

UNFILLED = "# Model Card for Model ID"
"""How PEFT's template begins where nobody has filled it in."""

LICENSE_FIELDS = ("license", "license_name", "license_link")
_FIELD = re.compile(r"^([A-Za-z_][\w-]*):")


@dataclass(frozen=True, slots=True)
class Card:
    """A card in parts.

    Attributes:
        fields: The lines of each field of the metadata, by name.
        above: Text before the part that is written anew.
        below: Text behind it.
    """

    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    above: str = ""
    below: str = ""


NO_CARD = Card()


def parse_card(text: str) -> Card:
    r"""Take a card apart; one that is PEFT's unfilled template keeps its metadata alone.

    Example:
        >>> card = parse_card("---\nlicense: mit\ntags:\n- legal\n---\n# Contracts\n")
        >>> dict(card.fields), card.above
        ({'license': ['license: mit'], 'tags': ['tags:', '- legal']}, '# Contracts')
    """
    fields: dict[str, list[str]] = {}
    body = text
    if text.startswith("---\n") and "\n---\n" in text[3:]:
        head, _, body = text[4:].partition("\n---\n")
        last: list[str] = []
        for line in head.splitlines():
            if match := _FIELD.match(line):
                last = fields.setdefault(match[1], [])
            last.append(line)
    above, mark, rest = body.partition(START)
    below = rest.partition(END)[2] if mark else ""
    if UNFILLED in above:
        above = ""
    return Card(fields, above.strip(), below.strip())


def read_card(file: LocalFile | None) -> Card:
    """The card in a file; an empty one where there is none that can be read and copied."""
    if file is None:
        return NO_CARD
    with contextlib.suppress(CheckpointError, OSError, ValueError):
        require_copyable(file.path)
        return parse_card(read_input(file.path, most=MAX_CARD_BYTES).decode("utf-8").replace("\r\n", "\n"))
    return NO_CARD


def check_card(folder: Path) -> str:
    """The card of a folder that this program wrote, for `add_result`.

    Raises:
        CheckpointError: It has none, or one without the part that is written anew.
    """
    file = folder / CARD_FILE
    found = read_input(file, most=MAX_CARD_BYTES).decode("utf-8", "replace") if is_own_file(file) else ""
    if not 0 <= found.find(START) < found.find(END):
        raise CheckpointError(
            f"'{file}': is no model card to which a result can be added; expected a folder that capture, port, merge "
            "or export has written, with the two marks that they leave in its card."
        )
    return found


def add_result(folder: Path, command: str, found: str) -> Path:
    """Add to the card of a folder what a command found; what the same one found before is replaced.

    It stands in the part that is written anew, so it stays behind when the folder is ported, merged or exported: of the
    next one it says nothing.

    Args:
        folder: Of a patch, a merged model or an export.
        command: What was run, and on what.
        found: The sentence to act on.

    Returns:
        The card.

    Raises:
        CheckpointError: As `check_card`.
        OSError: It cannot be written.
    """
    above, _, rest = check_card(folder).partition(START)
    written, _, below = rest.partition(END)
    written, _, rows = written.partition(RESULTS)
    cell = _code(command)
    before = [line for line in rows.splitlines() if line.startswith("| `") and not line.startswith(f"| {cell} |")]
    told = f"| {cell} | {' '.join(found.split()).replace('|', '/')} |"
    lines = [RESULTS, "", *_table(("command", "found"), []), *before, told]
    text = f"{above}{START}{written.rstrip()}\n\n" + "\n".join(lines) + f"\n\n{END}{below}"
    write_text(folder / CARD_FILE, text)
    return folder / CARD_FILE


def license_of(checkpoint: Checkpoint) -> dict[str, Sequence[str]]:
    """What a model's own card says of its license."""
    found = None
    with contextlib.suppress(CheckpointError):
        found = side_file(checkpoint, CARD_FILE)
    fields = {} if found is None else read_card(LocalFile(found)).fields
    return {name: lines for name, lines in fields.items() if name in LICENSE_FIELDS}


def write_patch_card(
    folder: Path, patch: Patch, record: PatchRecord, *, own: LocalFile | None, base: Checkpoint | None = None
) -> None:
    """Write the card of a patch.

    Args:
        folder: Where.
        patch: What was written there.
        record: Its record.
        own: The card that what it was made of has.
        base: The model that it belongs to now; its license counts where the card names none.
    """
    ranks = sorted({delta.rank for delta in patch.deltas.values()} | {delta.rank for delta in patch.experts.values()})
    n_modules = len(patch.deltas) + len(patch.experts)
    of_rank = f", rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}" if ranks else ""
    kept = len(patch.values) + len(patch.rows)
    whole = f"; {kept} tensors stored in full" if kept else ""
    lines = [
        f"# A LoRA patch of {_code(_name(record.base))}",
        "",
        "An adapter in PEFT's layout, and a *patch*: `patch.json` records the base it belongs to and the ports it went "
        "through. Written by PortLLM.",
        "",
        *_table(
            ("", ""),
            [
                ("base", _model(record.base)),
                ("made", _origin(record)),
                ("content", f"{n_modules} modules{of_rank}{whole}"),
            ],
        ),
        *_ports(record.ports),
        "",
        "## How to load it",
        "",
        *_loading(record.base),
    ]
    tags = ["lora", "portllm"]
    _write(folder, lines, read_card(own), record.base, "adapter", "peft", tags, base)


def write_model_card(
    folder: Path, lines: Iterable[str], patch: Patch, *, into: Checkpoint, identity: ModelIdentity
) -> None:
    """Write the card of a merged model: what was measured, and where the patch in it comes from."""
    whole = [*lines, *_of_patch(patch, ("merged into", _model(identity)))]
    _write(folder, whole, read_card(patch.card), identity, "finetune", "transformers", ["portllm"], into)


def write_export_card(
    folder: Path, lines: Iterable[str], patch: Patch, *, base: ModelIdentity | None, library: str
) -> None:
    """Write the card of an export: how it is served, and where the patch in it comes from."""
    row = ("base", "unknown" if base is None else _model(base))
    whole = [*lines, *_of_patch(patch, row)]
    _write(folder, whole, read_card(patch.card), base, "adapter", library, ["lora", "portllm"], None)


def _of_patch(patch: Patch, row: tuple[str, str]) -> list[str]:
    made = [] if patch.record is None else [("made", _origin(patch.record))]
    ports = [] if patch.record is None else _ports(patch.record.ports)
    return ["", "## The patch", "", *_table(("", ""), [row, *made]), *ports]


def _write(
    folder: Path,
    lines: Iterable[str],
    own: Card,
    base: ModelIdentity | None,
    relation: str,
    library: str,
    tags: Sequence[str],
    model: Checkpoint | None,
) -> None:
    fields = {name: list(found) for name, found in own.fields.items() if not name.startswith("base_model")}
    if model is not None and "license" not in fields:
        fields |= {name: list(found) for name, found in license_of(model).items()}
    notes = []
    if base is None or (base.revision is None and HUB_ID.fullmatch(base.name) is None):
        notes = [
            "",
            "The base was a folder, so `base_model` is not set: name its id on the Hub before an upload.",
        ]
    else:
        fields["base_model"] = [f"base_model: {json.dumps(base.name.partition('@')[0])}"]
        fields["base_model_relation"] = [f"base_model_relation: {relation}"]
        if base.revision is not None:
            fields["base_model_revision"] = [f"base_model_revision: {base.revision}"]
    fields["library_name"] = [f"library_name: {library}"]
    fields["tags"] = ["tags:", *(f"- {tag}" for tag in dict.fromkeys((*_tags(own), *tags)))]
    head = [line for _, found in sorted(fields.items()) for line in found]
    body = "\n".join([START, "", *lines, *notes, "", END])
    text = "\n\n".join(part for part in ("\n".join(["---", *head, "---"]), own.above, body, own.below) if part)
    (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")


def _tags(card: Card) -> Iterator[str]:
    """The tags that a card has, in either of YAML's two ways to write a list; without those that name a base."""
    first, *others = card.fields.get("tags", ("",))
    inline = first.partition(":")[2].strip().removeprefix("[").removesuffix("]").split(",")
    for tag in (*inline, *(line.strip().removeprefix("-") for line in others)):
        if tag.strip() and not tag.strip(" '\"").startswith("base_model:"):
            yield tag.strip()


def _origin(record: PatchRecord) -> str:
    fitted = record.capture.fitted_to
    trained = "" if fitted is None else f", trained on weights quantized to {fitted.scheme}"
    made = {
        "adapter": "captured from a PEFT adapter",
        "train": "trained with `portllm train`",
        "tuned": "captured from a base and its fine-tuned version",
        "combine": "combined from several patches",
    }
    return made[record.capture.method] + trained


def _ports(ports: Sequence[PortStep]) -> list[str]:
    """The way of a patch, and what was measured on the last stretch of it."""
    if not ports:
        return []
    verdicts = ["" if step.choice is None else step.choice.verdict for step in ports]
    rows = [
        (_model(step.source), _model(step.target), _code(step.method), verdict)
        for step, verdict in zip(ports, verdicts, strict=True)
    ]
    lines = ["", "## Ports", "", *_table(("from", "to", "method", "verdict of `check`"), rows)]
    evidence = sorted(ports[-1].evidence.items())
    if evidence:
        measured = [(_code(name), f"{value:.6g}") for name, value in evidence]
        lines += ["", "Measured by the last port:", "", *_table(("measure", "value"), measured)]
    if tried := ports[-1].tried:
        told = (
            "Candidates, by their mean distance √(KL / 2) from the old answers on prompts to choose by, or by the loss "
            "of right answers where rows had some; general text in nats per token beyond addition, "
            "with its standard error:"
        )
        candidates = [
            (
                _code(each.name),
                f"{each.mean:.4f}",
                f"{each.error:.4f}",
                _general(each),
            )
            for each in tried
        ]
        head = ("candidate", "mean", "standard error beside the best", "general text")
        lines += ["", told, "", *_table(head, candidates)]
    return lines


def _general(candidate: Tried) -> str:
    """What a candidate costs on general text."""
    if candidate.general_nats is None or candidate.general_error is None:
        return ""
    return f"{candidate.general_nats:+.3f} ± {candidate.general_error:.3f}{', too dear' * candidate.is_too_dear}"


def _loading(base: ModelIdentity) -> list[str]:
    name = _name(base)
    revision = "" if base.revision is None else f", revision={base.revision!r}"
    rows = [
        (runtime.title, f"`portllm export PATCH --for {runtime.id} --base BASE -o DIR`")
        for runtime in runtimes().values()
        if runtime.form is not Form.PEFT
    ]
    return [
        "With transformers and PEFT, where `PATCH` is this folder:",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained({json.dumps(name)}{revision}, dtype="auto")',
        'model = PeftModel.from_pretrained(base, "PATCH")',
        "```",
        "",
        "Other runtimes read less of an adapter than it says; `export` writes what each of them takes:",
        "",
        *_table(("runtime", "command"), rows),
        "",
        "When the base is updated again: `portllm check PATCH --base BASE --evolved NEW`, then "
        "`portllm port PATCH --evolved NEW -o PATCH2`.",
    ]


def _model(identity: ModelIdentity) -> str:
    commit = "" if identity.revision is None else f", commit `{identity.revision}`"
    return f"{_code(_name(identity))} (`{identity.fingerprint}`{commit})"


def _name(identity: ModelIdentity) -> str:
    """A model's name without its revision, and without the way to it on a machine of which nobody else knows."""
    name = identity.name.partition("@")[0] if identity.revision else identity.name
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _code(text: str) -> str:
    """A text in code style, on one line and in one cell."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
