"""The pair of the host transport, from docs/protocol.md: TCP, a handshake by token, one length-prefixed frame per operation."""

import os
import socket
import struct

MAGIC, VERSION = b"PDHT", 1


class HostPair:
    def __init__(self, sock, timeout):
        self.sock = sock
        sock.settimeout(timeout)

    def send(self, data):
        self.sock.sendall(struct.pack("<Q", len(data)))
        self.sock.sendall(data)

    def receive(self, size):
        (length,) = struct.unpack("<Q", exactly(self.sock, 8))
        if length != size:
            raise ConnectionError("a frame of %d bytes where %d are expected" % (length, size))
        return exactly(self.sock, length)

    def close(self):
        self.sock.close()


class HostTransport:
    def __init__(self, host, timeout):
        self.host, self.timeout = host, timeout
        self.servers = {}

    def about(self):
        return {"transport": "host"}

    def unique_id(self):
        """128 bytes that say where rank 0 listens."""
        server = socket.create_server(
            (self.host, 0), family=socket.AF_INET6 if ":" in self.host else socket.AF_INET
        )
        address, token = self.host.encode(), os.urandom(32)
        port = server.getsockname()[1]
        unique_id = MAGIC + struct.pack("<BBH", VERSION, len(address), port) + address.ljust(88, b"\0") + token
        assert len(unique_id) == 128
        self.servers[unique_id] = server
        return unique_id

    def open(self, unique_id, rank):
        return self._accept(unique_id) if rank == 0 else self._connect(unique_id)

    def _accept(self, unique_id):
        server = self.servers.pop(unique_id)
        server.settimeout(self.timeout)
        try:
            sock, _ = server.accept()
        finally:
            server.close()
        sock.settimeout(self.timeout)
        shown = exactly(sock, 24)
        if shown != handshake(unique_id[96:112]):
            raise ConnectionError("rank 1 showed %r" % shown)
        sock.sendall(handshake(unique_id[112:128]))
        return HostPair(sock, self.timeout)

    def _connect(self, unique_id):
        if len(unique_id) != 128 or unique_id[:5] != MAGIC + bytes([VERSION]):
            raise ValueError("not a unique_id of the host transport: %r" % unique_id[:8])
        length, port = struct.unpack_from("<BH", unique_id, 5)
        host = unique_id[8 : 8 + length].decode()
        if unique_id[8 + length : 96].strip(b"\0"):
            raise ValueError("bytes behind the address")
        sock = socket.create_connection((host, port), timeout=self.timeout)
        sock.sendall(handshake(unique_id[96:112]))
        answer = exactly(sock, 24)
        if answer != handshake(unique_id[112:128]):
            raise ConnectionError("rank 0 answered %r" % answer)
        return HostPair(sock, self.timeout)


def handshake(half):
    return MAGIC + bytes([VERSION]) + bytes(3) + half


def exactly(sock, size):
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = sock.recv_into(view[at:])
        if count == 0:
            raise ConnectionError("the pair was closed at byte %d of %d" % (at, size))
        at += count
    return bytes(data)
