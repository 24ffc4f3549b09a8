"""The pair as vLLM has it: a blocking NCCL communicator of two ranks (ctypes), memory and streams by torch."""

import ctypes
import glob
import os

import torch

UINT8 = 1  # ncclUint8


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


def load_nccl():
    named = os.environ.get("PD_NCCL_LIB") or os.environ.get("VLLM_NCCL_SO_PATH")
    beside_torch = os.path.join(os.path.dirname(torch.__file__), "..", "nvidia", "nccl", "lib", "libnccl.so.2")
    for path in [named, *glob.glob(beside_torch), "libnccl.so.2"]:
        if path:
            try:
                return ctypes.CDLL(path)
            except OSError:
                continue
    raise RuntimeError("libnccl.so.2 was not found: name it by PD_NCCL_LIB")


class NcclTransport:
    def __init__(self, device):
        self.device = torch.device(device)
        torch.cuda.set_device(self.device)
        self.nccl = load_nccl()
        self.nccl.ncclGetErrorString.restype = ctypes.c_char_p

    def check(self, result, what):
        if result != 0:
            raise RuntimeError("%s: %s" % (what, self.nccl.ncclGetErrorString(result).decode()))

    def unique_id(self):
        unique_id = UniqueId()
        self.check(self.nccl.ncclGetUniqueId(ctypes.byref(unique_id)), "ncclGetUniqueId")
        return bytes(unique_id)

    def open(self, unique_id, rank):
        torch.cuda.set_device(self.device)  # of this thread
        given = UniqueId.from_buffer_copy(unique_id)
        comm = ctypes.c_void_p()
        self.check(
            self.nccl.ncclCommInitRank(ctypes.byref(comm), 2, given, rank), "ncclCommInitRank as rank %d" % rank
        )
        return NcclPair(self, comm, rank)


class NcclPair:
    def __init__(self, transport, comm, rank):
        self.transport, self.comm, self.peer = transport, comm, rank ^ 1
        self.stream = torch.cuda.Stream(transport.device)

    def send(self, data):
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.transport.device)
        self._run(self.transport.nccl.ncclSend, tensor, "ncclSend")

    def receive(self, size):
        tensor = torch.empty(size, dtype=torch.uint8, device=self.transport.device)
        self._run(self.transport.nccl.ncclRecv, tensor, "ncclRecv")
        return tensor.cpu().numpy().tobytes()

    def close(self):
        self.transport.nccl.ncclCommAbort(self.comm)

    def _run(self, call, tensor, what):
        torch.cuda.set_device(self.transport.device)
        torch.cuda.current_stream().synchronize()
        self.transport.check(
            call(
                ctypes.c_void_p(tensor.data_ptr()),
                ctypes.c_size_t(tensor.numel()),
                UINT8,
                self.peer,
                self.comm,
                ctypes.c_void_p(self.stream.cuda_stream),
            ),
            what,
        )
        self.stream.synchronize()
