"""ZeroMQ's wire protocol (ZMTP 3.0, NULL mechanism) in plain sockets: as much of DEALER and ROUTER as the peer needs.

So the peer also runs where there is no pyzmq, and is no second user of libzmq. Every wait has a deadline, in seconds.
"""

import queue
import socket
import struct
import threading
import time

MORE, LONG, COMMAND = 1, 2, 4
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
MOST = 1 << 20
HANDSHAKE_S = 50.0


def encode_frame(body, flags=0):
    if len(body) > 255:
        return bytes([flags | LONG]) + struct.pack(">Q", len(body)) + body
    return bytes([flags, len(body)]) + body


def encode_ready(kind, identity):
    def item(name, value):
        return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value

    body = b"\x05READY" + item(b"Socket-Type", kind) + item(b"Identity", identity)
    return encode_frame(body, COMMAND)


def decode_ready(body):
    if not body.startswith(b"\x05READY"):
        raise ConnectionError("the peer answered the greeting with %r" % body[:40])
    items, at = {}, 6
    while at < len(body):
        name_end = at + 1 + body[at]
        (size,) = struct.unpack_from(">I", body, name_end)
        value = body[name_end + 4 : name_end + 4 + size]
        items[body[at + 1 : name_end].decode().lower()] = value
        at = name_end + 4 + size
    return items


class Connection:
    """One TCP connection after the handshake."""

    def __init__(self, sock, kind, identity, timeout):
        self.sock = sock
        self.lock = threading.Lock()
        self.closed = False
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(timeout)
        sock.sendall(GREETING)
        greeting = self._exactly(64)
        if greeting[:1] != b"\xff" or greeting[9:10] != b"\x7f" or greeting[10] < 3:
            raise ConnectionError("no ZMTP 3 greeting: %r" % greeting[:12])
        if greeting[12:32].rstrip(b"\0") != b"NULL":
            raise ConnectionError("the peer wants mechanism %r" % greeting[12:32])
        sock.sendall(encode_ready(kind, identity))
        flags, body = self._frame()
        if not flags & COMMAND:
            raise ConnectionError("a message before READY")
        self.peer = decode_ready(body)
        sock.settimeout(None)

    def send(self, frames):
        last = len(frames) - 1
        data = b"".join(encode_frame(f, MORE if i < last else 0) for i, f in enumerate(frames))
        with self.lock:
            self.sock.sendall(data)

    def receive(self):
        """The next message's frames. Raises ConnectionError at the end."""
        frames = []
        while True:
            flags, body = self._frame()
            if flags & COMMAND:
                if body.startswith(b"\x04PING"):
                    with self.lock:
                        self.sock.sendall(encode_frame(b"\x04PONG" + body[7:], COMMAND))
                continue
            frames.append(body)
            if not flags & MORE:
                return frames

    def close(self):
        self.closed = True
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.sock.close()

    def _frame(self):
        flags = self._exactly(1)[0]
        size = struct.unpack(">Q", self._exactly(8))[0] if flags & LONG else self._exactly(1)[0]
        if size > MOST:
            raise ConnectionError("a frame of %d bytes" % size)
        return flags, self._exactly(size)

    def _exactly(self, size):
        data = bytearray()
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise ConnectionError("the peer closed the connection")
            data += part
        return bytes(data)


class Dealer:
    """Sends bodies to one ROUTER and connects anew when the connection is lost, as libzmq does."""

    def __init__(self, identity, host, port, timeout=HANDSHAKE_S):
        self.identity, self.host, self.port, self.timeout = identity.encode(), host, port, timeout
        self.inbox = queue.Queue()
        self.connection = None
        self.closed = False
        self.lost = threading.Event()

    def send(self, body):
        deadline = time.monotonic() + self.timeout
        if self.connection is None or self.lost.is_set():
            self._connect(deadline)
        self.connection.send([body])

    def receive(self, timeout):
        """The next message's one frame, None where none comes in time."""
        try:
            frames = self.inbox.get(timeout=timeout)
        except queue.Empty:
            return None
        if len(frames) != 1:
            raise ConnectionError("an answer of %d frames" % len(frames))
        return frames[0]

    def close(self):
        self.closed = True
        if self.connection:
            self.connection.close()

    def _connect(self, deadline):
        while True:
            try:
                sock = socket.create_connection((self.host, self.port), timeout=self.timeout)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.connection = Connection(sock, b"DEALER", self.identity, self.timeout)
        self.lost = threading.Event()
        threading.Thread(target=self._read, args=(self.connection, self.lost), daemon=True).start()

    def _read(self, connection, lost):
        try:
            while True:
                self.inbox.put(connection.receive())
        except (OSError, ConnectionError):
            lost.set()


class Router:
    """Takes connections; the newest connection of a routing id has it."""

    def __init__(self, host, port):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.server = socket.create_server((host, port), family=family)
        self.port = self.server.getsockname()[1]
        self.inbox = queue.Queue()
        self.connections = {}
        self.closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def receive(self, timeout):
        """(routing id, frames after it), or None."""
        try:
            return self.inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def send(self, identity, body):
        self.connections[identity].send([body])

    def close(self):
        self.closed = True
        self.server.close()
        for connection in list(self.connections.values()):
            connection.close()

    def _accept(self):
        while not self.closed:
            try:
                sock, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        try:
            connection = Connection(sock, b"ROUTER", b"", HANDSHAKE_S)
            identity = connection.peer.get("identity", b"")
            self.connections[identity] = connection
            while True:
                self.inbox.put((identity, connection.receive()))
        except (OSError, ConnectionError):
            sock.close()
