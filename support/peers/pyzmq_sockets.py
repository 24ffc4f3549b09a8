"""The sockets of zmtp.py by pyzmq (libzmq), as a cross-check that ours speak what libzmq speaks. Calls may come from several threads."""

import queue
import threading

import zmq


class _Pump:
    """pyzmq sockets belong to one thread: this one sends what others queue and queues what arrives."""

    def __init__(self, make):
        self.inbox, self.outbox, self.closed = queue.Queue(), queue.Queue(), False
        self.ready, self.port = threading.Event(), None
        self.thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self.thread.start()
        self.ready.wait(5)

    def _run(self, make):
        context = zmq.Context()
        sock, self.port = make(context)
        sock.linger = 0
        self.ready.set()
        while not self.closed:
            while not self.outbox.empty():
                sock.send_multipart(self.outbox.get())
            if sock.poll(1):
                self.inbox.put(sock.recv_multipart())
        sock.close()
        context.term()

    def receive(self, timeout):
        try:
            return self.inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def close(self):
        self.closed = True
        self.thread.join(5)


def _bracketed(host):
    return "[%s]" % host if ":" in host else host


class Dealer:
    def __init__(self, identity, host, port, timeout=50.0):
        self.lost = threading.Event()

        def watch(events):
            events.recv_multipart()  # libzmq connects anew without telling but here
            self.lost.set()
            events.close()

        def make(context):
            sock = context.socket(zmq.DEALER)
            sock.setsockopt_string(zmq.IDENTITY, identity)
            sock.setsockopt(zmq.IPV6, 1)
            events = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            threading.Thread(target=watch, args=(events,), daemon=True).start()
            sock.connect("tcp://%s:%d" % (_bracketed(host), port))
            return sock, port

        self.pump = _Pump(make)

    def send(self, body):
        self.pump.outbox.put([body])

    def receive(self, timeout):
        frames = self.pump.receive(timeout)
        if frames is not None and len(frames) != 1:
            raise ConnectionError("an answer of %d frames" % len(frames))
        return frames and frames[0]

    def close(self):
        self.pump.close()


class Router:
    def __init__(self, host, port):
        def make(context):
            sock = context.socket(zmq.ROUTER)
            sock.setsockopt(zmq.IPV6, 1)
            sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
            sock.bind("tcp://%s:%s" % (_bracketed(host), port or "*"))
            return sock, int(sock.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])

        self.pump = _Pump(make)
        self.port = self.pump.port

    def receive(self, timeout):
        frames = self.pump.receive(timeout)
        return frames and (frames[0], frames[1:])

    def send(self, identity, body):
        self.pump.outbox.put([identity, body])

    def close(self):
        self.pump.close()
