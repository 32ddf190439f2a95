"""Seam: `scheduler_config.scheduler_cls` (vllm/config/scheduler.py), for each scheduling."""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_sink.plugin import residency
from vllm_sink.plugin.admission import Admitting
from vllm_sink.plugin.compaction import Compacting


class SinkScheduler(Compacting, Admitting, Scheduler):
    pass


class AsyncSinkScheduler(Compacting, Admitting, AsyncScheduler):
    pass


residency.register()
