"""What `fleet` says first: how many ports may be used, and what to do about the others. Pure."""

from collections.abc import Sequence

from portllm.fleets.plan import FleetRow
from portllm.show.headline import Headline, command_line
from portllm.show.numbers import counted


def decide(rows: Sequence[FleetRow], *, dry: bool, file: str, output: str) -> Headline:
    """The sentence to act on.

    Args:
        rows: What became of each cell, or would.
        dry: Whether nothing was written.
        file: The fleet's file.
        output: Where the results are.
    """
    wrong = [row for row in rows if row.status in ("refused", "failed")]
    lost = [row for row in rows if row.status == "no"]
    doubt = [row for row in rows if row not in (*wrong, *lost) and not row.holds]
    good = len(rows) - len(wrong) - len(lost) - len(doubt)
    told = [f"{good} of {counted(len(rows), 'port')} {'would be ' * dry}done"]
    for what, some in (("to be measured first", doubt), ("will not hold", lost), ("refused or failed", wrong)):
        told += [f"{len(some)} {what}"] if some else []
    done = ", ".join(told)
    again = command_line("portllm", "fleet", file)
    if wrong:
        return Headline("bad", f"{done}.", (), "mend what stands below the table, then run the same file again", again)
    if dry:
        return Headline("plain", f"{done}; nothing was written.", (), "run it", again)
    if doubt:
        at = f"{output}/{doubt[0].folder}"
        models = ("--base", "BASE", "--patch", "PATCH", "--evolved", "EVOLVED", "--ported", f"{at}/port")
        measure = command_line("portllm", "evaluate", *models, "--data", "TEST.jsonl")
        return Headline("doubt", f"{done}.", (), "measure those before you ship them", measure)
    if lost:
        fitted = ("--base", "BASE", "--evolved", "EVOLVED", "--method", "align", "--text", "PROMPTS.jsonl", "-o", "OUT")
        command = command_line("portllm", "port", "PATCH", *fitted)
        return Headline("bad", f"{done}.", (), "fit those that will not hold to the evolved model", command)
    return Headline("good", f"{done}.", (), f"serve what lies below {output}")
