"""From a GGUF file to a checkpoint folder, against weights computed apart from it (`tests.tiny_gguf`)."""

import json

import numpy as np
import pytest
import regex
import torch
from gguf import GGUFEndian
from tokenizers import Tokenizer

from portllm.checkpoint.gguf import convert as gguf
from portllm.checkpoint.gguf.convert import write_gguf_as_checkpoint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, MissingTensorError
from portllm.tensors.bytes import read_bytes
from portllm.tensors.decoding import stored_rows
from portllm.tensors.rounding import round_to_bfloat16
from tests import tiny_gguf
from tests.tiny_gguf import HIDDEN, KINDS, TOKENS, VOCAB, write_tiny_gguf

TEXTS = [
    "hello",
    "In 1990, 12,345.67 of them",
    "  12  3\n\n4\t5",
    "naïve café — 日本語 😀 العربية ²½Ⅷ٣",
    "it's we'll I'M   x=3*(4+5)  \r\n ",
    "<|im_start|>user\nhello<|im_end|><think>",
    "",
]


@pytest.fixture
def converted(tmp_path):
    """Write a tiny file with these changes and convert it: the folder, and the weights it should hold."""

    def convert(**how):
        weights = write_tiny_gguf(tmp_path / "tiny.gguf", **how)
        folder = tmp_path / "folder"
        folder.mkdir()
        write_gguf_as_checkpoint(tmp_path / "tiny.gguf", folder)
        return folder, weights

    return convert


def stored_bits(folder):
    checkpoint = open_checkpoint(folder)
    return {name: np.frombuffer(read_bytes(info), "<u2").reshape(info.shape) for name, info in checkpoint.infos.items()}


def bfloat16_bits(values):
    """The oracle's rounding: torch's, from the float32 that is nearest."""
    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()


@pytest.mark.parametrize("untied", [False, True])
def test_every_weight_is_the_oracles_rounded_once(converted, untied):
    folder, weights = converted(untied=untied)
    found = stored_bits(folder)
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(found[name], bfloat16_bits(values), err_msg=name)


def test_the_block_size_does_not_change_a_byte(converted, tmp_path, monkeypatch):
    folder, _ = converted()
    whole = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(gguf, "_BLOCK_ELEMENTS", 5 * HIDDEN)
    (tmp_path / "again").mkdir()
    write_gguf_as_checkpoint(tmp_path / "tiny.gguf", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == whole


def test_each_block_is_written_before_the_next_is_dequantized(converted, tmp_path, monkeypatch):
    converted()
    events = []
    load_values = gguf.load_values

    def watched(*span):
        values = load_values(*span)
        events.append(values.size)
        return values

    monkeypatch.setattr(gguf, "_BLOCK_ELEMENTS", 5 * HIDDEN)
    monkeypatch.setattr(gguf, "load_values", watched)
    (tmp_path / "again").mkdir()
    write_gguf_as_checkpoint(tmp_path / "tiny.gguf", tmp_path / "again", progress=lambda *_: events.append("written"))
    blocks, written = events[0::2], events[1::2]
    assert set(written) == {"written"}
    assert max(blocks) == 5 * HIDDEN


def test_progress_counts_the_bytes_of_the_weights(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    calls = []
    write_gguf_as_checkpoint(tmp_path / "tiny.gguf", tmp_path, progress=lambda *call: calls.append(call))
    total = open_checkpoint(tmp_path).n_bytes
    assert {(label, of, unit) for label, _, of, unit in calls} == {("converting tiny.gguf", total, "bytes")}
    counts = [done for _, done, _, _ in calls]
    assert counts == sorted(counts)
    assert counts[-1] == total


def test_rounding_to_bfloat16_agrees_with_torch_on_every_kind_of_value():
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (upper[:, None] | lower).reshape(-1).view(np.float32)
    found, expected = round_to_bfloat16(values), bfloat16_bits(values)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(found[numbers], expected[numbers])
    assert torch.from_numpy(found[~numbers]).view(torch.bfloat16).isnan().all()


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_stored_rows_undo_the_permutation_of_llama_cpp(heads):
    rows = np.arange(heads * 8)
    np.testing.assert_array_equal(
        tiny_gguf.permute(rows, heads)[stored_rows(rows, n_rows=len(rows), n_heads=heads)], rows
    )


def test_transformers_loads_the_folder_whole(converted):
    from transformers import AutoModelForCausalLM

    folder, _ = converted()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 50000.0}
    assert model.generation_config.eos_token_id == 2


def test_transformers_loads_a_head_of_its_own(converted):
    from transformers import AutoModelForCausalLM

    folder, weights = converted(untied=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = model.lm_head.weight.detach().view(torch.uint16).numpy()
    np.testing.assert_array_equal(head, bfloat16_bits(weights["lm_head.weight"]))


def test_the_configuration_says_what_the_metadata_says(converted):
    folder, _ = converted()
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
        "rope_theta": 50000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCAB,
    }
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_what_the_metadata_may_leave_out_has_llama_cpps_defaults(converted):
    optional = ["attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size"]
    optional += ["attention.key_length", "attention.value_length"]
    changes = {f"llama.{key}": None for key in optional}
    shapes = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    tensors = {
        f"blk.{layer}.{name}.weight": np.zeros(shape, np.float32)
        for layer in range(tiny_gguf.LAYERS)
        for name, shape in shapes.items()
    }
    folder, _ = converted(metadata=changes, tensors=tensors)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_key_value_heads"], config["head_dim"], config["rope_theta"]) == (4, 8, 10000.0)


def test_text_is_split_as_llama_cpp_splits_it(converted):
    folder, _ = converted()
    split = Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer
    alphabet = tiny_gguf.byte_alphabet()
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for text in TEXTS:
        expected = []
        for part in regex.findall(r"\p{N}|\P{N}+", text):  # first every digit alone, then words within each part
            expected += ["".join(alphabet[byte] for byte in word.encode()) for word in regex.findall(words, part)]
        assert [piece for piece, _ in split.pre_tokenize_str(text)] == expected


def test_every_text_comes_back_from_its_tokens(converted):
    folder, _ = converted()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokens_are_special_user_defined_or_merged_as_the_file_says(converted):
    folder, _ = converted()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab() == {token: number for number, token in enumerate(TOKENS)}
    assert tokenizer.encode("<|im_start|>hello<think>").tokens == ["<|im_start|>", "hello", "<think>"]
    assert tokenizer.decode([1, TOKENS.index("hello"), TOKENS.index("<think>")]) == "hello<think>"


def test_transformers_loads_the_tokenizer_with_its_template(converted):
    from transformers import AutoTokenizer

    folder, _ = converted()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("  1").input_ids == [TOKENS.index("ĠĠ"), TOKENS.index("1")]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>hello<|im_end|>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (tokenizer.unk_token, tokenizer.model_max_length) == ("<|endoftext|>", 64)


def test_a_file_without_a_template_gives_a_tokenizer_without_one(converted):
    folder, _ = converted(metadata={"tokenizer.chat_template": None})
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


REFUSED_METADATA = {
    "another architecture": ({"general.architecture": "gptneox"}, "'gptneox'"),
    "another tokenizer model": ({"tokenizer.ggml.model": "t5"}, "'t5'"),
    "another pre-tokenizer": ({"tokenizer.ggml.pre": "llama-bpe"}, "'llama-bpe'; supported: 'smollm'"),
    "no pre-tokenizer": ({"tokenizer.ggml.pre": None}, "'tokenizer.ggml.pre'"),
    "a token before every text": ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token' is true"),
    "a space before every text": ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix' is true"),
    "an unknown hyperparameter": ({"llama.rope.scaling.type": "yarn"}, "'llama.rope.scaling.type'"),
    "experts": ({"llama.expert_count": 8}, "'llama.expert_count'"),
    "no layer count": ({"llama.block_count": None}, "'llama.block_count'"),
    "no layers": ({"llama.block_count": 0}, "'llama.block_count' is '0'"),
    "a layer count in words": ({"llama.block_count": "two"}, "'llama.block_count' is 'two'"),
    "heads per layer": ({"llama.attention.head_count_kv": [3, 3]}, "'llama.attention.head_count_kv'"),
    "heads that do not group": ({"llama.attention.head_count_kv": 3}, "4 query heads, 3 key heads"),
    "odd heads": ({"llama.attention.key_length": 7}, "of 7 rows"),
    "another width": ({"llama.embedding_length": 34}, "(267, 32); its metadata implies (vocab=267, hidden=34)"),
    "values of another size": ({"llama.attention.value_length": 16}, "value_length' is 16"),
    "more layers than tensors": ({"llama.block_count": 2**31}, "'llama.block_count' is 2147483648"),
    "one of several parts": ({"split.count": 3}, "is one of several parts"),
    "partial rotary embedding": ({"llama.rope.dimension_count": 4}, "rope.dimension_count' is 4"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
    "an epsilon of zero": ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "layer_norm_rms_epsilon' is '0.0'"),
    "a base that is no number": ({"llama.rope.freq_base": float("nan")}, "rope.freq_base' is 'nan'"),
    "another vocabulary size": ({"llama.vocab_size": VOCAB + 1}, f"vocab_size' is {VOCAB + 1}"),
    "a token twice": ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "h"]}, "contains a token twice"),
    "tokens that are numbers": ({"tokenizer.ggml.tokens": [1] * VOCAB}, "'tokenizer.ggml.tokens'"),
    "a kind of token too few": ({"tokenizer.ggml.token_type": KINDS[1:]}, f"{VOCAB - 1} entries for {VOCAB} tokens"),
    "kinds of token in words": ({"tokenizer.ggml.token_type": ["x"] * VOCAB}, "'tokenizer.ggml.token_type'"),
    "an unused token": ({"tokenizer.ggml.token_type": [*KINDS[:-1], 5]}, "'<think>'"),
    "a merge of three": ({"tokenizer.ggml.merges": ["h e l"]}, "'h e l'"),
    "a merge into nothing": ({"tokenizer.ggml.merges": ["h x"]}, "'h x'"),
    "a token id outside": ({"tokenizer.ggml.bos_token_id": VOCAB}, f"bos_token_id' is {VOCAB}"),
}


@pytest.mark.parametrize(("changes", "named"), REFUSED_METADATA.values(), ids=REFUSED_METADATA)
def test_metadata_that_is_not_supported_is_refused_by_name(tmp_path, changes, named):
    write_tiny_gguf(tmp_path / "odd.gguf", metadata=changes)
    with pytest.raises(CheckpointError) as caught:
        write_gguf_as_checkpoint(tmp_path / "odd.gguf", tmp_path)
    assert str(caught.value).startswith(f"'{tmp_path / 'odd.gguf'}': ")
    assert named in str(caught.value)
    assert not list(tmp_path.glob("*.json"))


REFUSED_TENSORS = {
    "a bias": ("blk.1.attn_q.bias", np.zeros(48, np.float32), CheckpointError, "'blk.1.attn_q.bias'"),
    "a layer too many": ("blk.2.attn_norm.weight", np.zeros(32, np.float32), CheckpointError, "'blk.2.attn_norm"),
    "another width": (
        "output_norm.weight",
        np.zeros(33, np.float32),
        CheckpointError,
        "(33,); its metadata implies (hidden=32)",
    ),
    "turned": (
        "blk.0.attn_v.weight",
        np.zeros((32, 24), np.float32),
        CheckpointError,
        "(32, 24); its metadata implies (key=24, hidden=32)",
    ),
    "whole numbers": (
        "output_norm.weight",
        np.zeros(32, np.int32),
        CheckpointError,
        "'output_norm.weight' is stored as I32",
    ),
    "missing": ("blk.1.ffn_up.weight", None, MissingTensorError, "'blk.1.ffn_up.weight'"),
}


@pytest.mark.parametrize(("name", "data", "error", "named"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, name, data, error, named):
    write_tiny_gguf(tmp_path / "odd.gguf", tensors={name: data})
    with pytest.raises(error) as caught:
        write_gguf_as_checkpoint(tmp_path / "odd.gguf", tmp_path)
    assert str(tmp_path / "odd.gguf") in str(caught.value)
    assert named in str(caught.value)


def test_heads_that_transformers_does_not_have_are_refused(tmp_path):
    changes = {"llama.attention.head_count": 5, "llama.attention.head_count_kv": 1}
    query, key, value, mixed = (np.zeros((rows, 32), np.float32) for rows in (60, 12, 12, 60))
    layers = {"attn_q": query, "attn_k": key, "attn_v": value, "attn_output": mixed.T.copy()}
    tensors = {f"blk.{layer}.{name}.weight": data for layer in range(tiny_gguf.LAYERS) for name, data in layers.items()}
    write_tiny_gguf(tmp_path / "odd.gguf", metadata=changes, tensors=tensors)
    assert len(open_checkpoint(tmp_path / "odd.gguf").infos) == 20
    with pytest.raises(CheckpointError, match="a width of 32"):
        write_gguf_as_checkpoint(tmp_path / "odd.gguf", tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 20, 1000, 12_000, -1])
def test_a_file_that_is_cut_short_is_refused(tmp_path, kept):
    write_tiny_gguf(tmp_path / "whole.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="is not a complete GGUF file"):
        write_gguf_as_checkpoint(tmp_path / "cut.gguf", tmp_path)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("a text, of some length, that is not a model")
    with pytest.raises(CheckpointError, match="is not a complete GGUF file"):
        write_gguf_as_checkpoint(tmp_path / "text.gguf", tmp_path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        write_gguf_as_checkpoint(tmp_path / "absent.gguf", tmp_path)


def test_a_file_of_the_other_byte_order_is_refused(tmp_path):
    write_tiny_gguf(tmp_path / "big.gguf", endian=GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match="is big-endian"):
        write_gguf_as_checkpoint(tmp_path / "big.gguf", tmp_path)
