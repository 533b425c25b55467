"""The library in one script: every verb, with places as texts and with what the last verb gave.

Beside it lie `base-v1` and `base-v2`, a base and the next version of it, `adapter`, a PEFT adapter of the first, and
`rows.jsonl`, rows of a question and its kind; `held-out.jsonl` has other such rows.
"""

import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM

import portllm

# A patch: of an adapter that is there, of a tuned model, or trained.
captured = portllm.capture("adapter", base="base-v1", out="captured")
differences = portllm.capture(tuned="base-v2", base="base-v1", out="update", rank=4)
print(captured.n_params, differences.truncation_residual)

patch, training = portllm.train(
    "base-v1",
    data="rows.jsonl",
    prompt="{question} Kind:",
    completion="kind",
    out="patch",
    settings=portllm.TrainSettings(rank=2, steps=20, learning_rate=3e-2),
)
print(training.losses[-1])

combined = portllm.combine(["patch", captured], out="combined", weights=[1.0, 0.5], how=portllm.Exact(rank=4))
print(combined.truncation_residual)

# Will it hold on the next version? From weights alone, and from what the models make of prompts.
report = portllm.check(patch, captured, base="base-v1", evolved="base-v2")
for found in report.patches:
    print(found.name, found.verdict.answer, found.verdict.answer is portllm.Answer.HOLDS)
prompts = [
    example.prompt for example in portllm.read_examples("rows.jsonl", portllm.ExampleFormat("{question}", "kind"))
]
report = portllm.check(
    patch, base="base-v1", evolved="base-v2", text=prompts, settings=portllm.TextSettings(positions=4)
)

# Carry it over, and look at it.
evolved: portllm.Checkpoint = portllm.open_checkpoint("base-v2")
ported: portllm.Patch = portllm.port(patch, evolved=evolved, base=Path("base-v1"), out="ported")
for place, carried in portllm.port_each({"first": patch}, evolved=evolved, base="base-v1").items():
    print(place, carried.name if isinstance(carried, portllm.Patch) else f"failed: {carried}")
summary = portllm.inspect(evolved)
if isinstance(summary, portllm.CheckpointSummary):
    print(summary.fingerprint, portllm.load_patch("ported").name)

# Refresh it where addition does not hold: the old tuned model answers the prompts.
refreshed, _ = portllm.train(
    evolved,
    data="rows.jsonl",
    out="refreshed",
    start=ported,
    teacher=patch,
    teacher_base="base-v1",
    max_new_tokens=2,
    settings=portllm.TrainSettings(steps=2),
)

# Into the weights: a new model, several at once, or in place and back.
merged = portllm.merge(
    ported, into=evolved, out="merged", options=portllm.MergeOptions(rounding=portllm.Stochastic(seed=1))
)
print(merged.total.kept_gain, merged.tensors[merged.worst].kept_gain if merged.worst else 1.0)
for place, done in portllm.merge_each({"one": ported, "other": refreshed}, into=evolved).items():
    print(place, done.n_bytes if isinstance(done, portllm.MergeReport) else f"failed: {done}")
shutil.copytree("base-v2", "copy")
portllm.merge_in_place(ported, "copy")
print(portllm.undo_merge("copy"))

# On a model in memory, and off again.
model = AutoModelForCausalLM.from_pretrained("base-v1", dtype="auto")
with portllm.apply(model, patch) as applied:
    print(applied.is_on)
evolved_model = AutoModelForCausalLM.from_pretrained("base-v2", dtype="auto")
applied = portllm.apply(evolved_model, ported)
applied.swap(refreshed)
applied.off()

# In the form that a runtime takes.
exported = portllm.export(ported, runtime="vllm", base=evolved, out="for-vllm")
print(exported.record.name, exported.serve)

# Is it still worth it, and what can be lost?
models = portllm.evaluate(
    "held-out.jsonl", base="base-v1", patch=patch, evolved=evolved, ported=ported, merged="merged"
)
for row in models.rows:
    print(row.name, row.score.value)
task = portllm.Task(
    examples=tuple(portllm.Example(prompt, "cause") for prompt in prompts), kind="text", max_new_tokens=2
)
models = portllm.evaluate(task, base="base-v1", patch=patch, evolved=evolved, ported=ported, retrained=refreshed)
certificate = portllm.certify(
    patch,
    base="base-v1",
    evolved=evolved,
    ported=ported,
    data="questions.jsonl",
    out="certificate",
    settings=portllm.CertifySettings(choices=("cause", "treatment")),
)
print(certificate.loss_bound == portllm.read_certificate("certificate").loss_bound)

# Is every byte as it was written?
for verification in (portllm.verify(ported, base=evolved), portllm.verify("merged"), portllm.verify("certificate")):
    print(verification.verified)

# What cannot be done says why.
try:
    portllm.port(ported, evolved="base-v2", out="again", base="base-v1")
except portllm.PlanRefusedError as error:
    print(*error.refusals, sep="\n")
except portllm.PortLLMError as error:
    print(error)


def sign(key: str) -> Path:
    """A signature by a key of one's own."""
    return portllm.sign("ported", portllm.KeySigner(key), overwrite=True)


def run_many(fleet: Path, study: Path) -> portllm.StudyResults:
    """Many patches through many updates, and the paper's experiment, as files say."""
    for row in portllm.fleet(fleet, workers=2):
        print(row.folder, row.status)
    print(portllm.study_status(study).n_steps, portllm.study_results(study).n_done)
    return portllm.run_study(study)


def mistakes() -> None:
    """What a type checker refuses: were one of these accepted, its mark would be an error."""
    portllm.port(3, evolved="base-v2", out="ported")  # type: ignore[arg-type]
    portllm.port("patch", evolved="base-v2")  # type: ignore[call-arg]
    portllm.merge("patch", into="base-v2", out="merged", options="stochastic")  # type: ignore[arg-type]
    portllm.capture("adapter", base="base-v1", out="patch", rank=4)  # type: ignore[call-overload]
    report.holds()  # type: ignore[operator]
    portllm.digest("base-v1")  # type: ignore[attr-defined]
