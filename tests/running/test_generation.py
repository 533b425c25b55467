import torch

from portllm.running.encoding import Encoder
from portllm.running.generation import write
from portllm.running.model import load_model, load_tokenizer

CPU = torch.device("cpu")

TEXTS = ("fever", "Kind:\n", "what causes measles? Kind:", "is measles inherited? Kind:", "tea")


@torch.inference_mode()
def test_a_row_goes_on_as_it_does_alone_when_those_beside_it_have_ended(reader, monkeypatch):
    model, encoder = load_model(reader, device=CPU, dtype=torch.float32), Encoder(load_tokenizer(reader))
    prompts = [encoder.encode_text(text) for text in TEXTS]
    how = {"max_new_tokens": 12, "one_line": False, "device": CPU}
    alone = [write(model, encoder, [prompt], **how)[0] for prompt in prompts]
    stops = frozenset(tokens[2] for tokens in alone[:3])
    monkeypatch.setattr(encoder, "stops", stops)  # three rows end at the third token or before
    ends = [next((place for place, token in enumerate(tokens) if token in stops), 11) for tokens in alone]
    expected = [tokens[: end + 1] for tokens, end in zip(alone, ends, strict=True)]
    assert len(set(map(len, expected))) > 1
    widths = []
    model.register_forward_pre_hook(lambda _, __, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True)
    assert write(model, encoder, prompts, **how) == expected
    assert widths[-1] < len(prompts)
