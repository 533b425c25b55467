"""What a proof says as tables, for the terminal and the page alike. Pure."""

from portllm.proving.decision import nats
from portllm.proving.proof import Proof
from portllm.show.numbers import counted


def proof_facts(proof: Proof) -> dict[str, str]:
    """What was served and what was measured."""
    nulls = proof.null_errors
    return {
        "base": proof.base,
        "patch": proof.patch,
        "served": f"{proof.served} in {f'{proof.runtime} {proof.version}'.strip()}",
        "compared": f"{counted(proof.n_log_probs, 'log-probability').replace('ys', 'ies')} after "
        f"{counted(len(proof.prompts), 'prompt')}",
        "bare base": f"off by {nats(proof.noise)}",
        "patch's effect": f"{nats(proof.effect)} here, {nats(proof.served_effect)} in the runtime; "
        f"{100 * proof.gain:.4g} % arrives, give or take {100 * proof.gain_error:.2g} %",
        "served patch": f"off by {nats(proof.error)}; up to {nats(proof.tolerance)} passes",
        "random patches": "of the same size are off by "
        + (nats(min(nulls)) if len(nulls) == 1 else f"{nats(min(nulls))} to {nats(max(nulls))}"),
    }
