"""The oracle of tokens is transformers' own `apply_chat_template`."""

import pytest

from portllm.errors import DataError
from portllm.running.chat import Chat
from portllm.running.chat_template import read_chat_template
from portllm.running.encoding import Encoder
from portllm.running.shapes import Conversation
from tests.language import CHATML, byte_level_tokenizer, chatting, metaspace_tokenizer

LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # as Qwen3's: only the last answer keeps its thought, here 'which kind'
    "{% set last = namespace(at=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.at = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > last.at %}which kind\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUMBERED = (  # rewrites what came before
    "{{ messages | length }} messages\n" + CHATML
)
ENDS_ONCE = CHATML.replace(
    "{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add"
)  # Phi-3
SHOUTS = CHATML.replace("{{ message.content }}", "{{ message.content | upper }}")
FOR_PARTS = CHATML.replace("{{ message.content }}", "{% for part in message.content %}{{ part.text }}{% endfor %}")
OPENS_OTHERWISE = CHATML.replace("assistant\\n", "assistant\\n<think>\\n").replace(
    "assistant\n", "assistant\n<think>\n"
)

MESSAGES = tuple(
    {"role": role, "content": text}
    for role, text in (
        ("system", "Answer briefly."),
        ("user", "what helps?"),
        ("assistant", "tea"),
        ("user", "and then?"),
        ("assistant", "rest and time"),
    )
)
TALK = Conversation(MESSAGES, (2, 4))
NO_SYSTEM = Conversation(MESSAGES[1:], (1, 3))


@pytest.fixture(scope="module", params=[byte_level_tokenizer, metaspace_tokenizer])
def tokenizer(request):
    made = chatting(request.param())
    made.bos_token = made.bos_token or "<bos>"
    return made


def encode(tokenizer, template, conversation, *, max_tokens=999):
    return Chat(Encoder(tokenizer), template).encode(conversation, max_tokens=max_tokens)


def counted(tokenizer, encoded):
    ids = [token for token, counts in zip(encoded.completion, encoded.counted, strict=True) if counts]
    return "".join(tokenizer.decode(ids).split())


@pytest.mark.parametrize(
    ("template", "talk", "learned"),
    [
        (CHATML, TALK, "tea<|im_end|>restandtime<|im_end|>"),
        (MARKED, TALK, "tea<|im_end|>restandtime<|im_end|>"),
        (LLAMA_2, NO_SYSTEM, "tea<eos>restandtime<eos>"),
        (THINKING, TALK, "tea<|im_end|>whichkindrestandtime<|im_end|>"),
        (ENDS_ONCE, TALK, "tea<|im_end|>restandtime<|im_end|><eos>"),
        (CHATML, Conversation(MESSAGES, (4,)), "restandtime<|im_end|>"),
        (MARKED, Conversation(MESSAGES, (4,)), "restandtime<|im_end|>"),
    ],
)
def test_tokens_are_those_of_transformers_and_only_the_assistants_are_learned(tokenizer, template, talk, learned):
    encoded = encode(tokenizer, template, talk)
    whole = tokenizer.apply_chat_template(list(talk.messages), chat_template=template, return_dict=False)
    assert [*encoded.prompt, *encoded.completion] == whole
    assert counted(tokenizer, encoded) == learned


def test_marks_in_the_template_are_read_as_transformers_reads_them(tokenizer):
    encoded = encode(tokenizer, MARKED, TALK)
    masks = tokenizer.apply_chat_template(
        list(MESSAGES), chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    assert [*[0] * len(encoded.prompt), *map(int, encoded.counted)] == masks


def test_an_answer_is_asked_for_where_it_is_learned(tokenizer):
    for template, talk in ((CHATML, TALK), (LLAMA_2, NO_SYSTEM), (THINKING, TALK)):
        prompt, border = Chat(Encoder(tokenizer), template).ask(talk.asked)
        whole = tokenizer.apply_chat_template(list(talk.messages), chat_template=template, tokenize=False)
        assert prompt + border.join(prompt, "rest and time") + border.end == whole
        assert not border.marks


def test_the_mark_that_ends_an_answer_is_the_templates(tokenizer):
    _, border = Chat(Encoder(tokenizer), CHATML).ask(TALK.asked)
    ended = Encoder(tokenizer, border)
    assert ended.stops == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_turns_that_cannot_be_told_apart_are_refused(tokenizer):
    with pytest.raises(DataError, match="an answer otherwise than it asks for one"):
        encode(tokenizer, OPENS_OTHERWISE, TALK)
    with pytest.raises(DataError, match="an answer otherwise than it asks for one"):
        encode(tokenizer, NUMBERED, TALK)


@pytest.mark.parametrize("template", [SHOUTS, FOR_PARTS])
def test_a_template_that_does_not_write_what_was_said_is_refused(tokenizer, template):
    with pytest.raises(DataError, match="leaves out what message 2 says"):
        encode(tokenizer, template, TALK)


def test_a_prompt_that_an_answer_does_not_follow_is_refused(tokenizer):
    with pytest.raises(DataError, match="prompt and answer cannot be told apart"):
        Chat(Encoder(tokenizer), OPENS_OTHERWISE).ask(TALK.asked)


def test_what_the_template_refuses_is_refused_in_its_words(tokenizer):
    with pytest.raises(DataError, match="the chat template refuses the conversation: no system here"):
        encode(tokenizer, "{{ raise_exception('no system here') }}", TALK)


def test_a_long_conversation_loses_its_beginning(tokenizer):
    whole = encode(tokenizer, CHATML, TALK)
    ids = whole.prompt + whole.completion
    cut = encode(tokenizer, CHATML, TALK, max_tokens=len(ids) - 9)
    assert (cut.prompt + cut.completion, cut.n_cut) == (ids[9:], 9)
    with pytest.raises(DataError, match="leave no room for a question and its answer"):
        encode(tokenizer, CHATML, TALK, max_tokens=4)


def test_the_template_is_read_where_transformers_keeps_it(tmp_path):
    tokenizer = chatting(byte_level_tokenizer())
    with pytest.raises(DataError, match="no chat template.*Copy 'chat_template.jinja'"):
        read_chat_template(tmp_path)
    tokenizer.save_pretrained(tmp_path / "file")
    assert read_chat_template(tmp_path / "file") == CHATML
    tokenizer.save_pretrained(tmp_path / "field", save_jinja_files=False)
    assert not (tmp_path / "field" / "chat_template.jinja").exists()
    assert read_chat_template(tmp_path / "field") == CHATML


@pytest.mark.parametrize(
    "reach", ["''.__class__.__mro__[1].__subclasses__()", "messages.append", "self.__init__.__globals__"]
)
def test_a_template_reaches_nothing_but_the_messages(tokenizer, reach):
    with pytest.raises(DataError, match="the chat template refuses the conversation"):
        encode(tokenizer, f"{{{{ {reach}(1) }}}}", TALK)
