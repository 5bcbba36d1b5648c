"""A client of the Debug Adapter Protocol, what an editor does when it attaches, and no more."""

from __future__ import annotations

import json
import socket
from pathlib import Path

TIMEOUT_SECONDS = 180  # Python runs slowly under a debugger


class DebugClient:
    """Attached to a debugpy server; events that come while an answer is awaited are kept.

    https://microsoft.github.io/debug-adapter-protocol
    """

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SECONDS)
        self.stream = self.socket.makefile("rb")
        self.sent, self.events = 0, []
        self.request("initialize", adapterID="test", pathFormat="path")
        # Its answer comes only after configurationDone.
        self._send("attach", justMyCode=False)
        self.event("initialized")

    def run_to(self, file: Path, line: int) -> int:
        """Set a breakpoint, let the program run, and return the id of the thread that stopped there."""
        answer = self.request(
            "setBreakpoints", source={"path": str(file)}, breakpoints=[{"line": line}]
        )
        assert answer["breakpoints"][0]["verified"], answer
        self.request("configurationDone")
        return self.event("stopped")["threadId"]

    def evaluate(self, expression: str, thread: int) -> str:
        """The value of an expression in the innermost frame, as text."""
        frame = self.request("stackTrace", threadId=thread)["stackFrames"][0]
        return self.request("evaluate", expression=expression, frameId=frame["id"])["result"]

    def go_on_and_leave(self, file: Path, thread: int) -> None:
        """Remove the breakpoints, continue, and detach; the program runs on."""
        self.request("setBreakpoints", source={"path": str(file)}, breakpoints=[])
        self.request("continue", threadId=thread)
        self.request("disconnect", terminateDebuggee=False)
        self.socket.close()

    def request(self, command: str, **arguments) -> dict:
        number = self._send(command, **arguments)
        while True:
            message = self._receive()
            if message["type"] == "event":
                self.events.append(message)
            elif message.get("request_seq") == number:
                assert message["success"], message
                return message.get("body", {})

    def event(self, name: str) -> dict:
        while True:
            for message in self.events:
                if message["event"] == name:
                    self.events.remove(message)
                    return message.get("body", {})
            message = self._receive()
            if message["type"] == "event":
                self.events.append(message)

    def _send(self, command: str, **arguments) -> int:
        self.sent += 1
        message = {"seq": self.sent, "type": "request", "command": command, "arguments": arguments}
        data = json.dumps(message).encode()
        self.socket.sendall(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        return self.sent

    def _receive(self) -> dict:
        length = 0
        while line := self.stream.readline().strip():
            length = int(line.split(b":")[1])
        assert length, "the debug server closed the connection"
        return json.loads(self.stream.read(length))
