"""A reader of KV events as vLLM's users write them: a SUB socket, and a REQ-like DEALER that asks for what was missed.

Prints one JSON line for each batch: {"topic", "sequence", "time", "events"}, with "replay": true where it was asked for, and {"end": -1} at the
end of a replay. Commands on stdin: `replay <sequence>`.
"""

import json
import struct
import sys

import msgpack
import zmq


def main(publish: str, replay: str) -> None:
    context = zmq.Context()
    events = context.socket(zmq.SUB)
    events.setsockopt(zmq.LINGER, 0)
    events.setsockopt(zmq.SUBSCRIBE, b"kv@")
    events.connect(publish)
    asking = context.socket(zmq.DEALER)
    asking.setsockopt(zmq.LINGER, 0)
    asking.connect(replay)
    poller = zmq.Poller()
    poller.register(events, zmq.POLLIN)
    poller.register(asking, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if sys.stdin.fileno() in ready:
            line = sys.stdin.readline()
            if not line:
                return
            asking.send_multipart([b"", struct.pack(">q", int(line.split()[1]))])
        if events in ready:
            topic, sequence, batch = events.recv_multipart()
            tell(batch, topic=topic.decode(), sequence=struct.unpack(">q", sequence)[0])
        if asking in ready:
            delimiter, sequence, batch = asking.recv_multipart()
            if delimiter != b"":
                raise ValueError("an answer without its empty frame")
            number = struct.unpack(">q", sequence)[0]
            if number == -1:
                if batch != b"":
                    raise ValueError("the end of a replay says something")
                say({"end": number})
            else:
                tell(batch, sequence=number, replay=True)


def tell(batch: bytes, **fields) -> None:
    time, events, *_ = msgpack.unpackb(batch)
    say({**fields, "time": time, "events": events})


def say(fields: dict) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
