"""The pair as vLLM has it: a blocking NCCL communicator of two ranks (ctypes), memory and streams by torch.

vLLM waits for ever where its peer does not do its part. Here every such wait ends after `timeout` seconds with an error that names the
call; the call itself cannot be ended, so its thread and its memory are left behind.
"""

import ctypes
import glob
import os
import sys
import threading
import time

import torch

UINT8 = 1  # ncclUint8
POLL_S = 0.0002


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


def load_nccl():
    """The library and its path: what is named, else torch's own, else the loader's."""
    named = os.environ.get("PD_NCCL_LIB") or os.environ.get("VLLM_NCCL_SO_PATH")
    package = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "nvidia", "nccl", "lib", "libnccl.so.2")
    for path in [named] if named else [*glob.glob(package), "libnccl.so.2"]:
        try:
            return ctypes.CDLL(path), path
        except OSError as error:
            print("%s does not load: %s" % (path, error), file=sys.stderr)
    raise RuntimeError("libnccl.so.2 was not found: name it by PD_NCCL_LIB")


class NcclTransport:
    def __init__(self, device, timeout):
        self.device, self.timeout = torch.device(device), timeout
        torch.cuda.set_device(self.device)
        self.nccl, self.path = load_nccl()
        self.nccl.ncclGetErrorString.restype = ctypes.c_char_p
        self.abandoned = []  # memory of the operation under way, which may touch it for ever

    def about(self):
        version = ctypes.c_int()
        self.check(self.nccl.ncclGetVersion(ctypes.byref(version)), "ncclGetVersion")
        number = version.value
        return {
            "transport": "nccl",
            "nccl": "%d.%d.%d" % (number // 10000, number // 100 % 100, number % 100),
            "library": self.path,
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(self.device),
        }

    def check(self, result, what):
        if result != 0:
            raise RuntimeError("%s: %s" % (what, self.nccl.ncclGetErrorString(result).decode()))

    def bounded(self, what, call, *args):
        """One blocking call, on a thread that may be left behind (ctypes lets the others run meanwhile)."""
        results = []

        def run():
            torch.cuda.set_device(self.device)  # of this thread
            results.append(call(*args))

        thread = threading.Thread(target=run, daemon=True, name=what)
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            raise TimeoutError("%s has not returned after %s s" % (what, self.timeout))
        if not results:
            raise RuntimeError("%s: it has failed, see above" % what)
        self.check(results[0], what)

    def unique_id(self):
        unique_id = UniqueId()
        self.check(self.nccl.ncclGetUniqueId(ctypes.byref(unique_id)), "ncclGetUniqueId")
        return bytes(unique_id)

    def open(self, unique_id, rank):
        given = UniqueId.from_buffer_copy(unique_id)
        comm = ctypes.c_void_p()
        what = "ncclCommInitRank as rank %d" % rank
        self.bounded(what, self.nccl.ncclCommInitRank, ctypes.byref(comm), 2, given, rank)
        return NcclPair(self, comm, rank)


class NcclPair:
    def __init__(self, transport, comm, rank):
        self.transport, self.comm, self.peer = transport, comm, rank ^ 1
        torch.cuda.set_device(transport.device)  # of this thread
        self.stream = torch.cuda.Stream(transport.device)
        self.lock = threading.Lock()  # a communicator takes calls of one thread at a time

    def send(self, data):
        torch.cuda.set_device(self.transport.device)
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.transport.device)
        self._run(self.transport.nccl.ncclSend, tensor, "ncclSend of %d bytes" % len(data))

    def receive(self, size):
        torch.cuda.set_device(self.transport.device)
        tensor = torch.empty(size, dtype=torch.uint8, device=self.transport.device)
        self._run(self.transport.nccl.ncclRecv, tensor, "ncclRecv of %d bytes" % size)
        return tensor.cpu().numpy().tobytes()

    def close(self):
        self.transport.nccl.ncclCommAbort(self.comm)

    def _run(self, call, tensor, what):
        torch.cuda.current_stream().synchronize()  # the tensor is there
        self.transport.abandoned.append(tensor)
        with self.lock:
            self.transport.bounded(
                what,
                call,
                ctypes.c_void_p(tensor.data_ptr()),
                ctypes.c_size_t(tensor.numel()),
                UINT8,
                self.peer,
                self.comm,
                ctypes.c_void_p(self.stream.cuda_stream),
            )
            done = torch.cuda.Event()
            done.record(self.stream)
        deadline = time.monotonic() + self.transport.timeout
        while not done.query():
            if time.monotonic() > deadline:
                raise TimeoutError("%s: not done after %s s" % (what, self.transport.timeout))
            time.sleep(POLL_S)
        self.transport.abandoned.pop()
