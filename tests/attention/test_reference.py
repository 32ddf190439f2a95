"""The reference against the definition, one query and one head at a time."""

import pytest
import torch

from tests.attention.cases import CASES, Case, Inputs, attend, inputs
from vllm_sink.attention.reference import ReferenceAttention
from vllm_sink.rotary import rotate


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_the_definition(name: str) -> None:
    """Section 3.2 of arXiv 2309.17453."""
    case = CASES[name]
    given = inputs(case, torch.float32, seed=len(name)).double()
    got = attend(ReferenceAttention(), case, given)
    for token, head in [(0, 0), (len(got) // 2, case.heads - 1), (len(got) - 1, case.heads // 2)]:
        want = one_query(case, given, token, head)
        assert torch.allclose(got[token, head], want, rtol=0, atol=1e-6)


def one_query(case: Case, given: Inputs, token: int, head: int) -> torch.Tensor:
    request = int((given.batch.query_start_loc[1:] <= token).sum())
    t = int(given.batch.seq_lens[request] - given.batch.query_start_loc[request + 1]) + token
    geometry, scoring, kv_head = case.geometry, given.scoring, head * case.kv_heads // case.heads
    visible = geometry.visible(t)
    turned = given.query[token : token + 1]
    if given.turn:
        rows = given.turn.rows[token : token + 1]
        turned = rotate(turned, rows, case.is_neox_style)
    scores = []
    for j in visible:
        is_sink = j < geometry.window_start(t)
        query = (turned[0] if is_sink else given.query[token])[head]
        score = query @ given.keys[request][j, kv_head] * scoring.scale
        if scoring.soft_cap:
            score = scoring.soft_cap * torch.tanh(score / scoring.soft_cap)
        if scoring.alibi_slopes is not None:
            at, key_at = t, j
            if scoring.reindex:
                at, key_at = geometry.cache_position(t, t), geometry.cache_position(t, j)
            score = score + scoring.alibi_slopes[head] * (key_at - at)
        scores.append(score)
    if scoring.sink_logits is not None:
        scores.append(scoring.sink_logits[head].double())
    weights = torch.stack(scores).softmax(0)[: len(visible)]
    return weights @ given.values[request][visible, kv_head]
