"""Streams without an end: what vLLM's scheduler holds of a running stream is compacted at the mark.

The stream leaves the running batch, once nothing of it is in flight, and comes back as a request
whose prompt is the compacted buffer. vLLM's front end goes on counting and detokenising, and
notices nothing; a worker drops the old row and receives a new one. A preempted stream is read again
from its buffer, which is all that the scheduler has of it.
"""

from copy import copy
from hashlib import blake2b
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from vllm_sink.buffer import Buffer
from vllm_sink.plugin.manager import SinkManager
from vllm_sink.plugin.statistics import COMPACTIONS, READ_ANEW, Counting

SEED_BYTES = 7
"""Of a seed: within the int64 of every generator."""


class Compacting(Counting):
    """Goes before `Admitting` and one of vLLM's schedulers, synchronous or asynchronous."""

    buffer: Buffer | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.full: list[Request] = []
        """Streams whose last token has filled them, running or preempted."""
        if self.buffer is not None:
            # A worker's rows have place for `max_model_len` tokens, and a prompt leaves one of them
            # for its first token. Buffers stay below it, so `check_stop` is to end none there.
            self.max_model_len += 1

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._hold_back()
        full, self.full = self.full, []
        for request in reversed(full):
            if request.status in (RequestStatus.RUNNING, RequestStatus.PREEMPTED):
                self._compact(request)
        return super().schedule(*args, **kwargs)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        if self.buffer is not None:
            # What was drafted past the mark is for the compacted stream to say.
            del new_token_ids[self.buffer.room(request.num_tokens) :]
        new_tokens, stopped = super()._update_request_with_output(
            request, new_token_ids, *args, **kwargs
        )
        if not stopped and self._is_full(request.num_tokens):
            self.full.append(request)
        return new_tokens, stopped

    def _hold_back(self) -> None:
        """Streams that are full once the tokens come that asynchronous scheduling runs ahead of."""
        for request in self.running:
            coming = request.num_output_placeholders
            if coming and self._is_full(request.num_tokens + coming):
                # The step that `schedule` is about to begin, and no other.
                request.next_decode_eligible_step = self.current_step + 2

    def _is_full(self, tokens: int) -> bool:
        return self.buffer is not None and self.buffer.is_full(tokens)

    def _compact(self, request: Request) -> None:
        assert self.buffer is not None
        assert not request.num_in_flight_tokens, "full, and more of it was scheduled"
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove_request(request)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, SinkManager):
                manager.leave_behind(request.request_id, request.num_prompt_tokens)
            else:
                manager.free(request.request_id)
        tokens = self.buffer.compact(request._all_token_ids)
        forgotten = request.num_tokens - len(tokens)
        self.forgotten[request] = self.forgotten.get(request, 0) + forgotten
        self.since_told.update({COMPACTIONS: 1, READ_ANEW: len(tokens)})
        request.sampling_params = continued(request.sampling_params, request.num_output_tokens)
        request.max_tokens = request.sampling_params.max_tokens
        # A new list: the front end of an engine in the same process has the old one.
        request.prompt_token_ids = tokens
        request.num_prompt_tokens = len(tokens)
        request._all_token_ids[:] = tokens
        request._output_token_ids.clear()
        request.block_hashes.clear()
        request.update_block_hashes()
        request.num_computed_tokens = 0
        request.spec_token_ids = []
        request.shared_prefix_boundary = 0
        request.status = RequestStatus.WAITING
        self.finished_req_ids.add(request.request_id)
        self.waiting.prepend_request(request)


def continued(parameters: SamplingParams, generated: int) -> SamplingParams:
    """For the rest of an answer of which so many tokens are there, and are a prompt's now.

    Another seed, or the same random numbers came again: made of the last one, so that it is the
    same whenever and wherever the stream is served.
    """
    rest = copy(parameters)
    rest.max_tokens = parameters.max_tokens - generated
    rest.min_tokens = max(0, parameters.min_tokens - generated)
    rest.prompt_logprobs = None
    if parameters.seed is not None:
        digest = blake2b(str(parameters.seed).encode(), digest_size=SEED_BYTES).digest()
        rest.seed = int.from_bytes(digest)
    return rest
