"""Proofs to text for people."""

from portllm.proving.proof import Proof
from portllm.proving.tables import proof_facts
from portllm.show.headline import Headline, headline_lines
from portllm.show.table import table


def render_proof(proof: Proof, headline: Headline) -> str:
    """What `prove` prints: the sentence to act on, then the numbers."""
    return "\n".join([*headline_lines(headline), "", *table(proof_facts(proof))])
