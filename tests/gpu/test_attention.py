"""The Triton kernel inside CUDA graphs, and without a word to the host."""

from dataclasses import replace

import pytest
import torch

from tests.attention.cases import CASES, TOLERANCE, attend, error, inputs, paged
from vllm_sink.attention.interface import Attention
from vllm_sink.attention.reference import ReferenceAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NAMES = ["decode", "mixed", "decode, alibi"]


@pytest.fixture
def triton() -> Attention:
    from vllm_sink.attention.triton import TritonAttention

    return TritonAttention(torch.cuda.get_device_properties().multi_processor_count)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_captured_of_fresh_streams_replays_any(name: str, triton: Attention) -> None:
    """As vLLM captures: no context, a block table of zeros; then a step is copied in."""
    case = CASES[name]
    given = inputs(case, torch.bfloat16, seed=11).to("cuda")
    cache = paged(triton, case, given)
    batch = given.batch
    fixed = replace(
        given,
        query=torch.randn_like(given.query),
        batch=replace(
            batch,
            seq_lens=batch.query_start_loc.diff(),
            block_table=torch.zeros_like(batch.block_table),
        ),
        turn=given.turn and replace(given.turn, rows=torch.zeros_like(given.turn.rows)),
    )
    out = torch.full_like(given.query, torch.nan)

    def step() -> None:
        triton.attend(
            fixed.query, cache, fixed.batch, case.geometry, fixed.scoring, fixed.turn, out
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    fixed.query.copy_(given.query)
    fixed.batch.seq_lens.copy_(batch.seq_lens)
    fixed.batch.block_table.copy_(batch.block_table)
    if fixed.turn and given.turn:
        fixed.turn.rows.copy_(given.turn.rows)
    out.fill_(torch.nan)
    graph.replay()
    want = attend(ReferenceAttention(), case, inputs(case, torch.bfloat16, seed=11).double())
    assert error(out.cpu(), want) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_does_not_wait_for_the_device(name: str, triton: Attention) -> None:
    case = CASES[name]
    given = inputs(case, torch.bfloat16, seed=12).to("cuda")
    cache = paged(triton, case, given)
    slots = torch.arange(len(given.keys[0]), device="cuda")
    out = torch.empty_like(given.query)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton.write(given.keys[0], given.values[0], cache, slots)
        triton.attend(
            given.query, cache, given.batch, case.geometry, given.scoring, given.turn, out
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
