"""As much of torch as nccl_transport.py uses, over the stand-in CUDA runtime (PD_CUDART_LIB). For PYTHONPATH."""

import ctypes
import os
import types

__version__ = "stand-in"
uint8 = "uint8"
_cudart = ctypes.CDLL(os.environ["PD_CUDART_LIB"])
_DEFAULT_COPY, _NON_BLOCKING, _NOT_READY = 4, 1, 600


def _check(code, what):
    if code != 0:
        raise RuntimeError("%s: CUDA error %d" % (what, code))


class device:
    def __init__(self, name):
        self.index = int(str(name).rpartition(":")[2])


class _Memory:
    """GPU memory, freed with the last tensor."""

    def __init__(self, size):
        self.pointer = ctypes.c_void_p()
        _check(_cudart.cudaMalloc(ctypes.byref(self.pointer), ctypes.c_size_t(size)), "cudaMalloc of %d bytes" % size)

    def __del__(self):
        _cudart.cudaFree(self.pointer)


class _GpuTensor:
    def __init__(self, size):
        self.memory, self.size = _Memory(size), size

    def data_ptr(self):
        return self.memory.pointer.value

    def numel(self):
        return self.size

    def cpu(self):
        host = bytearray(self.size)
        _copy((ctypes.c_char * self.size).from_buffer(host), self.memory.pointer, self.size)
        return _HostTensor(host)


class _HostTensor:
    def __init__(self, data):
        self.data = data

    def to(self, _device):
        tensor = _GpuTensor(len(self.data))
        _copy(tensor.memory.pointer, (ctypes.c_char * tensor.size).from_buffer(self.data), tensor.size)
        return tensor

    def numpy(self):
        return self

    def tobytes(self):
        return bytes(self.data)


def frombuffer(data, dtype):
    return _HostTensor(data)


def empty(size, dtype, device):
    return _GpuTensor(size)


class Stream:
    def __init__(self, _device):
        handle = ctypes.c_void_p()
        _check(_cudart.cudaStreamCreateWithFlags(ctypes.byref(handle), _NON_BLOCKING), "cudaStreamCreateWithFlags")
        self.cuda_stream = handle.value


class Event:
    def __init__(self):
        self.handle = ctypes.c_void_p()
        _check(_cudart.cudaEventCreateWithFlags(ctypes.byref(self.handle), 2), "cudaEventCreateWithFlags")

    def record(self, stream):
        _check(_cudart.cudaEventRecord(self.handle, ctypes.c_void_p(stream.cuda_stream)), "cudaEventRecord")

    def query(self):
        code = _cudart.cudaEventQuery(self.handle)
        if code != _NOT_READY:
            _check(code, "cudaEventQuery")
        return code == 0


def _copy(target, source, size):
    """Pageable memory: over when the call is."""
    stream = _streams.setdefault("copies", None) or Stream(None)
    _streams["copies"] = stream
    _check(
        _cudart.cudaMemcpyAsync(
            target, source, ctypes.c_size_t(size), _DEFAULT_COPY, ctypes.c_void_p(stream.cuda_stream)
        ),
        "cudaMemcpyAsync",
    )


_streams = {}
cuda = types.SimpleNamespace(
    Stream=Stream,
    Event=Event,
    set_device=lambda device: _check(_cudart.cudaSetDevice(device.index), "cudaSetDevice"),
    current_stream=lambda: types.SimpleNamespace(synchronize=lambda: None),
    get_device_name=lambda _device: "stand-in",
)
