"""Processes that run functions together: torch.distributed with gloo, started once for many tests."""

import contextlib
import datetime
import multiprocessing
import os
import tempfile
import traceback

import torch
import torch.distributed

TIMEOUT = datetime.timedelta(seconds=60)
# Whoever waits for a process waits longer than processes wait for each other.
PATIENCE = 120


class World:
    """`size` processes with one group each of their first 1, 2, ... `size` ranks."""

    def __init__(self, size: int, timeout: datetime.timedelta = TIMEOUT):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "flash_attn", "pytest"])
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (there, rank, size, f"{self._folder.name}/store", timeout)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def run(self, function, *arguments, ranks=None):
        """The results of function(*arguments) of the first `ranks` processes (all), which run it at the same time.

        Raises:
            AssertionError: with what was raised in the processes.
        """
        pipes = self._pipes[:ranks]
        for pipe in pipes:
            pipe.send((function, arguments))
        answers = [self._answer(pipe) for pipe in pipes]
        raised = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        assert not raised, "\n".join(raised)
        return [result for _, result in answers]

    @staticmethod
    def _answer(pipe):
        if not pipe.poll(PATIENCE):
            return True, f"no answer after {PATIENCE} s"
        try:
            return pipe.recv()
        except EOFError:
            return True, "the process has ended"

    def close(self):
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


_groups = {}


def group_of(size):
    """The group of the first `size` ranks."""
    return _groups[size]


def _serve(pipe, rank, size, store, timeout):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout
    )
    for count in range(1, size + 1):
        group = torch.distributed.new_group(list(range(count)), timeout=timeout)
        _groups[count] = group
    for function, arguments in iter(pipe.recv, None):
        try:
            torch.manual_seed(0)
            answer = False, function(*arguments)
        except BaseException:  # noqa: BLE001  the caller raises it
            answer = True, traceback.format_exc()
        pipe.send(answer)
    os._exit(0)
