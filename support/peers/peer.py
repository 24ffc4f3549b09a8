"""A worker of another make, written from docs/protocol.md: it speaks NEW, PUT, GET and ping as vLLM's P2P NCCL engine does.

    peer.py [--host 127.0.0.1] [--port 0] [--transport host|nccl] [--sockets zmtp|pyzmq] [--device cuda:0] [--timeout 50]

Commands come as JSON lines on stdin, `{"id": 1, "op": "put", ...}`; each is answered by one line on stdout, `{"id": 1, ...}` or
`{"id": 1, "error": "..."}`. The first line is `{"ready": "host:port"}`. What vLLM would not understand ends the process with status 3
and a line on stderr: any answer to NEW, anything but `0` or `1` to a PUT, anything but {ret} or {ret, shape, dtype} to a GET, and, where
we listen, our own fields in a PUT or a GET.

    put       peer, tensor_id, shape, dtype, seed    producer: NEW where there is no pair, PUT, the data     -> answer, sha256
    get       peer, tensor_id                        consumer: NEW where there is no pair, GET, the data     -> ret, shape, dtype, sha256
    keep      tensor_id, shape, dtype, seed          producer: kept, to be asked for by GET                  -> sha256
    received  tensor_id, timeout                     consumer: waits until it has come by PUT                -> shape, dtype, sha256, from
    new       peer                                   NEW although there is a pair
    refuse    count                                  consumer: answers the next PUTs with 1
    ping      proxy, type, http_address              discovery, one ping
    pinged    timeout                                proxy: waits for a ping                                 -> its fields
    disconnected  peer, timeout                      waits until the connection to that ROUTER is lost
    joined    peer, timeout, times                   waits until the other side has asked for so many pairs (1), and the last is there
    joins_of  peer                                   how many that are so far                              -> times
    messages                                         commands seen by the listener so far, with their keys
    quit

Content is made from its seed, by SHAKE-128, so that both ends can tell it.
"""

import argparse
import faulthandler
import hashlib
import json
import math
import os
import signal
import sys
import threading
import traceback

import msgpack

from host_transport import HostTransport

SIZES = {
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
}


def violation(what):
    print("violation: %s" % what, file=sys.stderr, flush=True)
    os._exit(3)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def content(shape, dtype, seed):
    return hashlib.shake_128(str(seed).encode()).digest(size_of(shape, dtype))


def size_of(shape, dtype):
    return math.prod(shape) * SIZES[dtype]


def split_address(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class Peer:
    def __init__(self, args):
        if args.sockets == "pyzmq":
            import pyzmq_sockets as sockets
        else:
            import zmtp as sockets
        self.sockets, self.timeout = sockets, args.timeout
        if args.transport == "nccl":
            from nccl_transport import NcclTransport

            self.transport = NcclTransport(args.device, args.timeout)
        else:
            self.transport = HostTransport(args.host, args.timeout)
        self.router = sockets.Router(args.host, args.port)
        bracketed = "[%s]" % args.host if ":" in args.host else args.host
        self.address = "%s:%d" % (bracketed, self.router.port)
        self.dealers, self.pairs = {}, {}
        self.replaced = []  # communicators that a newer one took the place of: vLLM never closes them
        self.kept, self.arrived, self.seen = {}, {}, []
        self.refusals = 0
        self.joins, self.pings = {}, []
        self.changed = threading.Condition()
        threading.Thread(target=self.listen, daemon=True).start()

    # announcing: as vLLM, one communicator per address, whoever made it, in both directions

    def connect(self, peer):
        if peer not in self.dealers:
            host, port = split_address(peer)
            self.dealers[peer] = self.sockets.Dealer(self.address, host, port, self.timeout)
            if peer not in self.pairs:
                unique_id = self.transport.unique_id()
                self.dealers[peer].send(msgpack.packb({"cmd": "NEW", "unique_id": unique_id}))
                self.keep_pair(peer, self.transport.open(unique_id, 0))
        return self.dealers[peer]

    def keep_pair(self, peer, pair):
        if peer in self.pairs:
            self.replaced.append(self.pairs[peer])
        self.pairs[peer] = pair

    def ask(self, peer, message):
        """One announcement at a time: the next message on the socket is its answer."""
        dealer = self.connect(peer)
        dealer.send(msgpack.packb(message))
        answer = dealer.receive(self.timeout)
        if answer is None:
            raise TimeoutError("no answer to %s within %s s" % (message["cmd"], self.timeout))
        return answer

    def put(self, command):
        shape, dtype, peer = command["shape"], command["dtype"], command["peer"]
        data = content(shape, dtype, command["seed"])
        message = {"cmd": "PUT", "tensor_id": command["tensor_id"], "shape": shape, "dtype": dtype}
        answer = self.ask(peer, message)
        if answer not in (b"0", b"1"):
            violation("PUT answered %r" % answer)
        if answer == b"0":
            self.pairs[peer].send(data)
        return {"answer": answer.decode(), "sha256": sha256(data)}

    def get(self, command):
        peer = command["peer"]
        answer = self.ask(peer, {"cmd": "GET", "tensor_id": command["tensor_id"]})
        try:
            fields = msgpack.unpackb(answer)
            keys = sorted(fields)
        except Exception:
            violation("GET answered %r" % answer)
        if fields.get("ret") != 0:
            if keys != ["ret"]:
                violation("GET answered %r" % fields)
            return {"ret": fields["ret"]}
        if keys != ["dtype", "ret", "shape"]:
            violation("GET answered %r" % fields)
        shape, dtype = fields["shape"], fields["dtype"]
        data = self.pairs[peer].receive(size_of(shape, dtype))
        return {"ret": 0, "shape": shape, "dtype": dtype, "sha256": sha256(data)}

    def ping(self, command):
        host, port = split_address(command["proxy"])
        key = "ping " + command["proxy"]
        if key not in self.dealers:
            self.dealers[key] = self.sockets.Dealer(self.address, host, port, self.timeout)
        fields = {"type": command["type"], "http_address": command["http_address"], "zmq_address": self.address}
        self.dealers[key].send(msgpack.packb(fields))
        return {}

    # listening: one message at a time, its transfer included

    def listen(self):
        while True:
            message = self.router.receive(1.0)
            if message is None:
                continue
            identity, frames = message
            try:
                self.handle(identity, frames)
            except Exception as error:  # the pair is lost, the listener goes on
                print("listener: %s" % error, file=sys.stderr, flush=True)
                traceback.print_exc()

    def handle(self, identity, frames):
        if len(frames) != 1:
            violation("a message of %d frames after the routing id" % len(frames))
        fields = msgpack.unpackb(frames[0])
        peer, cmd = identity.decode(), fields.get("cmd")
        if "type" in fields:  # we are the proxy: a ping, which gets no answer
            with self.changed:
                self.pings.append({key: fields[key] for key in ("type", "http_address", "zmq_address")})
                self.changed.notify_all()
            return
        self.seen.append({"cmd": cmd, "keys": sorted(fields), "from": peer})
        if cmd == "NEW":
            if len(fields["unique_id"]) != 128:
                violation("a unique_id of %d bytes" % len(fields["unique_id"]))
            pair = self.transport.open(fields["unique_id"], 1)
            with self.changed:
                self.keep_pair(peer, pair)
                self.joins[peer] = self.joins.get(peer, 0) + 1
                self.changed.notify_all()
        elif cmd == "PUT":
            if sorted(fields) != ["cmd", "dtype", "shape", "tensor_id"]:
                violation("PUT with the fields %s" % sorted(fields))
            self.take(identity, peer, fields)
        elif cmd == "GET":
            if sorted(fields) != ["cmd", "tensor_id"]:
                violation("GET with the fields %s" % sorted(fields))
            self.give(identity, peer, fields["tensor_id"])
        else:
            violation("command %r" % cmd)

    def take(self, identity, peer, fields):
        if self.refusals > 0:
            self.refusals -= 1
            self.router.send(identity, b"1")
            return
        shape, dtype = fields["shape"], fields["dtype"]
        self.router.send(identity, b"0")
        data = self.pairs[peer].receive(size_of(shape, dtype))
        with self.changed:
            self.arrived[fields["tensor_id"]] = {
                "shape": shape,
                "dtype": dtype,
                "sha256": sha256(data),
                "from": peer,
            }
            self.changed.notify_all()

    def give(self, identity, peer, tensor_id):
        tensor = self.kept.get(tensor_id)
        if tensor is None:
            self.router.send(identity, msgpack.packb({"ret": 1}))
            return
        shape, dtype, data = tensor
        self.router.send(identity, msgpack.packb({"ret": 0, "shape": shape, "dtype": dtype}))
        self.pairs[peer].send(data)

    # the rest

    def new(self, command):
        """NEW although there is a pair, as when both ends begin at once."""
        peer = command["peer"]
        self.connect(peer)
        unique_id = self.transport.unique_id()
        self.dealers[peer].send(msgpack.packb({"cmd": "NEW", "unique_id": unique_id}))
        self.keep_pair(peer, self.transport.open(unique_id, 0))
        return {}

    def keep(self, command):
        data = content(command["shape"], command["dtype"], command["seed"])
        self.kept[command["tensor_id"]] = (command["shape"], command["dtype"], data)
        return {"sha256": sha256(data)}

    def received(self, command):
        self.wait(lambda: command["tensor_id"] in self.arrived, command, "tensor")
        return self.arrived[command["tensor_id"]]

    def joined(self, command):
        self.wait(lambda: self.joins.get(command["peer"], 0) >= command.get("times", 1), command, "pair")
        return {"times": self.joins[command["peer"]]}

    def joins_of(self, command):
        return {"times": self.joins.get(command["peer"], 0)}

    def pinged(self, command):
        self.wait(lambda: self.pings, command, "ping")
        return self.pings[0]

    def disconnected(self, command):
        if not self.dealers[command["peer"]].lost.wait(command.get("timeout", self.timeout)):
            raise TimeoutError("still connected to %s" % command["peer"])
        return {}

    def refuse(self, command):
        self.refusals = command["count"]
        return {}

    def messages(self, _command):
        return {"messages": self.seen}

    def wait(self, there, command, what):
        with self.changed:
            if not self.changed.wait_for(there, command.get("timeout", self.timeout)):
                raise TimeoutError("no %s in time; tensors: %s" % (what, sorted(self.arrived)))

    def quit(self):
        for peer, dealer in self.dealers.items():
            stray = dealer.receive(0.05)
            if stray is not None:
                violation("%s sent %r without being asked" % (peer, stray))


OPS = """put get new keep received refuse ping disconnected joined joins_of pinged messages""".split()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--transport", choices=("host", "nccl"), default="host")
    parser.add_argument("--sockets", choices=("zmtp", "pyzmq"), default="zmtp")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--timeout", type=float, default=50.0)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    peer = Peer(parser.parse_args())
    print(json.dumps({"ready": peer.address, "about": peer.transport.about()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["op"] == "quit":
            peer.quit()
            print(json.dumps({"id": command["id"]}), flush=True)
            break
        try:
            if command["op"] not in OPS:
                raise ValueError("no operation %r" % command["op"])
            result = getattr(peer, command["op"])(command)
        except Exception as error:
            result = {"error": "%s: %s" % (type(error).__name__, error)}
        print(json.dumps({"id": command["id"], **result}), flush=True)
    os._exit(0)  # a listener inside of a communicator's init cannot be joined


if __name__ == "__main__":
    main()
