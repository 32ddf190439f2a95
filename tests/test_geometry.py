import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sink.geometry import Geometry, cdiv

GEOMETRIES = st.builds(Geometry, st.integers(0, 70), st.integers(1, 70))
POSITIONS = st.integers(0, 400)
BLOCK_SIZES = st.sampled_from([1, 4, 16, 32])


def test_the_papers_figure_4() -> None:
    """Four sinks, a window of four: the ninth token evicts the fifth (arXiv 2309.17453)."""
    geometry = Geometry(sinks=4, window=4)
    assert geometry.visible(7) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert geometry.visible(8) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [geometry.cache_position(8, j) for j in geometry.visible(8)] == list(range(8))


@given(GEOMETRIES, POSITIONS)
def test_visible_keys_are_sinks_and_window(geometry: Geometry, t: int) -> None:
    expected = [j for j in range(t + 1) if j < geometry.sinks or j > t - geometry.window]
    assert geometry.visible(t) == expected


@given(GEOMETRIES, POSITIONS)
def test_cache_positions_are_places_in_the_cache(geometry: Geometry, t: int) -> None:
    visible = geometry.visible(t)
    assert [geometry.cache_position(t, j) for j in visible] == list(range(len(visible)))
    assert len(visible) <= geometry.sinks + geometry.window


@given(GEOMETRIES, POSITIONS)
def test_evicted_counts_what_is_not_visible(geometry: Geometry, t: int) -> None:
    assert geometry.evicted(t) == t + 1 - len(geometry.visible(t))


@given(GEOMETRIES, POSITIONS, BLOCK_SIZES)
def test_dead_blocks_are_seen_by_no_later_query(
    geometry: Geometry, computed: int, block_size: int
) -> None:
    dead = {
        block
        for block in range(computed // block_size)
        if not any(
            j // block_size == block
            for t in range(computed, computed + geometry.window + 1)
            for j in geometry.visible(t)
        )
    }
    assert set(geometry.dead_blocks(computed, block_size)) == dead


@given(GEOMETRIES, BLOCK_SIZES)
def test_max_blocks_is_reached_and_never_passed(geometry: Geometry, block_size: int) -> None:
    held = [
        len({j // block_size for j in geometry.visible(t)})
        for t in range(geometry.sinks + geometry.window + 3 * block_size)
    ]
    assert max(held) <= geometry.max_blocks(block_size)
    if block_size == 1:
        assert max(held) == geometry.max_blocks(block_size)


@pytest.mark.parametrize(
    ("sinks", "window", "block_size", "blocks"),
    [(4, 2044, 128, 18), (4, 508, 32, 18), (4, 508, 128, 6), (5, 97, 32, 5), (0, 1, 16, 1)],
)
def test_max_blocks_in_decode(sinks: int, window: int, block_size: int, blocks: int) -> None:
    assert Geometry(sinks, window).max_blocks(block_size) == blocks
    assert blocks == cdiv(sinks, block_size) + cdiv(window - 1, block_size) + 1
