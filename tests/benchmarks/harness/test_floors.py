from types import SimpleNamespace

from benchmarks.harness.floors import Forward

CONFIG = SimpleNamespace(
    vocab_size=100,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    intermediate_size=16,
)
LAYERS = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
"""Query, key and value, output, and the three of the MLP."""
LOGITS = 100 * 8


def test_multiply_adds() -> None:
    one = Forward(CONFIG, 2).multiply_adds(1)
    assert one == LAYERS + LOGITS + 3 * 4 * 2 * 2
    three = Forward(CONFIG, 2).multiply_adds(3)
    assert three == 3 * LAYERS + LOGITS + (1 + 2 + 3) * 3 * 4 * 2 * 2


def test_bytes_read() -> None:
    assert Forward(CONFIG, 4).bytes_read(0) == 4 * (LAYERS + LOGITS)
    assert Forward(CONFIG, 2).bytes_read(10) == 2 * (LAYERS + LOGITS + 10 * 3 * 2 * 2 * 2)
