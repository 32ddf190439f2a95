from benchmarks import perplexity, streameval
from benchmarks.harness import names, servers


def test_every_arm_has_a_name_of_its_own() -> None:
    arms = {*servers.ARMS, *streameval.ARMS, *(arm.name for arm in perplexity.PLAN.arms)}
    assert arms <= names.ARMS.keys()
    assert len(set(names.ARMS.values())) == len(names.ARMS)


def test_an_arm_without_a_name_keeps_its_own() -> None:
    assert names.of("vllm_sink") == "vllm_sink"
