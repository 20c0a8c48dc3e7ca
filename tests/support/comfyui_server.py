"""A ComfyUI process with the node pack in its custom_nodes folder, and an API-format graph for its queue."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import aiohttp

ROOT = Path(__file__).parents[2]


def graph(checkpoint: str, prompt: str = "a bonsai", width: int = 64, height: int = 48, seed: int = 1) -> dict:
    """Text to image: loader, prompt, Flux2Scheduler, sampler, VAE decode, save; and the model's description."""
    return {
        "1": {"class_type": "BonsaiCheckpointLoader", "inputs": {"checkpoint": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": prompt}},
        "3": {"class_type": "Flux2Scheduler", "inputs": {"steps": 2, "width": width, "height": height}},
        "4": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "5": {"class_type": "RandomNoise", "inputs": {"noise_seed": seed}},
        "6": {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": width, "height": height, "batch_size": 1}},
        "7": {"class_type": "BasicGuider", "inputs": {"model": ["1", 0], "conditioning": ["2", 0]}},
        "8": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["5", 0], "guider": ["7", 0], "sampler": ["4", 0], "sigmas": ["3", 0], "latent_image": ["6", 0]}},
        "9": {"class_type": "VAEDecode", "inputs": {"samples": ["8", 0], "vae": ["1", 2]}},
        "10": {"class_type": "SaveImage", "inputs": {"images": ["9", 0], "filename_prefix": "bonsai"}},
        "11": {"class_type": "BonsaiModelInfo", "inputs": {"model": ["1", 0]}},
    }


class Server:
    """One ComfyUI process on the CPU with a base directory of its own, in which there is ``repository`` or no model."""

    def __init__(self, comfyui: Path, base: Path, repository: Path | None, folder: str = "bonsai-image",
                 options: tuple[str, ...] = (), environment: tuple[tuple[str, str], ...] = ()):
        self.base = base
        (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        (base / "models" / "diffusers").mkdir(parents=True)
        (base / "custom_nodes" / folder).symlink_to(ROOT, target_is_directory=True)
        if repository:
            (base / "models" / "diffusers" / repository.name).symlink_to(repository, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = base / "server.log"
        self.process = subprocess.Popen(
            [sys.executable, "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(base),
             "--disable-api-nodes", "--database-url", f"sqlite:///{base / 'comfyui.db'}", *options],
            cwd=comfyui, stdout=self.log.open("w"), stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": "", **dict(environment)})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def wait(self, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline and self.process.poll() is None:
                try:
                    async with session.get(f"{self.url}/system_stats") as reply:
                        if reply.status == 200:
                            return
                except aiohttp.ClientError:
                    await asyncio.sleep(0.5)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    async def get(self, path: str) -> dict:
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as reply:
            return await reply.json()

    async def post(self, path: str, body: dict | None = None) -> None:
        async with aiohttp.ClientSession() as session, session.post(self.url + path, json=body) as reply:
            assert reply.status == 200

    async def run(self, prompt: dict, seconds: float = 300, cancel_at: tuple[str, str] | None = None) -> list[dict]:
        """Queue ``prompt`` and return the messages of the websocket until it has succeeded or failed.

        ``cancel_at``: interrupt at the messages of this type about this node.
        """
        client = uuid.uuid4().hex
        messages = []
        address = f"{self.url}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as websocket:
            async with session.post(f"{self.url}/prompt", json={"prompt": prompt, "client_id": client}) as reply:
                answer = await reply.json()
                assert reply.status == 200, answer
            async with asyncio.timeout(seconds):
                async for message in websocket:
                    if message.type != aiohttp.WSMsgType.TEXT:
                        continue
                    messages.append(json.loads(message.data))
                    if cancel_at == (messages[-1]["type"], messages[-1]["data"].get("node")):
                        await self.post("/interrupt")
                    if messages[-1]["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                        return messages
        raise AssertionError("the socket closed before the prompt ended")
