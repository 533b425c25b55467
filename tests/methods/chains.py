"""Two models in memory that are sums of linear modules: what a method that runs models is given by the contract."""

from dataclasses import dataclass, field

import torch

from portllm.methods.contract import Block, Comparison, Kind

PROMPTS, TOKENS = 24, 2


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Module:
    """A module that the chains have come to."""

    chains: "TwoChains"
    module: str
    candidate: str
    same_inputs = False

    def blocks(self):
        yield self.chains.block(self.module, self.candidate)

    def drift(self):
        before, after = (side[f"{self.module}.weight"] for side in (self.chains.base, self.chains.evolved))
        return (after - before).float()

    def put(self, factors):
        self.chains.given.setdefault(self.candidate, {})[self.module] = (factors.a, factors.b)


@dataclass
class TwoChains:
    """The state behind each of some modules is the sum of what they and those before them make of inputs of their own.

    Answers are the likeliest of the state's entries. There is one place a prompt, the last of its tokens.
    """

    patch: object
    added: object
    base: dict
    evolved: dict
    given: dict = field(default_factory=dict)
    modules: tuple = ("layers.0.q_proj", "layers.1.q_proj")

    parts = ("fit", "choose", "fit", "report") * (PROMPTS // 4)
    part_of_place = parts
    compared = tuple(part for part in parts if part != "fit")
    most_nats = 0.05
    wanted = None
    is_drawn = False

    def inputs(self, module):
        return numbers(PROMPTS * TOKENS, 12, seed=60 + self.modules.index(module))

    def output(self, module, candidate):
        """What a module says of every token."""
        patch, weights = (self.patch, self.base) if candidate is None else (self.added, self.evolved)
        x, delta = self.inputs(module), patch.deltas[module]
        said = x @ (weights[f"{module}.weight"].float() + delta.scale * (delta.b @ delta.a).float()).T
        a, b = self.given.get(candidate, {}).get(module, (torch.zeros(1, 12), torch.zeros(18, 1)))
        return said + x @ a.float().T @ b.float().T

    def state(self, candidate, stop=None):
        return sum(self.output(module, candidate) for module in self.modules[:stop])

    def block(self, module, candidate):
        stop = self.modules.index(module) + 1
        is_fit = torch.tensor([part == "fit" for part in self.parts]).repeat_interleave(TOKENS)
        n = int(is_fit.sum())
        error = self.state(None, stop) - self.state(candidate, stop)
        return Block(self.inputs(module)[is_fit], error[is_fit], torch.full((n,), Kind.ANSWER), torch.ones(n))

    def walk(self, candidates, beside=(), *, label):
        for candidate in candidates:
            for module in self.modules:
                yield Module(self, module, candidate)

    def put_by(self, candidate):
        return self.given.get(candidate, {})

    def last_states(self, candidate):
        return self.state(candidate)[TOKENS - 1 :: TOKENS]

    def last_inputs(self, candidate):
        return self.inputs(self.modules[-1])[TOKENS - 1 :: TOKENS]

    def last_writer(self):
        return self.modules[-1], 1.0

    def gain(self):
        return None

    def likely(self):
        return self.last_states(None).softmax(dim=1).mean(dim=0).argsort(descending=True)[:4]

    def aims(self):
        return self.last_states(None)

    def head(self, tokens):
        return torch.eye(18)[tokens]

    def logits(self, tokens, states):
        return (self.last_states(None) if states is None else states)[:, tokens]

    def anchor_inputs(self, candidate):
        return None

    def nats(self, part, tails):
        return {}

    def compare(self, states):
        apart = torch.tensor([part != "fit" for part in self.parts])
        old = self.last_states(None)[apart].double()
        found = {}
        for name, state in states.items():
            new = state[apart].double()
            nats = (old.softmax(dim=1) * (old.log_softmax(dim=1) - new.log_softmax(dim=1))).sum(dim=1)
            found[name] = Comparison(nats.clamp(min=0), (old.argmax(dim=1) == new.argmax(dim=1)).double())
        return found
