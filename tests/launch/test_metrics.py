from prometheus_client import Counter

from launch.metrics import samples


def test_this_projects_metrics_are_found_and_no_others() -> None:
    Counter("vllm_sink:tests", "Of a test.", ("kind",)).labels("a").inc(3)
    Counter("other_tests", "Of a test.").inc(3)
    found = {(sample.name, *sample.labels.values()): sample.value for sample in samples()}
    assert found["vllm_sink:tests_total", "a"] == 3
    assert not [name for name, *_ in found if "other" in name]
