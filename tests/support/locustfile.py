"""Locust's users: completions and streamed chats. A wrong text is a failure."""

import json
import os

from locust import HttpUser, constant, task

PROMPT, TEXT = os.environ["PROMPT"], os.environ["TEXT"]


class Client(HttpUser):
    """One client, who asks again at once."""

    wait_time = constant(0)

    def on_start(self) -> None:
        self.client.headers["Authorization"] = f"Bearer {os.environ['KEY']}"

    @task
    def complete(self) -> None:
        with self.client.post(
            "/v1/completions", json={"model": "demo", "prompt": PROMPT}, catch_response=True
        ) as response:
            if response.status_code != 200 or response.json()["choices"][0]["text"] != TEXT:
                response.failure(response.text)

    @task
    def stream(self) -> None:
        body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "stream": True}
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as response:
            lines = [line.decode() for line in response.iter_lines() if line]
            events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
            if lines[-1] != "data: [DONE]" or text != TEXT:
                response.failure("\n".join(lines))
