"""The demo as text for people: what happens, what came of it, and what to type next."""

from collections.abc import Mapping
from pathlib import Path

from portllm.checking.forecast import ACCURACY, LOSS
from portllm.demo.settings import ALIGNED_PROMPTS, EVOLVE, MERGED_ROWS, SCORED_ROWS, TRAIN
from portllm.demo.story import BASE, DemoStep, Story
from portllm.evaluating.decision import decide
from portllm.evaluating.text import render_comparison
from portllm.files.kept_results import Kept
from portllm.show.numbers import percent
from portllm.show.table import n_bytes

TITLES: Mapping[str, str] = {
    "train": f"train     the clinic fine-tunes a patch (LoRA, rank {TRAIN.rank}) on its leaflets",
    "evolve": "evolve    the provider continues to train all weights of the base on mathematics",
    "check": "check     what to expect of the patch there, before anything is ported",
    "port": "port      the patch is ported to the evolved base, without training",
    "align": f"align     it is fitted to the evolved base too, on {ALIGNED_PROMPTS} passages without answers",
    "merge": "merge     the ported patch is merged into the evolved weights, streamed",
    "retrain": "retrain   what porting saves: fine-tuning again on the evolved base",
    "evaluate": f"evaluate  all of them on {SCORED_ROWS} held-out passages",
    "agree": f"agree     the merged model against the ported patch on {MERGED_ROWS} of these",
}


def render_opening(folder: Path) -> str:
    """What the demo says before it begins."""
    return (
        "A clinic tunes a small language model to tell which type of question a passage of a health leaflet\n"
        "answers. Then the model's provider updates the base. Does the clinic's patch survive?\n"
        f"Model: {BASE} (Apache-2.0). Data: MedQuAD (CC BY 4.0) and GSM8K (MIT). Files: {folder}\n"
    )


def render_estimate(seconds: float) -> str:
    """What the demo says when it knows how fast this machine is."""
    minutes = max(1, round(seconds / 60))
    return f"On this machine it will take about {minutes} minute{'s' if minutes > 1 else ''}.\n"


def render_step(step: DemoStep) -> str:
    """One line for a step that is done, and one for what it found."""
    when = f"{step.kept.seconds:7.1f} s" + ("  (done in an earlier run)" if step.kept.reused else "")
    found = _FOUND.get(step.name, _nothing)(step.kept.result)
    return f"{TITLES[step.name]:<82}{when}" + (f"\n          {found}" if found else "")


def render_story(story: Story, *, page: Path, width: int | None = None) -> str:
    """What the demo says at its end.

    Args:
        story: As it was told.
        page: Where the comparison lies as a page.
        width: Columns of the terminal; None for any.
    """
    steps = story.steps
    retrain, port, align, merge = (steps[name].seconds for name in ("retrain", "port", "align", "merge"))
    sizes = {name: _size(story.folder / name) for name in ("patch", "evolved", "ported", "merged")}
    return "\n".join(
        [
            "",
            render_comparison(story.comparison, decide(story.comparison), width=width),
            "",
            f"time    fine-tuning again {retrain:.0f} s, with answers; porting {port:.2f} s, aligning {align:.0f} s, "
            f"without; merging {merge:.1f} s",
            f"size    patch {n_bytes(sizes['patch'])}, ported {n_bytes(sizes['ported'])}; evolved model "
            f"{n_bytes(sizes['evolved'])}, merged {n_bytes(sizes['merged'])}",
            f"files   {story.folder}/patch, evolved, ported, aligned, merged, retrained; each step's results: steps/",
            f"page    {page}: the comparison, to be looked at and sent on",
            "",
            "Next, with your own model: portllm port YOUR_ADAPTER --base OLD_BASE --evolved NEW_BASE -o PORTED",
        ]
    )


def story_to_json(story: Story) -> dict[str, object]:
    """The demo's numbers as JSON values."""
    return {
        "folder": str(story.folder),
        "steps": {name: _step_to_json(name, kept) for name, kept in story.steps.items()},
        "comparison": story.comparison.to_json(),
    }


def _step_to_json(name: str, kept: Kept) -> dict[str, object]:
    found = {} if name == "evaluate" else {"result": dict(kept.result)}  # the comparison says it better
    return {"seconds": kept.seconds, "reused": kept.reused, **found}


def _training(result: Mapping[str, object]) -> str:
    losses = [float(str(loss)) for loss in _list(result["losses"])]
    return f"{result['rows']} passages, {result['steps']} steps; loss {losses[0]:.2f} at first, {losses[-1]:.2f} last"


def _evolution(result: Mapping[str, object]) -> str:
    drift = percent(_number(result["drift"]), digits=2)
    return (
        f"{result['n_tokens']:,} tokens in {EVOLVE.steps} steps; drift {drift} of the weights' norm, cosine "
        f"{_number(result['cosine']):.5f}"
    )


def _checking(result: Mapping[str, object]) -> str:
    said = [str(result["verdict"])]
    if result["agreement"] is not None:
        said.append(f"{percent(_number(result['agreement']), digits=0)} of the answers begin as on the base")
    if isinstance(forecast := result["forecast"], Mapping):
        in_loss, in_score = (_interval(forecast[target]) for target in (LOSS, ACCURACY))
        said.append(f"expected retention {in_score} in score, {in_loss} in loss")
    return "; ".join(said)


def _interval(said: Mapping[str, object]) -> str:
    middle, low, high = (percent(_number(said[name]), digits=0) for name in ("retention", "low", "high"))
    return f"{middle} ({low} to {high})"


def _porting(result: Mapping[str, object]) -> str:
    return f"no weights read; the base drifted by {percent(_number(result['sampled_drift']), digits=2)} (from samples)"


def aligned_text(result: Mapping[str, object]) -> str:
    """How many of the answers that the patch gave on the base an aligned port gives, by its own record."""
    found = {name: percent(_number(result[f"agreement{name}"]), digits=0) for name in ("", "_low", "_high", "_added")}
    return (
        f"{found['']} ({found['_low']} to {found['_high']}) of {_number(result['prompts_report']):.0f} passages that "
        f"nothing was fitted or chosen on are answered as before; by addition {found['_added']}"
    )


def _merging(result: Mapping[str, object]) -> str:
    return (
        f"{percent(_number(result['kept_gain']))} of the patch survives rounding to bfloat16 (worst tensor "
        f"{percent(_number(result['worst_kept_gain']))}); the patch is "
        f"{percent(_number(result['relative_size']), digits=2)} of the weights' norm"
    )


def _agreeing(result: Mapping[str, object]) -> str:
    return (
        f"{result['same']} of {result['rows']} answers are the same; the loss differs by "
        f"{_number(result['loss_change']):+.3f} nats per token"
    )


def _nothing(result: Mapping[str, object]) -> str:
    del result
    return ""


_FOUND = {
    "train": _training,
    "evolve": _evolution,
    "check": _checking,
    "port": _porting,
    "align": aligned_text,
    "merge": _merging,
    "retrain": _training,
    "agree": _agreeing,
}


def _number(value: object) -> float:
    return float(str(value))


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
