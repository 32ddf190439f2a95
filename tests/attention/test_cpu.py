from pathlib import Path

import pytest

from tests.attention.cases import needs_compiler
from vllm_sink.attention import cpu
from vllm_sink.attention.cpu import cpu_attention
from vllm_sink.attention.reference import ReferenceAttention


def test_reference_serves_where_no_compiler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    cpu_attention.cache_clear()
    assert isinstance(cpu_attention(), ReferenceAttention)
    cpu_attention.cache_clear()


@needs_compiler
def test_reference_serves_where_the_compiler_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "SOURCE", tmp_path / "broken.cpp")
    (tmp_path / "broken.cpp").write_text("this is no C++", encoding="utf-8")
    cpu_attention.cache_clear()
    assert isinstance(cpu_attention(), ReferenceAttention)
    assert not list((tmp_path / "vllm_sink").iterdir())
    cpu_attention.cache_clear()
