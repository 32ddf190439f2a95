import torch

from vllm_sink.plugin.cpu_worker import RewindableGenerator


def test_a_draw_is_taken_back() -> None:
    stock = torch.Generator().manual_seed(7)
    ours = RewindableGenerator.of(stock)
    expected = [torch.rand(3, generator=stock) for _ in range(2)]
    ours.mark()
    for _ in range(2):
        drawn = torch.rand(3, generator=ours)
        assert torch.equal(drawn, expected[0])
        ours.set_offset(ours.get_offset() - 4)
    assert torch.equal(torch.rand(3, generator=ours), expected[0])
    ours.mark()
    assert torch.equal(torch.rand(3, generator=ours), expected[1])
