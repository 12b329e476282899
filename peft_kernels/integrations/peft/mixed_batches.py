"""The rows of a mixed batch by adapter: sorted once for all layers that the batch runs through, on whatever stream.

A CUDA graph can hold what a call outside of it has sorted: the host then makes no table and waits for nothing. A
capture begins when the device has nothing left to do (torch.cuda.graph waits for that), so it needs no event, and may
not wait for one from outside.
"""

import functools

import torch

from peft_kernels.ops.batched_lowrank_linear import AdapterSegments, adapter_segments


def sorted_rows(index: tuple[int, ...], adapters: int, rows: int, device: torch.device) -> AdapterSegments:
    """index: an adapter for each entry of the batch, or -1;  rows: how many each entry has"""
    entries = torch.tensor(index, dtype=torch.int64, device=device)
    return adapter_segments(entries[:, None].expand(-1, rows).reshape(-1), adapters)


class _Shared:
    """Segments that were made on one stream, for use on all; on a CPU there is none."""

    def __init__(self, segments: AdapterSegments, stream: torch.cuda.Stream | None):
        self.segments, self.streams = segments, {stream}
        self.made = None if stream is None else stream.record_event()

    def on(self, stream: torch.cuda.Stream | None) -> AdapterSegments:
        """Another stream waits once, on the device, and keeps the memory from being given away before it is done."""
        if stream not in self.streams:
            stream.wait_event(self.made)
            for tensor in self.segments:
                tensor.record_stream(stream)
            self.streams.add(stream)
        return self.segments


_captured: set[_Shared] = set()  # graphs read them whenever they are replayed: they stay, 8 bytes for each row


def shared_rows(index: tuple[int, ...], adapters: int, rows: int, device: torch.device) -> AdapterSegments:
    """`sorted_rows`, of the last batches from memory. Raises RuntimeError for one that was never seen in a capture."""
    shared = _cached(index, adapters, rows, device, torch.is_inference_mode_enabled())
    if not _captures(device):
        return shared.on(_stream(device))
    _captured.add(shared)
    return shared.segments


@functools.lru_cache(maxsize=8)
def _cached(index: tuple[int, ...], adapters: int, rows: int, device: torch.device, inference: bool) -> _Shared:
    """inference: autograd has no use for tensors that were made in inference mode"""
    if _captures(device):
        raise RuntimeError("adapter_names: a CUDA graph can hold this mixed batch after one call before the capture")
    return _Shared(sorted_rows(index, adapters, rows, device), _stream(device))


def _captures(device: torch.device) -> bool:
    return _on_gpu(device) and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if _on_gpu(device) else None


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
